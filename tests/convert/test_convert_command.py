"""``megaptune convert`` as a user meets it: what it says, what it refuses, how much memory it takes."""

import collections
import json
import os
import pickle
import shutil
import subprocess
import sys
from pathlib import Path

import bpe_reference
import pytest
import torch
from fairseq_source import random_state, settings, write
from safetensors import safe_open
from typer.testing import CliRunner

from megaptune.backbone.convert.command import parse_size
from megaptune.backbone.convert.output import OutputTensor, write_weights
from megaptune.cli import app
from megaptune.errors import ConfigError

ROOT = Path(__file__).resolve().parents[2]
CONFIG, DATA, SETUP, BACKBONE = 2, 2, 3, 4  # exit codes, as in megaptune/errors.py


@pytest.fixture(autouse=True)
def _one_rank(monkeypatch):
    """A rank above 0 would wait for rank 0 before it speaks."""
    for name in ("RANK", "SLURM_PROCID", "OMPI_COMM_WORLD_RANK", "PMI_RANK"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def source(tmp_path):
    write(tmp_path / "source", random_state(), parts=2)
    bpe_reference.write_merges(tmp_path / "vocab.bpe")
    return tmp_path / "source"


def run(source: Path, *arguments: str, merges: bool = True):
    options = ["--bpe-merges", str(source.with_name("vocab.bpe"))] if merges else []
    return CliRunner().invoke(app, ["convert", str(source), str(source.with_name("converted")), *options, *arguments])


def refusal(source: Path, code: int, *arguments: str) -> str:
    """The one message; nothing is left beside the source."""
    before = sorted(entry.name for entry in source.parent.iterdir())
    done = run(source, *arguments)
    assert done.exit_code == code, done.output
    assert "Traceback" not in done.output
    assert done.stderr.count("error: ") == 1
    assert sorted(entry.name for entry in source.parent.iterdir()) == before
    return done.stderr


def test_it_says_what_it_found_and_what_it_did(source):
    done = run(source)
    assert done.exit_code == 0, done.output
    assert "fairseq megatron, 2 parts: 3 layers, width 32, FFN 48, 8 heads, 320 rows" in done.stdout
    assert "final norm: none in the files, so none in the model" in done.stdout
    assert "GiB of float32" in done.stdout
    assert "GiB in, " in done.stdout
    assert "peak memory of the process" in done.stdout
    names = {"config.json", "model.safetensors", "SHA256SUMS", "tokenizer.json", "tokenizer_config.json"}
    assert names <= {entry.name for entry in source.with_name("converted").iterdir()}


def test_the_folder_passes_megaptune_check_of_headers(source):
    assert run(source, "--max-shard", "30kB").exit_code == 0
    done = CliRunner().invoke(app, ["checksum", str(source.with_name("converted"))])
    assert done.exit_code == 0, done.output


def test_a_target_that_exists_is_left_alone(source):
    source.with_name("converted").mkdir()
    assert "exists already" in refusal(source, CONFIG)
    assert list(source.with_name("converted").iterdir()) == []


def test_a_source_that_is_not_there(tmp_path):
    bpe_reference.write_merges(tmp_path / "vocab.bpe")
    assert "source: not found" in refusal(tmp_path / "source", BACKBONE)


def test_a_source_of_no_known_kind(tmp_path):
    (tmp_path / "source").mkdir()
    message = refusal(tmp_path / "source", BACKBONE)
    assert "model-model_part-0.pt" in message
    assert "mp_rank_00" in message
    assert ".gguf" in message


@pytest.mark.parametrize("kind", ["fairseq-megatron", "megatron-lm", "gguf"])
def test_a_kind_that_the_source_is_not(tmp_path, kind):
    (tmp_path / "source").mkdir()
    bpe_reference.write_merges(tmp_path / "vocab.bpe")
    done = run(tmp_path / "source", "--format", kind, merges=kind != "gguf")
    assert done.exit_code == BACKBONE, done.output
    assert "Traceback" not in done.output


def test_too_little_room(source, monkeypatch):
    usage = collections.namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(2**30, 2**30, 2**20))
    assert "and its disk has 0.00 GiB free" in refusal(source, SETUP)


def test_merges_of_another_kind(source):
    source.with_name("vocab.bpe").write_text("#version: 0.2\nh e\nthe end\n")
    assert "vocab.bpe:3: expected two symbols of GPT-2's byte-level BPE" in refusal(source, DATA)


def test_a_pickle_that_would_run_something(source):
    made = source.with_name("made")

    class Trap:
        def __reduce__(self):
            return os.mkdir, (str(made),)

    part = source / "model-model_part-1.pt"
    torch.save({"args": settings(2), "model": {}, "extra_state": Trap()}, part)
    message = refusal(source, BACKBONE)
    assert f"{part}: the file asks for posix.mkdir, which is not allowed" in message
    assert not made.exists()
    with part.open("rb"), pytest.raises(pickle.UnpicklingError):
        torch.load(part, weights_only=True)


@pytest.mark.parametrize("text", ["", "0", "two", "2 TB", "-1GiB", "1.5.2G"])
def test_a_shard_size_that_is_none(source, text):
    assert "--max-shard" in refusal(source, CONFIG, f"--max-shard={text}")


def test_sizes():
    sizes = {"2GiB": 2**31, "500MB": 5 * 10**8, "1.5 KiB": 1536, "77": 77, "3G": 3 * 10**9, "8B": 8}
    assert {text: parse_size(text) for text in sizes} == sizes
    with pytest.raises(ConfigError, match=r"expected a size such as 2GiB"):
        parse_size("big")


def test_shards_mix_dtypes_and_keep_to_their_size(tmp_path):
    made = {
        "a": torch.randn(3, 5).half(),
        "b": torch.randn(7),
        "c": torch.randn(100, 4).bfloat16(),
        "d": torch.randn(2).double(),
        "e": torch.zeros(0, 4),
    }
    tensors = [OutputTensor(name, tuple(value.shape), value.dtype, value.clone) for name, value in made.items()]
    write_weights(tmp_path, tensors, 100, lambda line: None)
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(value.nbytes for value in made.values())
    shards = [index["weight_map"][name] for name in made]
    assert shards == [f"model-{number:05d}-of-00003.safetensors" for number in (1, 1, 2, 3, 3)]
    for name, value in made.items():
        with safe_open(tmp_path / index["weight_map"][name], framework="pt") as handle:
            assert torch.equal(handle.get_tensor(name), value)


MEASURE = """
import sys
from pathlib import Path
from megaptune.backbone.convert.command import Options, convert
import torch, transformers, tokenizers

def status(field):
    line = next(line for line in open("/proc/self/status") if line.startswith(field))
    return int(line.split()[1]) * 1024

options = Options(bpe_merges=Path(sys.argv[3]))
convert(Path(sys.argv[1]), Path(sys.argv[2]) / "small", "auto", options, lambda line: None)  # imports what it needs
open("/proc/self/clear_refs", "w").write("5")  # the high-water mark starts again
start = status("VmRSS")
convert(Path(sys.argv[4]), Path(sys.argv[2]) / "large", "auto", options, lambda line: None)
print(status("VmHWM") - start)
"""


@pytest.mark.slow
def test_memory_holds_a_tensor_and_never_the_checkpoint(source, tmp_path):
    """Nothing is mapped, so the growth of the resident set is what the conversion holds."""
    sizes = {"width": 1024, "ffn": 4096, "layers": 8, "rows": 4096}
    state = {key: value.half() for key, value in random_state(**sizes).items()}
    write(
        tmp_path / "large-source", state, decoder_layers=8, decoder_embed_dim=1024, decoder_input_dim=1024,
        decoder_output_dim=1024, decoder_ffn_embed_dim=4096,
    )  # fmt: skip
    size = sum(value.nbytes for value in state.values())
    assert size > 200 * 10**6
    del state
    paths = [source, tmp_path, source.with_name("vocab.bpe"), tmp_path / "large-source"]
    done = subprocess.run(
        [sys.executable, "-c", MEASURE, *map(str, paths)], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    grown = int(done.stdout.split()[-1])
    assert grown < 0.4 * size, f"{grown / 1e6:.0f} MB of {size / 1e6:.0f} MB"
