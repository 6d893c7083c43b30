"""Ranks that are missing, late, or on a host that does not fit: named, and every rank leaves with the exit code.

Each rank is a fork of this process that runs the command line to its exit, as under a launcher that kills nobody.
"""

import json
import multiprocessing
import os
import socket
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from megaptune import cli, trainer
from megaptune.backbone import host
from megaptune.run import preflight, roll_call

pytestmark = [pytest.mark.dist]

HERE = socket.gethostname()
ASLEEP_S = 600
"""Far beyond any timeout here: a rank that sleeps so long leaves only because the roll call ends it."""


@dataclass(frozen=True)
class Left:
    """How a rank left."""

    code: int
    said: str


@pytest.fixture
def start(
    config_file: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[..., dict[int, Left]]:
    """``start(2, [0])``: rank 0 of 2 runs ``megaptune train`` with the overrides; how the started ranks left."""
    import deepspeed  # noqa: F401  paid once, before the forks
    import transformers  # noqa: F401

    config = config_file()
    monkeypatch.setattr(cli, "_OWN_ERROR_S", 1.0)
    monkeypatch.setattr(cli, "_SHARED_ERROR_S", 1.0)

    def run(
        world: int, ranks: list[int], *overrides: str, of_rank_1: str = "", port: int | None = None
    ) -> dict[int, Left]:
        place = port or _free_port()
        processes = {}
        for rank in ranks:
            own = [of_rank_1] if of_rank_1 and rank == 1 else []
            arguments = [part for override in (*overrides, *own) for part in ("--set", override)]
            command = ["train", "--config", str(config), *arguments]
            target = (rank, world, place, command, tmp_path / f"rank{rank}.log")
            processes[rank] = multiprocessing.get_context("fork").Process(target=_rank, args=target)
            processes[rank].start()
        try:
            deadline = time.monotonic() + 90
            for rank, process in processes.items():
                process.join(max(0.0, deadline - time.monotonic()))
                said = tmp_path / f"rank{rank}.log"
                assert process.exitcode is not None, f"rank {rank} did not leave: {said.read_text(encoding='utf-8')}"
        finally:
            for process in processes.values():
                if process.is_alive():
                    process.kill()
                process.join()
        return {
            rank: Left(process.exitcode, (tmp_path / f"rank{rank}.log").read_text(encoding="utf-8"))
            for rank, process in processes.items()
        }

    return run


def _rank(rank: int, world: int, port: int, command: list[str], log: Path) -> None:
    names = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world, "LOCAL_WORLD_SIZE": world, "MASTER_PORT": port}
    os.environ.update({name: str(value) for name, value in names.items()}, MASTER_ADDR="127.0.0.1")
    torch.set_num_threads(1)
    code = 1
    with log.open("w", encoding="utf-8", buffering=1) as output:
        sys.stdout = sys.stderr = output
        try:
            cli.app(command)
        except SystemExit as leaving:
            code = int(leaving.code or 0)
        finally:
            output.flush()
            os._exit(code)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def on_rank_1(monkeypatch: pytest.MonkeyPatch, owner: object, name: str, instead: Callable[..., object]) -> None:
    """Rank 1 calls ``instead`` where the others call ``owner.name``."""
    plain = getattr(owner, name)

    def choose(*arguments: object, **named: object) -> object:
        return (instead if os.environ.get("RANK") == "1" else plain)(*arguments, **named)

    monkeypatch.setattr(owner, name, choose)


def sleep_long(*arguments: object, **named: object) -> None:
    time.sleep(ASLEEP_S)


# -- missing ---------------------------------------------------------------------------------------------------------


def test_a_missing_rank_is_named_and_those_that_came_leave(start, tmp_path):
    left = start(3, [0, 2], "launch.join_timeout_s=4")
    assert [rank.code for rank in left.values()] == [3, 3]
    told = f"error: 1 of 3 ranks did not join: rank 1; there are {HERE} with ranks 0, 2 (launch.join_timeout_s is 4)"
    assert left[0].said.count(told) == 1
    assert "error: " not in left[2].said  # rank 0 tells
    assert not (tmp_path / "run").exists()


def test_without_rank_0_the_others_say_where_they_looked(start):
    port = _free_port()
    left = start(2, [1], "launch.join_timeout_s=2", port=port)
    assert left[1].code == 3
    told = f"rank 1 on {HERE} found nobody at MASTER_ADDR:MASTER_PORT 127.0.0.1:{port} within 2 s: is rank 0 running"
    assert told in left[1].said


def test_a_port_that_another_program_holds_is_named(start):
    """The other ranks cannot tell what answers there; they leave in the time for joining."""
    with socket.socket() as holder:
        holder.bind(("", 0))
        holder.listen()
        port = holder.getsockname()[1]
        left = start(2, [0, 1], "launch.join_timeout_s=3", port=port)
    assert [rank.code for rank in left.values()] == [3, 3]
    assert f"port {port} cannot be used on rank 0's host {HERE}: Address already in use, held by" in left[0].said
    assert f"what listens at MASTER_ADDR:MASTER_PORT 127.0.0.1:{port} is not rank 0 of this run" in left[1].said


# -- late ------------------------------------------------------------------------------------------------------------


def test_a_rank_that_is_late_at_the_first_step_is_named(start, tmp_path, monkeypatch):
    on_rank_1(monkeypatch, trainer, "micro_batches", sleep_long)
    left = start(2, [0, 1], "launch.first_step_timeout_s=3")
    assert [rank.code for rank in left.values()] == [3, 3]
    told = f"the other ranks waited 3 s (launch.first_step_timeout_s): rank 1 ({HERE}) was last seen working towards"
    assert left[0].said.count(told) == 1
    assert "in sleep_long" in left[1].said  # its own stack says where it hangs
    state = json.loads((tmp_path / "run" / "state.json").read_text(encoding="utf-8"))
    assert (state["status"], state["exit_code"]) == ("failed", 3)
    assert told in state["reason"]


def test_a_rank_that_hangs_while_it_reads_the_backbone_is_named(start, monkeypatch):
    on_rank_1(monkeypatch, host, "load_divided", sleep_long)
    left = start(2, [0, 1], "launch.first_step_timeout_s=3")
    assert [rank.code for rank in left.values()] == [3, 3]
    assert f"rank 1 ({HERE}) was last seen reading the backbone; look at that host, its disk" in left[0].said


def test_a_rank_0_that_hangs_as_a_whole_is_noticed(start, monkeypatch):
    """A stopped process: its store does not answer, so nobody can be asked."""
    monkeypatch.setattr(roll_call, "_GRACE_S", 1.0)
    plain = preflight.collect

    def stop_rank_0(*arguments: object) -> object:
        if os.environ["RANK"] == "0":
            if os.fork() == 0:  # wakes it up when rank 1 is long gone, so that the test ends
                time.sleep(15)
                os.kill(os.getppid(), 18)
                os._exit(0)
            os.kill(os.getpid(), 19)
            os._exit(0)
        return plain(*arguments)

    monkeypatch.setattr(preflight, "collect", stop_rank_0)
    left = start(2, [0, 1], "launch.first_step_timeout_s=2")
    assert left[1].code == 3
    assert f"rank 0 ({HERE}) does not answer any more: its process or host hangs" in left[1].said


def test_patience_ends_with_the_first_step(start, monkeypatch):
    """Later a rank may be slow: only the way to the first step is watched."""
    plain, slept = trainer.Trainer.end_epochs, []

    def rest(*arguments: object) -> None:
        if not slept:
            slept.append(time.sleep(4))
        plain(*arguments)

    on_rank_1(monkeypatch, trainer.Trainer, "end_epochs", rest)
    left = start(2, [0, 1], "launch.first_step_timeout_s=1.5")
    assert [rank.code for rank in left.values()] == [0, 0], left


# -- hosts that do not fit -------------------------------------------------------------------------------------------


def test_another_version_on_one_rank(start, monkeypatch):
    on_rank_1(monkeypatch, preflight, "versions", lambda: {**preflight_versions, "torch": "1.13.0"})
    left = start(2, [0, 1])
    assert [rank.code for rank in left.values()] == [3, 3]
    told = f"error: preflight 1, versions: rank 1 ({HERE}) has torch 1.13.0, rank 0 has {torch.__version__}; install"
    assert left[0].said.count(told) == 1
    assert "error: " not in left[1].said


preflight_versions = preflight.versions()


def test_another_configuration_on_one_rank(start, tmp_path):
    left = start(2, [0, 1], of_rank_1="train.epochs=3")
    assert [rank.code for rank in left.values()] == [3, 3]
    assert f"preflight 2, configuration: rank 1 ({HERE}) resolved another configuration than rank 0" in left[0].said
    assert not (tmp_path / "run").exists()


def test_a_backbone_that_one_rank_does_not_see(start, monkeypatch):
    on_rank_1(monkeypatch, preflight, "_backbone", lambda config: ({}, f"folder not found: {config.backbone.path}"))
    left = start(2, [0, 1])
    assert [rank.code for rank in left.values()] == [4, 4]
    assert f"preflight 5, backbone: rank 1 ({HERE}): folder not found: " in left[0].said


def test_too_little_disk_space(start, tmp_path):
    left = start(2, [0, 1], "launch.min_free_disk_gib=1e9")
    assert [rank.code for rank in left.values()] == [3, 3]
    assert f"preflight 8, disk space: rank 0 ({HERE}): " in left[0].said
    assert not (tmp_path / "run").exists()
