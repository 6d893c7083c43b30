"""The run directory: what a run writes where, and the claim that ties it to one configuration.

config.yaml        the resolved configuration; loads as it is
command.txt        how the run was started, a line per start
environment.json   versions and machine
state.json         running | finished | stopped | failed, with exit code and reason: judge a run by this
backbone.json      what identifies the frozen model
metrics.jsonl      one line per step and evaluation; TensorBoard (tb/) shows the same figures
results.json|.md   the table
checkpoints/       of the prompts that train together, until they have their results
contexts/          keys and values that a resumed run need not compute again; gone when training ends
jobs/TASK/METHOD/  result.json, predictions.jsonl, prompt/ (the trained prompt); checkpoints/ while a LM is tuned
models/TASK/MODEL/ scores.jsonl of models that only label for others (PET); checkpoints/ while they are tuned
submission/METHOD/ predictions of SuperGLUE's unlabelled test files, where they are asked for
"""

import datetime
import os
import platform
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

import yaml

from megaptune import __version__
from megaptune.backbone.fingerprint import Fingerprint
from megaptune.config import Config, validate
from megaptune.errors import BackboneError, ConfigError, SetupError
from megaptune.run.files import read_json, write_json, write_whole


class RunDirectory:
    def __init__(self, path: Path) -> None:
        self.path = path
        self.config_file = path / "config.yaml"
        self.stop_file = path / "stop"
        self.metrics_file = path / "metrics.jsonl"

    def job(self, task: str, method: str, seed: int | None = None, suffix: str = "") -> Path:
        """Where one job of the run keeps its files; ``suffix`` says where it stands in a sweep."""
        folder = self.path / "jobs" / task / (method + ("" if seed is None else f"-seed{seed}") + suffix)
        folder.mkdir(parents=True, exist_ok=True)
        return folder

    def model(self, task: str, name: str) -> Path:
        """Where a model keeps its files that is no job of its own, but a stage of one."""
        folder = self.path / "models" / task / name
        folder.mkdir(parents=True, exist_ok=True)
        return folder

    def claim(self, config: Config) -> bool:
        """Create the directory, or check that it belongs to this configuration; whether it was there before.

        :raises ConfigError: it belongs to another configuration, or holds something else.
        """
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            known = self.config_file.is_file() and (self.path / "command.txt").is_file()
            if known and self._has_progress():
                self._compare(config)
            elif not known and any(not entry.name.startswith(".") for entry in self.path.iterdir()):
                raise ConfigError(f"run.directory {self.path} holds other files and no run; name a new directory")
            settings = config.model_dump(mode="json", exclude_none=True)
            write_whole(self.config_file, yaml.safe_dump(settings, sort_keys=False, allow_unicode=True))
            with (self.path / "command.txt").open("a", encoding="utf-8") as handle:
                handle.write(f"{_now()} {' '.join(sys.argv)}\n")
            write_json(self.path / "environment.json", environment())
        except OSError as error:
            raise SetupError(f"run.directory {self.path} cannot be written: {error.strerror}") from None
        return known

    def _has_progress(self) -> bool:
        return any(any(self.path.glob(kept)) for kept in ("jobs/*/*/*", "models/*/*/*", "checkpoints/*"))

    def _compare(self, config: Config) -> None:
        try:
            stored = validate(yaml.safe_load(self.config_file.read_text(encoding="utf-8")), str(self.config_file))
        except yaml.YAMLError:
            raise ConfigError(f"{self.config_file} is damaged; name a new run.directory") from None
        before, now = _flat(stored.identity()), _flat(config.identity())
        changed = [key for key in sorted(before.keys() | now.keys()) if before.get(key) != now.get(key)]
        if changed:
            lines = [f"  - {key}: {before.get(key)!r} there, {now.get(key)!r} now" for key in changed]
            raise ConfigError(
                f"run.directory {self.path} belongs to a different configuration:\n" + "\n".join(lines) + "\n"
                "name another run.directory, or remove that one to start over"
            )

    def check_backbone(self, rows_sha256: str) -> None:
        """:raises BackboneError: when the run was started on other weight files."""
        before = self._known_backbone()
        if before is not None and before["rows_sha256"] != rows_sha256:
            raise BackboneError(
                f"run.directory {self.path} was started on another backbone (rows' SHA-256 "
                f"{before['rows_sha256'][:12]}..., now {rows_sha256[:12]}...); point backbone.path at that one, or "
                "name another run.directory"
            )

    def remember_backbone(self, fingerprint: Fingerprint, family: str) -> None:
        """:raises BackboneError: when the run was started on another backbone, or this one scores otherwise now."""
        before = self._known_backbone()
        if before is None:
            write_json(self.path / "backbone.json", {**fingerprint.as_dict(), "family": family})
        else:
            fingerprint.require(before, f"run.directory {self.path}")

    def _known_backbone(self) -> dict[str, Any] | None:
        file = self.path / "backbone.json"
        if not file.is_file():
            return None
        try:
            known = read_json(file)
            return {key: known[key] for key in ("rows_sha256", "probe", "dtype")}
        except (ValueError, KeyError, TypeError):
            raise SetupError(f"{file} is damaged; name a new run.directory") from None

    def set_state(self, status: str, exit_code: int | None = None, reason: str = "") -> None:
        hints = {"stopped": "run the same command again to continue", "failed": "mend the cause, then run it again"}
        state = {
            "status": status,
            "exit_code": exit_code,
            "reason": reason,
            "next": hints.get(status, ""),
            "time": _now(),
        }
        write_json(self.path / "state.json", state)


def environment() -> dict[str, Any]:
    """Versions and machine, for a bug report."""
    packages = ("torch", "deepspeed", "transformers", "tokenizers", "safetensors", "triton", "numpy", "pydantic")
    versions = {}
    for package in packages:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            versions[package] = "not installed"
    return {
        "megaptune": __version__,
        "python": platform.python_version(),
        **versions,
        "system": platform.platform(),
        "cores": len(os.sched_getaffinity(0)),
    }


def _now() -> str:
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")


def _flat(value: Any, prefix: str = "") -> dict[str, Any]:
    if not isinstance(value, dict):
        return {prefix: value}
    flat = {}
    for key, inner in value.items():
        flat.update(_flat(inner, f"{prefix}.{key}" if prefix else str(key)))
    return flat
