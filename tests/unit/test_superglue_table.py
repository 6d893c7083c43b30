"""SuperGLUE's table from hand-made results: means, deviations, patterns, learning rates, unfinished runs."""

import pytest

from megaptune.results.superglue_table import SuperGlueTable


def job(task: str, method: str, seed, score: float, pattern: str = "a", **more):
    metrics = {"accuracy": score, "f1": score - 0.2} if task == "CB" else {"accuracy": score}
    shown = score - 0.1 if task == "CB" else score
    counts = {"test": 10}
    base = {"template": "t", "majority": 0.5, "counts": counts, "metrics": metrics, "score": shown}
    return {"task": task, "method": method, "seed": seed, "pattern": pattern, **base, **more}


def row(table: SuperGlueTable, task: str, metric: str):
    return next(found for found in table.rows if (found["task"], found["metric"]) == (task, metric))


def test_means_and_deviations_over_seeds():
    results = [job("CB", "ptuning", seed, 0.6 + 0.1 * seed, best_dev_score=0.5) for seed in (0, 1, 2)]
    results += [job("RTE", "ptuning", seed, 0.5, best_dev_score=0.5) for seed in (0, 1, 2)]
    results += [job("CB", "manual", None, 0.4), job("RTE", "manual", None, 0.5)]
    table = SuperGlueTable(results, [0, 1, 2])
    assert row(table, "CB", "accuracy")["ptuning"] == pytest.approx({"mean": 0.7, "sd": 0.1, "seeds": 3})
    assert row(table, "CB", "f1")["ptuning"]["mean"] == pytest.approx(0.5)
    assert row(table, "CB", "score")["ptuning"]["mean"] == pytest.approx(0.6)
    assert row(table, "mean of 2", "score")["ptuning"] == pytest.approx({"mean": 0.55, "sd": 0.05, "seeds": 3})
    assert row(table, "mean of 2", "score")["manual"] == {"mean": pytest.approx(0.4), "sd": None, "seeds": 1}
    assert "| CB | accuracy | 10 |  | 40.0 | 70.0 ± 10.0 |" in table.markdown()
    assert not table.patterns


def test_patterns_have_a_table_of_their_own():
    results = [job("RTE", "manual", None, score, name) for name, score in (("a", 0.4), ("b", 0.6))]
    table = SuperGlueTable(results, [0])
    assert row(table, "RTE", "accuracy")["manual"]["mean"] == pytest.approx(0.5)
    assert [(found["pattern"], found["score"]["mean"]) for found in table.patterns] == [("a", 0.4), ("b", 0.6)]


def test_of_learning_rates_dev_chooses():
    """The better test figure is that of the rate that dev does not prefer."""
    results = [
        job("RTE", "ptuning", seed, score, learning_rate=rate, best_dev_score=dev)
        for rate, score, dev in ((1e-3, 0.9, 0.5), (1e-2, 0.6, 0.7))
        for seed in (0, 1)
    ]
    cell = row(SuperGlueTable(results, [0, 1]), "RTE", "accuracy")["ptuning"]
    assert (cell["mean"], cell["seeds"]) == (pytest.approx(0.6), 2)


def test_an_unfinished_run_has_a_mean_of_what_all_tasks_have():
    results = [
        job("RTE", "ptuning", 0, 0.5, best_dev_score=0.5),
        job("CB", "manual", None, 0.5),
        job("RTE", "manual", None, 0.7),
    ]
    table = SuperGlueTable(results, [0, 1])
    assert row(table, "mean of 2", "score")["ptuning"] is None
    assert row(table, "mean of 2", "score")["manual"]["mean"] == pytest.approx(0.55)
    assert SuperGlueTable([], [0]).markdown()
