"""Checks on every rank's host, before anything is read: a run on many hosts fails here or for a better reason.

Each rank collects facts about its host, all ranks gather them, and the same judgement of all facts is made on every
rank, so that all leave alike. The checks are numbered in this order:

1 versions  2 configuration  3 ranks  4 devices  5 backbone  6 data  7 run directory  8 disk space  9 offload folder
"""

import contextlib
import hashlib
import os
import platform
import secrets
import shutil
import socket
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from megaptune import __version__
from megaptune.backbone.embedded import is_embedded
from megaptune.backbone.weight_files import weight_files
from megaptune.config import Config, LamaTask
from megaptune.errors import BackboneError, DataError, MegaptuneError, SetupError
from megaptune.run.files import write_whole
from megaptune.run.topology import Topology, agree, gather
from megaptune.superglue_config import SuperGlueTask

GIB = 2**30
_TOKEN_WAIT_S = 5.0
"""A network file system may show a new file to other hosts a little later."""


@dataclass(frozen=True)
class Facts:
    """What one rank sees. ``backbone`` and ``data`` map names to sizes in bytes; an error stands under its own key."""

    host: str
    local_rank: int
    local_world_size: int
    versions: dict[str, str]
    config: str
    devices: int
    """CUDA devices; 0 means that the rank computes on the CPU."""
    backbone: dict[str, int] = field(default_factory=dict)
    backbone_error: str = ""
    data: dict[str, int | None] = field(default_factory=dict)
    sees_run_directory: bool = True
    run_directory_error: str = ""
    free_bytes: dict[str, int] = field(default_factory=dict)
    """Free space at the folders that the run writes to, by configuration key."""
    offload_error: str = ""


@dataclass(frozen=True)
class Check:
    """One numbered check: what was found, and what to do when it failed."""

    number: int
    name: str
    finding: str
    failed: bool = False
    remedy: str = ""
    error: type[MegaptuneError] = SetupError


def require(config: Config, topology: Topology) -> None:
    """Raise the first failed check's kind of error, naming all that failed, on every rank.

    :raises SetupError: (BackboneError for check 5).
    """
    if not config.launch.preflight:
        return
    failed = [check for check in run_checks(config, topology) if check.failed]
    if failed:
        lines = [f"preflight {check.number}, {check.name}: {check.finding}; {check.remedy}" for check in failed]
        raise failed[0].error("\n".join(lines)).shared()


def run_checks(config: Config, topology: Topology) -> list[Check]:
    """All checks, with the same outcome on every rank."""
    return judge(gather(collect(config, topology)), config)


# -- facts -----------------------------------------------------------------------------------------------------------


def collect(config: Config, topology: Topology) -> Facts:
    """This rank's facts; the ranks look for the same token in the run directory, so all must call this."""
    backbone, backbone_error = _backbone(config)
    sees, run_error = _see_each_other(config.run.directory, topology)
    offload = config.parallel.offload_folder
    wanted = {"run.directory": config.run.directory}
    if offload is not None:
        wanted["parallel.offload_folder"] = offload
    return Facts(
        host=socket.gethostname(),
        local_rank=topology.local_rank,
        local_world_size=topology.local_world_size,
        versions=versions(),
        config=hashlib.sha256(config.model_dump_json().encode()).hexdigest(),
        devices=torch.cuda.device_count() if torch.cuda.is_available() else 0,
        backbone=backbone,
        backbone_error=backbone_error,
        data={str(path): _size(path) for path in _data_files(config)},
        sees_run_directory=sees,
        run_directory_error=run_error,
        free_bytes={key: shutil.disk_usage(_existing(folder)).free for key, folder in wanted.items()},
        offload_error=_cannot_write(offload) if offload is not None else "",
    )


def versions() -> dict[str, str]:
    """The versions that must be equal on all ranks."""
    found = {"megaptune": __version__, "python": platform.python_version()}
    for package in ("torch", "deepspeed", "transformers"):
        with contextlib.suppress(metadata.PackageNotFoundError):
            found[package] = metadata.version(package)
    return found


def _backbone(config: Config) -> tuple[dict[str, int], str]:
    if is_embedded(config.backbone.path):
        return {}, ""  # every host converts its own
    folder = Path(config.backbone.path)
    try:
        weights = weight_files(folder)
        beside = [file for file in sorted(folder.glob("*.json")) if file.is_file()]
        closed = [file.name for file in [*beside, *weights] if not os.access(file, os.R_OK, effective_ids=True)]
        if closed:
            return {}, f"{folder}: this user may not read {', '.join(closed[:4])}"
        return {file.name: file.stat().st_size for file in [*beside, *weights]}, ""
    except BackboneError as error:
        return {}, str(error)
    except OSError as error:
        return {}, f"{folder}: {error.strerror}"


def _data_files(config: Config) -> list[Path]:
    task = config.task
    files = [task.word_list] if task.word_list else []
    if isinstance(task, SuperGlueTask):
        names = [f"{name}/*.jsonl" for name in config.tasks]
        roots = [*task.roots, *(config.pet.roots or [])]
        return [file for root in roots for name in names for file in sorted(root.glob(name))]
    if isinstance(task, LamaTask):
        return [*files, task.root / "relations.jsonl", *sorted(task.root.glob("fact-retrieval/original/*/*.jsonl"))]
    return [*files, *(path for path in (task.train, task.dev, task.test) if path is not None)]


def _size(path: Path) -> int | None:
    with contextlib.suppress(OSError):
        return path.stat().st_size
    return None


def _existing(folder: Path) -> Path:
    """The folder, or its nearest parent that is there: what a folder yet to be made will be made in."""
    folder = folder.absolute()
    return next(place for place in (folder, *folder.parents) if place.is_dir())


def _see_each_other(folder: Path, topology: Topology) -> tuple[bool, str]:
    """Whether this rank finds the token that rank 0 wrote where the run directory is or will be."""
    place, error = Path(), ""
    if topology.is_main:
        place = _existing(folder) / f".megaptune-{secrets.token_hex(8)}"
        try:
            write_whole(place, "rank 0 was here\n")
        except OSError as failure:
            error = f"{place.parent}: {failure.strerror}"
    place, error = agree((place, error))
    if error:
        return False, error
    sees = _wait_for(place.exists, _TOKEN_WAIT_S)
    gather(sees)  # none is still looking when rank 0 removes it
    if topology.is_main:
        place.unlink(missing_ok=True)
    return sees, ""


def _wait_for(done: Callable[[], bool], seconds: float) -> bool:
    deadline = time.monotonic() + seconds
    while not done():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.1)
    return True


def _cannot_write(folder: Path) -> str:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder) as probe:
            probe.write(os.urandom(4096))
            probe.flush()
            os.fsync(probe.fileno())
    except OSError as error:
        return f"{folder}: {error.strerror}"
    return ""


# -- judgement -------------------------------------------------------------------------------------------------------


def judge(facts: list[Facts], config: Config) -> list[Check]:
    """The checks over every rank's facts; nothing here looks at this host."""
    return [
        _versions(facts),
        _configuration(facts),
        _ranks(facts),
        _devices(facts),
        _same_backbone(facts, config),
        _same_data(facts),
        _run_directory(facts, config),
        _disk_space(facts, config),
        _offload(facts, config),
    ]


def _versions(facts: list[Facts]) -> Check:
    odd = [
        f"{_who(rank, facts)} has {name} {here.versions.get(name, 'not installed')}, rank 0 has {wanted}"
        for rank, here in enumerate(facts)
        for name, wanted in facts[0].versions.items()
        if here.versions.get(name) != wanted
    ]
    found = ", ".join(f"{name} {version}" for name, version in facts[0].versions.items())
    return _check(1, "versions", odd, found, "install the same versions on every host (constraints.txt)")


def _configuration(facts: list[Facts]) -> Check:
    odd = [
        f"{_who(rank, facts)} resolved another configuration than rank 0"
        for rank, here in enumerate(facts)
        if here.config != facts[0].config
    ]
    remedy = "give every rank the same file, overrides and environment variables that it names"
    return _check(2, "configuration", odd, f"the same on {_count(facts)}", remedy)


def _ranks(facts: list[Facts]) -> Check:
    hosts: dict[str, list[int]] = {}
    for here in facts:
        hosts.setdefault(here.host, []).append(here.local_rank)
    odd = []
    for rank, here in enumerate(facts):
        on_host = hosts[here.host]
        if sorted(on_host) != list(range(len(on_host))):
            odd.append(
                f"{here.host} has local ranks {', '.join(map(str, sorted(on_host)))}, not 0 to {len(on_host) - 1}"
            )
        elif here.local_world_size != len(on_host):
            odd.append(
                f"{_who(rank, facts)} was told of {here.local_world_size} ranks on its host, and {len(on_host)} are"
            )
    sizes = ", ".join(f"{host} x {len(ranks)}" for host, ranks in list(hosts.items())[:8])
    more = f" and {len(hosts) - 8} more hosts" if len(hosts) > 8 else ""
    remedy = "host names must be unique, and the launcher must number the ranks of each host from 0"
    return _check(3, "ranks", list(dict.fromkeys(odd)), f"{_count(facts)}: {sizes}{more}", remedy)


def _devices(facts: list[Facts]) -> Check:
    if not any(here.devices for here in facts):
        return Check(4, "devices", "CPU on every rank")
    odd = [
        f"{here.host} has {here.devices} CUDA devices for {here.local_world_size} ranks"
        for here in facts
        if here.devices < here.local_world_size
    ]
    least = min(here.devices for here in facts)
    remedy = "start as many ranks per host as it has devices (CUDA_VISIBLE_DEVICES hides some)"
    return _check(4, "devices", list(dict.fromkeys(odd)), f"at least {least} CUDA devices a host", remedy)


def _same_backbone(facts: list[Facts], config: Config) -> Check:
    path = config.backbone.path
    if is_embedded(path):
        return Check(5, "backbone", f"{path}, embedded: every host has its own copy")
    errors = [here.backbone_error for here in facts]
    remedy = "put the same folder at that path on every host, on a shared file system for instance"
    if errors[0] and len(set(errors)) == 1:
        where = "" if len(facts) == 1 else "on every rank: "
        return Check(5, "backbone", where + errors[0], True, "point backbone.path at a complete folder", BackboneError)
    odd = [f"{_who(rank, facts)}: {error}" for rank, error in enumerate(errors) if error]
    whole = next(here.backbone for here in facts if not here.backbone_error)
    for rank, here in enumerate(facts):
        if not here.backbone_error:
            differing = sorted(
                name for name in whole.keys() | here.backbone if whole.get(name) != here.backbone.get(name)
            )
            odd += (
                [f"{_who(rank, facts)}: other files or sizes at {path}: {', '.join(differing[:4])}"]
                if differing
                else []
            )
    found = f"{len(whole)} files, {sum(whole.values()) / GIB:.2f} GiB at {path}"
    return _check(5, "backbone", odd, found, remedy, BackboneError)


def _same_data(facts: list[Facts]) -> Check:
    names = sorted({name for here in facts for name in here.data})
    sizes = {name: next((here.data[name] for here in facts if here.data.get(name) is not None), None) for name in names}
    odd = [
        f"{_who(rank, facts)}: {name} is not there"
        if here.data.get(name) is None
        else f"{_who(rank, facts)}: {name} differs"
        for rank, here in enumerate(facts)
        for name in names
        if sizes[name] is not None and here.data.get(name) != sizes[name]
    ]
    missing = [f"{name} is not there" for name in names if sizes[name] is None]
    if missing and not odd:
        return _check(6, "data", missing, "", "mend the path in the section task", DataError)
    remedy = "put the same files at the same path on every host"
    return _check(6, "data", odd + missing, f"{len(names)} files", remedy)


def _run_directory(facts: list[Facts], config: Config) -> Check:
    folder = config.run.directory
    if facts[0].run_directory_error:
        finding = f"rank 0 cannot write {facts[0].run_directory_error}"
        return Check(7, "run directory", finding, True, "name a run.directory that can be written")
    odd = [
        f"{_who(rank, facts)} does not see what rank 0 writes at {folder}"
        for rank, here in enumerate(facts)
        if not here.sees_run_directory
    ]
    remedy = "every rank reads checkpoints there: name a run.directory on a file system that all hosts share"
    return _check(7, "run directory", odd, f"{folder}, seen by {_count(facts)}", remedy)


def _disk_space(facts: list[Facts], config: Config) -> Check:
    wanted = config.launch.min_free_disk_gib
    odd: list[str] = []
    least: dict[str, int] = {}
    for rank, here in enumerate(facts):
        for key, free in here.free_bytes.items():
            if key == "run.directory" and rank:
                continue  # rank 0 alone writes there
            least[key] = min(free, least.get(key, free))
            if free < wanted * GIB and here.local_rank == 0:
                odd.append(f"{_who(rank, facts)}: {free / GIB:.2f} GiB free at {key}, wanted {wanted:g} GiB")
    found = ", ".join(f"{free / GIB:.1f} GiB free at {key}" for key, free in least.items())
    return _check(8, "disk space", odd, found, "free some, name another folder, or lower launch.min_free_disk_gib")


def _offload(facts: list[Facts], config: Config) -> Check:
    folder = config.parallel.offload_folder
    if folder is None:
        return Check(9, "offload folder", "not used")
    odd = [
        f"{_who(rank, facts)} cannot write {here.offload_error}"
        for rank, here in enumerate(facts)
        if here.offload_error
    ]
    remedy = "point parallel.offload_folder at a local disk that this user can write"
    return _check(9, "offload folder", odd, f"{folder}, written by {_count(facts)}", remedy)


def _check(
    number: int, name: str, odd: list[str], found: str, remedy: str, error: type[MegaptuneError] = SetupError
) -> Check:
    """Passed with what was ``found``, or failed with the ``odd`` ones, a few of them when there are many."""
    more = f"; and {len(odd) - 4} more" if len(odd) > 4 else ""
    return Check(number, name, "; ".join(odd[:4]) + more if odd else found, bool(odd), remedy if odd else "", error)


def _who(rank: int, facts: list[Facts]) -> str:
    return f"rank {rank} ({facts[rank].host})"


def _count(facts: list[Facts]) -> str:
    return f"{len(facts)} rank{'s' if len(facts) > 1 else ''}"


def table(checks: list[Check]) -> Any:
    """The checks for the console."""
    from rich.table import Table

    shown = Table("", "check", "", "found", box=None, pad_edge=False)
    for check in checks:
        found = f"{check.finding}; {check.remedy}" if check.failed else check.finding
        shown.add_row(str(check.number), check.name, "FAILED" if check.failed else "ok", found)
    return shown
