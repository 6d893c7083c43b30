"""The table at the end of a run, against averages worked by hand."""

import io
import json
import math
from pathlib import Path
from typing import Any

import pytest

from megaptune.config import validate
from megaptune.results.table import ResultsTable, Row, Spread


def result(task: str, method: str, seed: int | None, p_at_1: float, test: int) -> dict[str, Any]:
    return {
        "task": task,
        "method": method,
        "seed": seed,
        "test": {"vocabulary": {"p_at_1": p_at_1}, "answers": {"p_at_1": p_at_1 + 0.1}},
        "baselines": {"majority": 0.1 if task == "P17" else 0.4, "unseen": 0.2, "in_subject": 0.0},
        "counts": {"train": 10, "dev": 5, "test": test},
        "candidates": {"vocabulary": 100, "answers": 7},
    }


# Two relations of 100 and 300 test records, two seeds.
RESULTS = [
    result("P17", "manual", None, 0.20, 100),
    result("P17", "ptuning", 0, 0.50, 100),
    result("P17", "ptuning", 1, 0.60, 100),
    result("P103", "manual", None, 0.60, 300),
    result("P103", "ptuning", 0, 0.70, 300),
    result("P103", "ptuning", 1, 0.70, 300),
]


def rows(results: list[dict[str, Any]], seeds: tuple[int, ...] = (0, 1)) -> dict[str, Row]:
    return {row.name: row for row in ResultsTable(results, ["vocabulary"], list(seeds)).rows}


def test_row_of_a_relation_is_the_mean_and_sample_deviation_over_seeds():
    row = rows(RESULTS)["P17"]
    assert row.ptuning is not None
    assert row.manual is not None
    assert row.ptuning.mean == pytest.approx(0.55)
    assert row.ptuning.deviation == pytest.approx(math.sqrt(2 * 0.05**2 / 1))
    assert row.manual.mean == 0.2
    assert row.gain == pytest.approx(0.35)
    assert (row.candidates, row.test_count, row.majority) == (100, 100, 0.1)


def test_macro_average_counts_relations_alike():
    row = rows(RESULTS)["macro average of 2"]
    assert row.manual is not None
    assert row.ptuning is not None
    assert row.manual.mean == pytest.approx((0.2 + 0.6) / 2)
    assert row.ptuning.mean == pytest.approx((0.6 + 0.65) / 2)
    assert row.majority == pytest.approx(0.25)
    assert row.test_count == 400


def test_micro_average_counts_test_records_alike():
    row = rows(RESULTS)["micro average of 2"]
    assert row.manual is not None
    assert row.ptuning is not None
    assert row.manual.mean == pytest.approx((100 * 0.2 + 300 * 0.6) / 400)
    # Seed 0: (50 + 210) / 400 = 0.65; seed 1: (60 + 210) / 400 = 0.675.
    assert row.ptuning.mean == pytest.approx(0.6625)
    assert row.majority == pytest.approx((100 * 0.1 + 300 * 0.4) / 400)


def test_deviation_of_an_average_is_that_of_the_seeds_averages():
    row = rows(RESULTS)["micro average of 2"]
    assert row.ptuning is not None
    assert row.ptuning.deviation == pytest.approx(0.025 / math.sqrt(2))
    assert row.ptuning.seeds == 2


def test_average_leaves_out_a_seed_that_has_not_finished_all_relations():
    row = rows(RESULTS[:-1])["macro average of 2"]
    assert row.ptuning is not None
    assert row.ptuning.seeds == 1
    assert row.ptuning.mean == pytest.approx(0.6)


def test_average_without_all_manual_results_shows_none():
    row = rows([result for result in RESULTS if (result["task"], result["method"]) != ("P103", "manual")])
    assert row["macro average of 2"].manual is None
    assert row["macro average of 2"].gain is None


def test_single_relation_has_no_average():
    assert list(rows(RESULTS[:3])) == ["P17"]


def test_each_reading_has_its_row():
    table = ResultsTable(RESULTS, ["answers", "vocabulary"], [0, 1])
    assert [(row.name, row.reading) for row in table.rows[:2]] == [("P17", "answers"), ("P17", "vocabulary")]
    assert table.rows[0].manual is not None
    assert table.rows[0].manual.mean == pytest.approx(0.3)
    assert table.rows[0].candidates == 7


def test_spread_reads_as_per_cent_and_hides_a_deviation_of_one_seed():
    assert str(Spread.of([0.5, 0.6])) == "55.0 ± 7.1"
    assert str(Spread.of([0.5])) == "50.0"
    assert Spread.of([]) is None


def test_spread_of_one_seed_has_no_deviation_in_json():
    spread = Spread.of([0.5])
    assert spread is not None
    assert spread.as_json() == {"mean": 0.5, "sd": None, "seeds": 1}


def test_markdown_has_a_line_per_row():
    table = ResultsTable(RESULTS, ["vocabulary"], [0, 1])
    lines = table.markdown().splitlines()
    assert lines[0].startswith("| relation | reading |")
    assert lines[2] == "| P17 | vocabulary | 100 | 100 | 10.0 | 20.0 | 55.0 ± 7.1 | +35.0 | 20.0 | 0.0 |"
    widths = {line.count("|") for line in lines[:6]}
    assert widths == {len(table.columns) + 1}


def test_methods_that_tune_the_lm_have_columns_of_their_own():
    """Each averages over its own jobs: a seed's other methods do not count."""
    tuned = [result(task, "manual+finetune", seed, 0.8, 100) for task in ("P17", "P103") for seed in (0, 1)]
    table = ResultsTable([*RESULTS, *tuned, result("P17", "finetune", 0, 0.3, 100)], ["vocabulary"], [0, 1])
    assert table.columns[5:10] == ["manual", "FT", "manual + FT", "P-tuning", "gain"]
    by_name = {row.name: row for row in table.rows}
    assert str(by_name["P17"].scores["finetune"]) == "30.0"
    macro = by_name["macro average of 2"]
    assert macro.scores["manual+finetune"].mean == pytest.approx(0.8)
    assert macro.scores["ptuning"].mean == pytest.approx(0.625)
    assert "finetune" not in macro.scores  # P103 has none


def test_relations_average_by_type_too():
    types = {"P17": "N-1", "P103": "N-M"}
    found = rows([{**job, "type": types[job["task"]]} for job in RESULTS])
    assert str(found["macro average of 1, type N-M"].manual) == "60.0"
    assert found["micro average of 1, type N-1"].ptuning.mean == pytest.approx(0.55)


def test_a_sweep_averages_each_variant_and_what_dev_would_choose():
    """On P17 dev prefers the small rate, on P103 the large one; test scores decide nothing."""
    scores = {
        ("P17", "lr1"): (0.9, 0.2),
        ("P17", "lr2"): (0.1, 0.8),
        ("P103", "lr1"): (0.3, 0.6),
        ("P103", "lr2"): (0.4, 0.5),
    }
    swept = [
        {**result(task, "ptuning", 0, test, 100), "variant": variant, "best_dev_p_at_1": dev}
        for (task, variant), (dev, test) in scores.items()
    ]
    table = ResultsTable([*[job for job in RESULTS if job["method"] == "manual"], *swept], ["vocabulary"], [0])
    by_name = {(row.name, row.variant): row for row in table.rows}
    chosen = {key for key, row in by_name.items() if row.dev_choice}
    assert chosen == {("P17", "lr1"), ("P103", "lr2")}
    macro = {variant: by_name["macro average of 2", variant].ptuning.mean for variant in ("lr1", "lr2", "dev's choice")}
    assert macro == pytest.approx({"lr1": 0.4, "lr2": 0.65, "dev's choice": 0.35})
    assert by_name["P17", "lr2"].manual.mean == 0.2


def test_console_shows_all_methods_whole_on_a_line():
    from rich.console import Console

    tuned = [
        result(task, method, seed, 0.5 + 0.1 * seed, 100)
        for task in ("P17", "P103")
        for method in ("finetune", "manual+finetune", "ptuning+finetune")
        for seed in (0, 1)
    ]
    console = Console(width=132, record=True, file=io.StringIO())
    console.print(ResultsTable([*RESULTS, *tuned], ["answers", "vocabulary"], [0, 1]).console())
    shown = console.export_text()
    assert "…" not in shown
    assert "55.0 ± 7.1" in shown


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run directory with the result files of RESULTS."""
    for job in RESULTS:
        method = job["method"] if job["seed"] is None else f"{job['method']}-seed{job['seed']}"
        folder = tmp_path / "jobs" / job["task"] / method
        folder.mkdir(parents=True)
        (folder / "result.json").write_text(json.dumps(job))
    return tmp_path


def read(run: Path) -> ResultsTable:
    task = {"type": "custom", "train": "a.jsonl", "dev": "b.jsonl", "test": "c.jsonl", "answer": "x"}
    raw = {"backbone": {"path": "b"}, "task": task, "methods": ["ptuning"], "run": {"seeds": [0, 1]}}
    return ResultsTable.read(run, validate(raw, "config.yaml"))


def test_table_is_read_from_the_jobs_in_the_order_of_relation_numbers(run: Path):
    names = [row.name for row in read(run).rows if row.reading == "vocabulary"]
    assert names == ["P17", "P103", "macro average of 2", "micro average of 2"]


def test_written_files_hold_the_table_and_every_job(run: Path):
    read(run).write(run)
    written = json.loads((run / "results.json").read_text(encoding="utf-8"))
    assert len(written["jobs"]) == 6
    by_name = {(row["relation"], row["reading"]): row for row in written["table"]}
    assert by_name["P17", "vocabulary"]["ptuning"]["mean"] == pytest.approx(0.55)
    assert by_name["micro average of 2", "vocabulary"]["gain"] == pytest.approx(0.6625 - 0.5)
    assert "| micro average of 2 | vocabulary |" in (run / "results.md").read_text(encoding="utf-8")


def test_unfinished_run_has_the_table_of_what_is_there(run: Path):
    (run / "jobs" / "P103" / "manual" / "result.json").unlink()
    row = next(row for row in read(run).rows if row.name == "P103" and row.reading == "vocabulary")
    assert row.manual is None
    assert row.ptuning is not None
