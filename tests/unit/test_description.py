"""What is known of a backbone before its weights are read."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tiny import KINDS, MAX_TOKENS

from megaptune.backbone.description import describe_backbone, load_tokenizer
from megaptune.errors import BackboneError


@pytest.fixture
def folder(tmp_path: Path, tiny: Callable[[str], Path]) -> Path:
    """A backbone to damage."""
    return Path(shutil.copytree(tiny("bert"), tmp_path / "backbone"))


def edit_config(folder: Path, **changes: Any) -> None:
    file = folder / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


@pytest.mark.parametrize("kind", KINDS)
def test_kind_and_context_length_come_from_the_folder(tiny: Callable[[str], Path], kind: str):
    found = describe_backbone(tiny(kind), "auto")
    assert found.family == kind
    assert found.kind == ("causal" if kind in ("llama", "gpt2") else "masked")
    assert found.max_tokens == MAX_TOKENS
    assert found.num_bytes == (tiny(kind) / "model.safetensors").stat().st_size


def test_kind_asked_for_wins_over_the_folders(folder: Path):
    assert describe_backbone(folder, "causal").kind == "causal"


def test_kind_that_the_family_has_not_is_refused(tiny: Callable[[str], Path]):
    with pytest.raises(BackboneError, match="'gpt2' has no masked language model in transformers"):
        describe_backbone(tiny("gpt2"), "masked")


def test_family_of_both_kinds_without_architectures_must_be_told(folder: Path):
    edit_config(folder, architectures=None)
    with pytest.raises(BackboneError, match=r"either kind of language model; set backbone\.kind"):
        describe_backbone(folder, "auto")


@pytest.mark.parametrize(
    ("family", "architecture"), [("t5", "T5ForConditionalGeneration"), ("vit", "ViTForImageClassification")]
)
def test_family_without_a_language_model_of_either_kind_is_refused(folder: Path, family: str, architecture: str):
    (folder / "config.json").write_text(json.dumps({"model_type": family, "architectures": [architecture]}))
    with pytest.raises(BackboneError) as caught:
        describe_backbone(folder, "auto")
    assert f"unsupported architecture: '{family}' ({architecture})" in str(caught.value)


def test_family_that_transformers_does_not_know_is_refused(folder: Path):
    edit_config(folder, model_type="no-such-family")
    with pytest.raises(BackboneError, match=r"config\.json: unsupported architecture or damaged file"):
        describe_backbone(folder, "auto")


@pytest.mark.parametrize("text", ["{", "", "[]", '"bert"'])
def test_damaged_config_is_named(folder: Path, text: str):
    (folder / "config.json").write_text(text)
    with pytest.raises(BackboneError, match=r"config\.json: unsupported architecture or damaged file"):
        describe_backbone(folder, "auto")


@pytest.mark.parametrize("kind", ["llama", "gpt2", "bert", "roberta"])
def test_folder_without_a_tokenizer_is_named(tmp_path: Path, tiny: Callable[[str], Path], kind: str):
    folder = Path(shutil.copytree(tiny(kind), tmp_path / kind))
    for file in folder.glob("tokenizer*"):
        file.unlink()
    with pytest.raises(BackboneError) as caught:
        load_tokenizer(folder)
    assert str(caught.value).startswith(f"{folder}: no tokenizer")
    assert "\n" not in str(caught.value)


def test_damaged_tokenizer_is_named(folder: Path):
    (folder / "tokenizer.json").write_text("{")
    with pytest.raises(BackboneError, match="no tokenizer"):
        load_tokenizer(folder)
