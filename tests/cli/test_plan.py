"""``megaptune plan``, ``--dry-run``, and what a run makes of ``parallel: auto`` and of a layout that cannot fit."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from ranks import RankFailed, run_ranks, train
from runs import losses
from sized import save_sized
from tiny import write_jsonl
from typer.testing import CliRunner

from megaptune.cli import app
from megaptune.planning import layout

ROOT = Path(__file__).resolve().parents[2]
LARGE = ROOT / "configs" / "lama_11b.yaml"
FOUR_NODES = ("--nodes", "4", "--gpus-per-node", "8", "--gpu-memory", "80GiB")
ONE_JOB = ("--set", "jobs.at_once=1")


@pytest.fixture(autouse=True)
def _bare_machine(monkeypatch):
    for name in ("RANK", "WORLD_SIZE", "SLURM_PROCID", "OMPI_COMM_WORLD_RANK", "MEGAPTUNE_DATA", "MEGAPTUNE_BACKBONES"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def lama(tmp_path, monkeypatch):
    """``$MEGAPTUNE_DATA`` with two small relations."""
    root = tmp_path / "data" / "LAMA"
    templates = [{"relation": name, "template": "[X] is in [Y] .", "label": name} for name in ("P17", "P30")]
    write_jsonl(root / "relations.jsonl", templates)
    for name in ("P17", "P30"):
        for split in ("train", "dev", "test"):
            rows = [
                {"sub_label": f"Place {split} {number}" * (1 + number % 3), "obj_label": "Peru"} for number in range(20)
            ]
            write_jsonl(root / "fact-retrieval" / "original" / name / f"{split}.jsonl", rows)
    (root / "29k-vocab.json").write_text(json.dumps({"gpt2": ["Peru", "France"]}), encoding="utf-8")
    monkeypatch.setenv("MEGAPTUNE_DATA", str(tmp_path / "data"))
    return root


def run(*arguments: object, code: int = 0) -> str:
    done = CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert done.exit_code == code, done.output
    assert "Traceback" not in done.output
    return done.output


# -- plan ------------------------------------------------------------------------------------------------------------


def test_11b_is_planned_without_its_weights_its_data_and_deepspeed():
    script = (
        "import sys; from megaptune.cli import app\n"
        f"try: app(['plan', '--config', {str(LARGE)!r}, '--json', *{(*FOUR_NODES, *ONE_JOB)!r}])\n"
        "finally: assert 'deepspeed' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=ROOT, check=False)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["backbone"]["parameters"] == 11_032_240_128
    assert found["recommended"]["layout"]["tensor_parallel"] == 8
    assert found["recommended"]["layout"]["replicas"] == 4
    assert found["recommended"]["device_bytes"]["weights"] == pytest.approx(2 * 11_032_240_128 / 8, rel=0.01)
    assert found["stated"] is None  # the configuration states what is recommended
    assert all(row["fits"] for row in found["layouts"])


def test_the_tables_name_components_traffic_and_reason():
    shown = run("plan", "--config", LARGE, *FOUR_NODES, *ONE_JOB, "--set", "parallel.tensor_parallel=1")
    for part in ("weights", "saved activations", "prompt encoder", "prompt optimizer", "logits", "fixed overhead"):
        assert part in shown
    for part in ("tensor-parallel sums", "gradient of the prompt table", "28 of 32 ranks without a micro-batch"):
        assert part in shown
    assert "stated" in shown  # another layout than the recommended one: side by side
    assert "its weights are not here" in shown


def test_gpt2_xl_has_25_heads_and_is_not_divided_by_eight():
    found = json.loads(run("plan", "--config", LARGE.with_name("lama_gpt2_xl.yaml"), *FOUR_NODES, "--json"))
    assert found["backbone"]["parameters"] == 1_557_611_200
    assert found["recommended"]["layout"]["tensor_parallel"] == 1
    assert any("25 attention heads do not divide" in (row["problem"] or "") for row in found["layouts"])


def test_a_config_json_alone_is_enough(config_file, tmp_path):
    folder = save_sized("gpt2", tmp_path / "bare", weights=False)
    config = config_file("gpt2", backbone={"path": str(folder)})
    shown = run("plan", "--config", config, "--gpu-memory", "8GiB", "--gpus-per-node", "2", "--tokens", "30")
    assert "30 tokens (given)" in shown
    assert "take       TP 1 x DP 2, ZeRO 0" in shown


def test_a_plan_for_this_machine(config_file):
    assert "host memory a rank" in run("plan", "--config", config_file("bert"), "--gpus-per-node", "2")


def test_what_a_plan_cannot_do_without(config_file, tmp_path):
    config = config_file("gpt2", backbone={"path": str(tmp_path / "nowhere")})
    assert "backbone.architecture" in run("plan", "--config", config, "--gpu-memory", "8GiB", code=4)
    given = ("--set", f"backbone.architecture={tmp_path}")
    assert "backbone.architecture:" in run("plan", "--config", config, *given, "--gpu-memory", "8GiB", code=4)
    assert "80GiB" in run("plan", "--config", config_file("gpt2"), "--gpu-memory", "much", code=2)
    refused = run("plan", "--config", LARGE, "--gpu-memory", "4GiB", code=3)
    assert "no layout fits" in refused
    assert "weights" in refused


# -- dry run ---------------------------------------------------------------------------------------------------------


def test_a_dry_run_of_11b_over_32_ranks(lama):
    shown = run("train", "--config", LARGE, "--dry-run", "--world-size", 32, "--ranks-per-node", 8)
    assert "TP 8 x DP 4, ZeRO 0 on 4 x 8 ranks" in shown
    assert "1,380,191,232" in shown  # elements of each rank
    assert "24 to 31" in shown  # the last replica
    assert "estimated: no tokenizer here" in shown
    assert "2 training jobs a method, 6 steps an epoch" in shown  # 20 records in batches of 8, twice


def test_a_dry_run_counts_real_tokens_where_there_is_a_tokenizer(config_file, tiny, tmp_path):
    config = config_file("llama")
    whole = run("train", "--config", config, "--dry-run", "--world-size", "3")
    assert "weights checked by their headers" in whole
    assert "1 more" in whole  # 8 examples are two micro-batches of 4: the third replica has none
    bare = tmp_path / "bare"
    shutil.copytree(tiny("llama"), bare, ignore=shutil.ignore_patterns("*.safetensors"))
    without = run("train", "--config", config, "--set", f"backbone.path={bare}", "--dry-run", "--world-size", "3")
    assert "no weights here" in without
    assert _steps(whole) == _steps(without)
    assert not (tmp_path / "run").exists()


def test_a_dry_run_deals_out_the_steps_of_all_jobs_of_a_bank(config_file):
    config = config_file("llama", run={"seeds": [0, 1, 2]}, train={"micro_batch": 6})
    shown = run("train", "--config", config, "--dry-run", "--world-size", "2")
    assert "first steps of 3 jobs" in shown  # of 8 examples each: four pieces of 6, two for each replica
    assert _column(shown, 3) == ["2"] * 4
    assert _column(shown, 4) == ["12 of 3 jobs"] * 4
    short = run("train", "--config", config, "--dry-run", "--world-size", "2", "--set", "train.micro_tokens=1")
    assert _column(short, 3) == ["12"] * 4  # an example a piece


def _column(shown: str, place: int) -> list[str]:
    """Of the table of steps."""
    rows = [line.strip(" │").split("│") for line in _steps(shown).splitlines() if line.lstrip().startswith("│")]
    return [row[place].strip() for row in rows]


def _steps(shown: str) -> str:
    return shown[shown.index("first steps") :]


def test_a_dry_run_finds_what_a_run_would_find(config_file, lama, monkeypatch):
    config = config_file("llama", parallel={"tensor_parallel": 2})
    assert "do not divide into tensor-parallel groups" in run(
        "train", "-c", config, "--dry-run", "--world-size", 3, code=3
    )
    assert "--ranks-per-node" in run(
        "train", "-c", config, "--dry-run", "--world-size", 4, "--ranks-per-node", 3, code=2
    )
    assert "span nodes" in run("train", "-c", config, "--dry-run", "--world-size", 4, "--ranks-per-node", 1, code=3)
    heads = config_file("llama", parallel={"tensor_parallel": 3})
    assert "do not divide among 3" in run("train", "-c", heads, "--dry-run", "--world-size", 3, code=4)
    tight = ("--gpu-memory", "8GiB", "--set", "parallel.tensor_parallel=1")
    assert "does not fit" in run("train", "-c", LARGE, "--dry-run", "--world-size", 8, *tight, code=3)
    monkeypatch.delenv("MEGAPTUNE_DATA")
    missing = run("train", "-c", LARGE, "--dry-run", "--world-size", 8, code=2)
    assert "MEGAPTUNE_DATA, which is not set" in missing


# -- runs ------------------------------------------------------------------------------------------------------------


def test_a_run_that_cannot_fit_is_refused_before_weights_are_read(config_file, monkeypatch):
    config = config_file("llama")
    monkeypatch.setattr(layout, "_host_bytes", lambda: 2**20)
    monkeypatch.setattr("megaptune.experiment.BackboneHost", lambda *_: pytest.fail("weights were read"))
    with pytest.raises(RankFailed, match=r"SetupError: the layout TP 1 x DP 1, ZeRO 0 does not fit .*fixed overhead"):
        run_ranks(1, train, config)


@pytest.mark.dist
def test_auto_is_the_layout_that_it_chooses(config_file, tmp_path):
    config = config_file("gpt2", train={"epochs": 1})
    # As many examples as ranks, in one piece: a tensor-parallel group of two leaves nobody idle.
    settings = ("train.global_batch=4", "train.micro_batch=4")
    for name, keys in (("auto", ["parallel=auto"]), ("stated", ["parallel.tensor_parallel=2"])):
        run_ranks(2, train, config, f"run.directory={tmp_path / name}", *settings, *keys)
    assert losses(tmp_path / "auto") == losses(tmp_path / "stated")
    plain = tmp_path / "plain"
    run_ranks(1, train, config, f"run.directory={plain}", *settings)
    assert losses(tmp_path / "auto") == pytest.approx(losses(plain), rel=1e-5)
