"""What a run tells: the record and its views carry the same figures, and a resumed run repeats none."""

import json

import pytest
from ranks import run_ranks, train
from runs import metrics

from megaptune.run.monitor import Monitor, Pace


@pytest.fixture(scope="module")
def run(tiny, facts, tmp_path_factory):
    from tiny import write_config

    folder = tmp_path_factory.mktemp("monitor")
    files = {split: str(path) for split, path in facts.items()}
    config = write_config(
        folder, backbone={"path": str(tiny("llama"))}, task=files, monitor={"tensorboard": True, "log_every": 2}
    )
    run_ranks(1, train, config)
    return folder / "run"


@pytest.fixture(scope="module")
def events(run):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    accumulator = EventAccumulator(str(run / "tb" / "cities" / "ptuning-seed0"))
    accumulator.Reload()
    return accumulator


def test_every_step_is_recorded_with_its_figures(run):
    steps = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    steps = [line for line in steps if line["kind"] == "train"]
    assert [line["step"] for line in steps] == [1, 2, 3, 4, 5, 6]
    wanted = {"loss", "p_at_1", "learning_rate", "table_gradient_norm", "prompt_norm", "host_memory_gib"}
    assert wanted <= steps[0].keys()
    assert {"examples_per_s", "tokens_per_s"} <= steps[-1].keys()


def test_tensorboard_shows_the_recorded_figures(run, events):
    recorded = {line["step"]: line["loss"] for line in metrics(run) if line["kind"] == "train"}
    shown = {event.step: event.value for event in events.Scalars("train/loss")}
    assert shown == pytest.approx(recorded, rel=1e-6)
    wanted = {"train/p_at_1", "train/learning_rate", "train/table_gradient_norm", "train/prompt_norm", "dev/p_at_1"}
    assert wanted <= set(events.Tags()["scalars"])


def test_tensorboard_has_the_configuration_and_sample_predictions(events):
    tags = events.Tags()["tensors"]
    assert "config/text_summary" in tags
    text = events.Tensors("predictions/text_summary")[0].tensor_proto.string_val[0].decode()
    assert "| subject | answer | predicted | rank |" in text


def test_tensorboard_has_hyperparameters(run):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    accumulator = EventAccumulator(str(run / "tb" / "cities" / "ptuning-seed0"))
    accumulator.Reload()
    assert any(tag.startswith("hparam/") for tag in accumulator.Tags()["scalars"])


def test_predictions_hold_every_test_record(run):
    lines = (run / "jobs/cities/ptuning-seed0/predictions.jsonl").read_text().splitlines()
    predictions = [json.loads(line) for line in lines]
    assert len(predictions) == 8
    hits = sum(prediction["rank"] == 1 for prediction in predictions) / 8
    table = json.loads((run / "results.json").read_text())["jobs"]
    (job,) = [job for job in table if job["seed"] == 0]
    assert hits == job["test"]["vocabulary"]["p_at_1"]
    for prediction in predictions:
        assert (prediction["predicted"] == prediction["answer"]) == (prediction["rank"] == 1)


def test_rewind_forgets_what_unfinished_jobs_recorded_too_early_and_a_torn_line(tmp_path):
    file = tmp_path / "metrics.jsonl"
    lines = [("train", job, step) for step in (1, 2, 3) for job in "abc"] + [("test", "a", 3), ("test", "b", 3)]
    record = "".join(json.dumps({"kind": k, "job": j, "step": s}) + "\n" for k, j, s in lines)
    file.write_text(record + '{"kind": "train", "job": "c", "st')
    monitor = Monitor(True, file)
    monitor.rewind({"b": 2, "c": 0})  # a is done
    monitor.record("train", "b", 3, {"loss": 2.0})
    monitor.close()
    found = [json.loads(line) for line in file.read_text().splitlines()]
    expected = [(k, j, s) for k, j, s in lines if j == "a" or (j == "b" and k == "train" and s <= 2)]
    assert [(line["kind"], line["job"], line["step"]) for line in found] == [*expected, ("train", "b", 3)]


def test_ranks_other_than_the_first_are_silent(tmp_path, capsys):
    monitor = Monitor(False, tmp_path / "metrics.jsonl", tmp_path / "tb")
    monitor.say("hello")
    monitor.record("train", "a", 1, {"loss": 1.0})
    monitor.rewind({"a": 0})
    monitor.close()
    assert capsys.readouterr().out == ""
    assert list(tmp_path.iterdir()) == []


def test_the_time_left_leaves_out_the_first_steps(monkeypatch):
    times = iter([0.0, 10.0, 11.0, 12.0])
    monkeypatch.setattr("megaptune.run.monitor.time.monotonic", lambda: next(times))
    pace = Pace(total_steps=10, done=0)
    pace.mark(1, 8, 100)  # warms up: reads no clock
    for step in (2, 3, 4, 5):
        pace.mark(step, 8, 100)
    assert pace.rates() == {"examples_per_s": 2.0, "tokens_per_s": 25.0}
    assert pace.left() == "0:00:20"
