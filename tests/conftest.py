"""Fixtures for every test: one thread, no network, and tiny backbones that are saved once per session."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

# As a run sets it for itself (run/topology.py); here torch computes before a run begins.
os.environ.setdefault("MKL_CBWR", "AUTO,STRICT")

import interpreted_kernels  # noqa: F401  before anything imports Triton
import torch
from tiny import save_tiny, write_config, write_facts

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
torch.set_num_threads(1)


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """``tiny("llama")``: the folder of a tiny backbone, saved when first asked for. Read it, never change it."""
    root = tmp_path_factory.mktemp("backbones")

    def folder(kind: str) -> Path:
        place = root / kind
        return place if place.is_dir() else save_tiny(kind, place)

    return folder


@pytest.fixture(scope="session")
def facts(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The files of a custom task, 24 + 8 + 8 records. Read them, never change them."""
    return write_facts(tmp_path_factory.mktemp("facts"))


@pytest.fixture
def config_file(tmp_path: Path, tiny: Callable[[str], Path], facts: dict[str, Path]) -> Callable[..., Path]:
    """``config_file("gpt2", train={"epochs": 3})``: a configuration on the session's backbone and facts."""

    def write(kind: str = "llama", **sections: Any) -> Path:
        files = {split: str(path) for split, path in facts.items()}
        sections["backbone"] = {"path": str(tiny(kind)), **sections.get("backbone", {})}
        sections["task"] = {**files, **sections.get("task", {})}
        return write_config(tmp_path, kind, **sections)

    return write


@pytest.fixture(scope="session")
def tokenizers(tiny: Callable[[str], Path]) -> Callable[[str], Any]:
    """``tokenizers("bert")``: the tokenizer of a tiny backbone, as transformers loads it."""
    from transformers import AutoTokenizer

    loaded: dict[str, Any] = {}

    def load(kind: str) -> Any:
        if kind not in loaded:
            loaded[kind] = AutoTokenizer.from_pretrained(tiny(kind), local_files_only=True)
        return loaded[kind]

    return load
