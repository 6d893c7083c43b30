"""The speed benchmark on a tiny backbone: all ways run, those of the same mathematics agree, and counts are right."""

import csv
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
from ranks import run_ranks

sys.path.append(str(Path(__file__).resolve().parents[2] / "benchmarks"))

BATCH, ROUNDS = 8, 8


def _all_scenarios(backbone: Path, facts: Path, out: Path) -> list[dict[str, Any]]:
    import speed

    words = ["--quick", "--threads", "1", "--rounds", str(ROUNDS), "--save", str(out)]
    return [asdict(row) for row in speed.main([*words, "--backbone", str(backbone), "--facts", str(facts)])]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("speed")


@pytest.fixture(scope="module")
def rows(tiny, facts, folder) -> list[dict[str, Any]]:
    return run_ranks(1, _all_scenarios, tiny("llama"), facts["train"], folder)[0]


def _steps(rows: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    return {row["way"]: row for row in rows if row["scenario"] == "short"}


def test_every_way_of_this_project_agrees_with_the_plain_statement(rows):
    ours = [row for row in rows if row["way"] not in ("peft", "released") and "bank" not in row["scenario"]]
    assert len(ours) > 10
    assert max(row["loss_error"] for row in ours) < 1e-5
    trained = [row for row in ours if not row["scenario"].startswith("evaluation")]
    assert max(row["gradient_error"] for row in trained) < 1e-5


def test_a_bank_computes_what_its_relations_do_one_by_one(rows):
    alone, together = [row for row in rows if "bank" in row["scenario"]]
    assert (alone["way"], together["way"]) == ("one by one", "together")
    assert together["gradient_error"] < 1e-5
    assert together["examples"] == 3 * 2


def test_every_way_learns(rows):
    for row in _steps(rows).values():
        assert row["loss_after"] < row["loss_before"], row["way"]


def test_arithmetic_is_that_of_the_tokens_that_are_computed(rows, tiny, facts):
    """A padded batch of B x T tokens: 2 operations a weight and token, forward and for the gradient of the input."""
    from side_by_side.workloads import Data
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(tiny("llama"))
    weights = sum(tensor.numel() for tensor in model.model.layers.parameters() if tensor.dim() == 2)
    (batch,) = Data(None, facts["train"], AutoTokenizer.from_pretrained(tiny("llama"))).short(BATCH, 1).batches
    longest, total = max(len(example.slots) for example in batch), sum(len(example.slots) for example in batch)
    steps = _steps(rows)
    for name in ("released", "plain", "+ answers_only"):
        assert steps[name]["blocks_gflop"] == pytest.approx(4e-9 * weights * BATCH * longest, rel=1e-9)
    assert steps["peft"]["blocks_gflop"] == pytest.approx(4e-9 * weights * BATCH * (longest + 1), rel=1e-9)
    assert steps["+ packing"]["blocks_gflop"] == pytest.approx(4e-9 * weights * total, rel=1e-9)
    assert steps["+ answers_only"]["head_gflop"] < steps["plain"]["head_gflop"] / longest * 1.01


def test_files_hold_every_way_and_every_turn(rows, folder):
    with (folder / "speed.csv").open() as file:
        saved = list(csv.DictReader(file))
    assert [(line["scenario"], line["way"]) for line in saved] == [(row["scenario"], row["way"]) for row in rows]
    assert all(
        float(line["over_peft"] or line["over_one_by_one"]) > 0 and line["machine"] and line["torch"] for line in saved
    )
    with (folder / "speed_rounds.csv").open() as file:
        assert sum(1 for _ in csv.DictReader(file)) == ROUNDS * len(rows)
    assert "<svg" in (folder / "speed.svg").read_text(encoding="utf-8")


def _a_wrong_way(backbone: Path, facts: Path) -> str:
    from side_by_side.comparison import check_parity
    from side_by_side.ways import Hosts, Megaptune, Released
    from side_by_side.workloads import ROWS, Data

    from megaptune.backbone.description import load_tokenizer
    from megaptune.run.topology import connect, disconnect

    class Wrong(Megaptune):
        def gradient(self, members, table):
            loss, gradient = super().gradient(members, table)
            return loss, gradient * 1.001

    connect()
    (batch,) = Data(None, facts, load_tokenizer(backbone)).short(BATCH, 1).batches
    ways = [Released(backbone, ROWS, 0), Wrong("wrong", Hosts(backbone).get(()), ROWS, 0, BATCH, None)]
    try:
        check_parity(ways, batch)
    except SystemExit as refusal:
        return str(refusal)
    finally:
        disconnect()
    return ""


def test_a_way_with_another_gradient_is_refused(tiny, facts):
    assert "wrong differs from the plain statement" in run_ranks(1, _a_wrong_way, tiny("llama"), facts["train"])[0]
