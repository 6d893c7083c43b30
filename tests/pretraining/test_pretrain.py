"""``megaptune pretrain``: a corpus becomes a backbone, the same one every time, interrupted or not."""

import gzip
import itertools
import json
import os
import random
import signal
import string
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from ranks import run_ranks, train
from runs import metrics
from tiny import CAPITALS, CITIES, FILLERS, WORDS, write_config
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import AlbertConfig, AlbertForMaskedLM, PreTrainedTokenizerFast
from typer.testing import CliRunner

from megaptune.backbone.embedded import is_embedded
from megaptune.cli import app
from megaptune.config import load_config
from megaptune.pretraining.config import load_pretrain_config
from megaptune.pretraining.corpus import batches
from megaptune.run.monitor import Monitor

ROOT = Path(__file__).resolve().parents[2]
DATA, STOPPED = 2, 75  # exit codes, as in megaptune/errors.py
BERT, GPT2 = "bert", "gpt2"


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """300 sentences about cities and their countries, gzipped."""
    rng = random.Random(0)
    lines = []
    for _ in range(300):
        city = rng.choice(CITIES)
        lines.append(f"{city} {rng.choice(FILLERS)} is a {rng.choice(FILLERS)} in {CAPITALS[city]} .")
    path = tmp_path_factory.mktemp("corpus") / "sentences.txt.gz"
    path.write_bytes(gzip.compress("\n".join([*lines, "", "too long " * 20]).encode()))
    return path


def recipe(folder: Path, text: Path, kind: str, **sections: Any) -> Path:
    settings = {
        "run": {"directory": str(folder / kind), "log_every": 5},
        "corpus": {"path": str(text), "max_words": 20, "held_out_lines": 30},
        "tokenizer": {"vocab_size": 400},
        "model": {"kind": kind, "layers": 1, "width": 32, "heads": 2, "max_tokens": 32, "dropout": 0.1},
        "train": {"epochs": 3, "batch_tokens": 256, "learning_rate": 1e-2},
    }
    for name, section in sections.items():
        settings[name] = {**settings[name], **section}
    path = folder / f"{kind}.yaml"
    path.write_text(yaml.safe_dump(settings), encoding="utf-8")
    return path


def pretrain(config: Path, *arguments: str) -> Any:
    return CliRunner().invoke(app, ["pretrain", "--config", str(config), *arguments])


def weights_and_tokenizer(folder: Path) -> tuple[bytes, bytes]:
    return (folder / "model.safetensors").read_bytes(), (folder / "tokenizer.json").read_bytes()


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, corpus: Path) -> dict[str, Path]:
    """Both kinds, trained without interruption."""
    folder = tmp_path_factory.mktemp("trained")
    for kind in (GPT2, BERT):
        done = pretrain(recipe(folder, corpus, kind))
        assert done.exit_code == 0, done.output
    return {kind: folder / kind for kind in (GPT2, BERT)}


@pytest.mark.parametrize("kind", [GPT2, BERT])
def test_a_folder_that_transformers_loads_and_that_has_learnt(kind: str, trained: dict[str, Path]):
    from transformers import AutoModelForCausalLM, AutoModelForMaskedLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(trained[kind])
    auto = AutoModelForCausalLM if kind == GPT2 else AutoModelForMaskedLM
    model = auto.from_pretrained(trained[kind]).eval()
    asked = "Paris market is a city in" + (" [MASK] ." if kind == BERT else "")
    inputs = tokenizer(asked, return_tensors="pt")
    place = inputs["input_ids"][0].tolist().index(tokenizer.mask_token_id) if kind == BERT else -1
    best = model(**inputs).logits[0, place].argmax()
    assert tokenizer.decode([best]).strip() in set(CAPITALS.values())

    summary = json.loads((trained[kind] / "pretraining.json").read_text(encoding="utf-8"))
    losses = [epoch["loss"] for epoch in summary["held_out"]]
    assert len(losses) == 3
    assert losses[-1] < losses[0] < np.log(400)
    assert (summary["train_lines"], summary["held_out_lines"], summary["vocabulary"]) == (270, 30, len(tokenizer))
    assert not list(trained[kind].parent.glob(".*.part"))


@pytest.mark.parametrize("kind", [GPT2, BERT])
def test_the_same_seed_gives_the_same_bytes_and_another_does_not(
    kind: str, trained: dict[str, Path], corpus: Path, tmp_path: Path
):
    config = recipe(tmp_path, corpus, kind)
    assert pretrain(config).exit_code == 0
    assert weights_and_tokenizer(tmp_path / kind) == weights_and_tokenizer(trained[kind])
    other = pretrain(config, "--set", "run.seed=1", "--set", f"run.directory={tmp_path / 'other'}")
    assert other.exit_code == 0, other.output
    assert weights_and_tokenizer(tmp_path / "other")[0] != weights_and_tokenizer(trained[kind])[0]


def test_a_killed_run_leaves_nothing_that_looks_finished_and_continues(
    trained: dict[str, Path], corpus: Path, tmp_path: Path
):
    config = recipe(tmp_path, corpus, BERT, run={"directory": str(tmp_path / BERT), "checkpoint_every_steps": 1})
    checkpoint = tmp_path / ".bert.part" / "checkpoint.pt"
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "megaptune", "pretrain", "--config", str(config)]
    with subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL) as run:
        until = time.monotonic() + 120
        while not checkpoint.is_file() and run.poll() is None and time.monotonic() < until:
            time.sleep(0.005)
        run.kill()
    assert run.returncode == -signal.SIGKILL
    assert checkpoint.is_file()
    assert not (tmp_path / BERT).exists()
    changed = pretrain(config, "--set", "train.epochs=4")
    assert changed.exit_code == DATA
    assert "train.epochs: 3 there, 4 now" in changed.stderr
    done = pretrain(config)
    assert done.exit_code == 0, done.output
    assert "continuing after step" in done.stdout
    assert weights_and_tokenizer(tmp_path / BERT) == weights_and_tokenizer(trained[BERT])
    again = pretrain(config)
    assert again.exit_code == 0
    assert "is finished" in again.stdout
    another = pretrain(config, "--set", "model.layers=2")
    assert another.exit_code == DATA
    assert "model.layers: 1 there, 2 now" in another.stderr


def test_a_signal_saves_and_the_same_command_continues(
    trained: dict[str, Path], corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    config = recipe(tmp_path, corpus, GPT2)

    def say(self: Monitor, message: str) -> None:
        if message.startswith("step 5/"):
            signal.raise_signal(signal.SIGTERM)

    with monkeypatch.context() as patched:
        patched.setattr(Monitor, "say", say)
        stopped = pretrain(config)
    assert stopped.exit_code == STOPPED
    assert "the same command continues" in stopped.stderr
    assert not (tmp_path / GPT2).exists()
    done = pretrain(config)
    assert done.exit_code == 0, done.output
    assert "continuing after step 5 of" in done.stdout
    assert weights_and_tokenizer(tmp_path / GPT2) == weights_and_tokenizer(trained[GPT2])


def test_a_damaged_checkpoint_is_named(corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    config = recipe(tmp_path, corpus, GPT2)
    with monkeypatch.context() as patched:
        patched.setattr(Monitor, "say", lambda self, message: signal.raise_signal(signal.SIGTERM))
        pretrain(config)
    checkpoint = tmp_path / ".gpt2.part" / "checkpoint.pt"
    checkpoint.write_bytes(checkpoint.read_bytes()[:1000])
    done = pretrain(config)
    assert done.exit_code == 4, done.output
    assert f"{checkpoint} is damaged" in done.stderr


def albert(folder: Path) -> Path:
    """A random ALBERT with a SentencePiece kind of tokenizer, as albert-* folders have."""
    pieces = [*("<pad>", "<unk>", "[CLS]", "[SEP]", "[MASK]"), *(f"\u2581{word}" for word in WORDS), *string.printable]
    learnt = Tokenizer(models.Unigram([(piece, -1.0) for piece in dict.fromkeys(pieces)], unk_id=1))
    learnt.pre_tokenizer = pre_tokenizers.Metaspace()
    learnt.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    names = {"pad": "<pad>", "unk": "<unk>", "cls": "[CLS]", "sep": "[SEP]", "mask": "[MASK]"}
    specials = {f"{role}_token": token for role, token in names.items()}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=learnt, **specials)
    tokenizer.save_pretrained(folder)
    shape = {"hidden_size": 32, "num_attention_heads": 4, "intermediate_size": 64, "embedding_size": 16}
    AlbertForMaskedLM(AlbertConfig(vocab_size=len(tokenizer), max_position_embeddings=64, **shape)).save_pretrained(
        folder
    )
    return folder


@pytest.mark.parametrize("kind", [GPT2, BERT, "albert"])
def test_a_prompt_is_tuned_on_the_folder(kind: str, trained: dict[str, Path], tmp_path: Path):
    """The run ends well and its prompt reaches the answers. The parity tests have random GPT-2, BERT and RoBERTa."""
    place = trained[kind] if kind in trained else albert(tmp_path / "albert")
    config = write_config(tmp_path, kind, backbone={"path": str(place)}, train={"epochs": 4, "learning_rate": 3e-3})
    run_ranks(1, train, config)
    dev = [line["loss"] for line in metrics(tmp_path / "run") if line["kind"] == "dev"]
    assert dev[-1] < dev[0]
    assert json.loads((tmp_path / "run" / "state.json").read_text(encoding="utf-8"))["status"] == "finished"


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({"corpus": {"path": "/nowhere/text.gz"}}, "corpus.path: file not found: /nowhere/text.gz"),
        ({"train": {"epoch": 1}}, "unknown key `train.epoch`, did you mean `train.epochs`?"),
        ({"model": {"heads": 3}}, "`model`: width 32 is not a multiple of heads 3"),
        ({"corpus": {"held_out_lines": 300}}, "300 usable lines of 301; corpus.held_out_lines takes 300"),
    ],
)
def test_bad_input(sections: dict[str, Any], message: str, corpus: Path, tmp_path: Path):
    done = pretrain(recipe(tmp_path, corpus, GPT2, **sections))
    assert done.exit_code == DATA, done.output
    assert message in done.stderr
    assert [entry.name for entry in tmp_path.iterdir()] == ["gpt2.yaml"]


def test_a_damaged_corpus_is_named(corpus: Path, tmp_path: Path):
    cut = tmp_path / "cut.txt.gz"
    cut.write_bytes(corpus.read_bytes()[:-200])
    done = pretrain(recipe(tmp_path, cut, GPT2))
    assert done.exit_code == DATA, done.output
    assert f"{cut}: cannot be read" in done.stderr


def test_batches_hold_every_row_once_within_the_limit():
    rows = [np.zeros(length, dtype=np.int32) for length in np.random.default_rng(0).integers(3, 40, 500)]
    for generator in (None, np.random.default_rng(1)):
        plan = batches(rows, 128, generator)
        assert sorted(np.concatenate(plan)) == list(range(500))
        assert all(len(batch) * max(len(rows[index]) for index in batch) <= 128 for batch in plan)


def test_the_commands_of_the_page_read_their_files(monkeypatch: pytest.MonkeyPatch):
    """docs/pretraining.md: files, keys and values are there, and what pretrain writes is what the runs read."""
    monkeypatch.setenv("MEGAPTUNE_DATA", "/somewhere")
    monkeypatch.chdir(ROOT)
    page = (ROOT / "docs" / "pretraining.md").read_text(encoding="utf-8")
    commands = [line.split() for line in page.splitlines() if line.startswith(("megaptune ", "deepspeed "))]
    written, read = set(), set()
    for words in commands:
        file = Path(words[words.index("--config") + 1])
        overrides = [value for flag, value in itertools.pairwise(words) if flag == "--set"]
        if words[1] == "pretrain":
            written.add(load_pretrain_config(file, overrides).run.directory.resolve())
        else:
            read.add(Path(load_config(file, overrides, is_embedded).backbone.path))
    assert {ROOT / "runs/pretrain/gpt2_small", ROOT / "runs/pretrain/bert_small"} <= written & read


def test_the_pages_table_of_keys_is_what_the_program_prints():
    printed = CliRunner().invoke(app, ["options", "--of", "pretrain"]).output
    assert printed in (ROOT / "docs" / "pretraining.md").read_text(encoding="utf-8")
