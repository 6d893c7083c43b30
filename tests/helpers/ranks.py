"""Several ranks in a test: real processes over gloo, forked after one import of DeepSpeed (seconds, not half a minute).

results = run_ranks(2, work, argument)      # work(argument) on each rank; its return values by rank
"""

import multiprocessing
import os
import pickle
import signal
import socket
import time
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import torch

from megaptune.config import load_config
from megaptune.session import run_training


class RankFailed(Exception):
    """A rank raised (its traceback is the message) or died (by which signal)."""


def run_ranks(count: int, work: Callable[..., Any], *arguments: Any, timeout_s: float = 120) -> list[Any]:
    """``work(*arguments)`` in ``count`` processes with the environment that a launcher gives them.

    :raises RankFailed: as soon as one rank fails; the others are killed then, so nothing hangs.
    """
    # Paid once, in the parent; they import triton, so not before tests/kernels/conftest.py.
    import deepspeed.runtime.zero.muon.muon_optimizer  # noqa: F401  what initialize imports for an optimizer: seconds
    import torch._dynamo  # noqa: F401
    import transformers  # noqa: F401

    context = multiprocessing.get_context("fork")
    port = _free_port()
    pipes, processes = [], []
    for rank in range(count):
        receiver, sender = context.Pipe(duplex=False)
        process = context.Process(target=_rank, args=(rank, count, port, sender, work, arguments))
        process.start()
        sender.close()
        pipes.append(receiver)
        processes.append(process)
    try:
        return _collect(pipes, processes, time.monotonic() + timeout_s)
    finally:
        for process in processes:
            if process.is_alive():
                process.kill()
            process.join()


def _rank(rank: int, count: int, port: int, sender: Connection, work: Callable[..., Any], arguments: Any) -> None:
    os.environ.update(
        RANK=str(rank),
        WORLD_SIZE=str(count),
        LOCAL_RANK=str(rank),
        LOCAL_WORLD_SIZE=str(count),
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
    )
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    # One core a rank: matrices as small as the tests' are summed in an order that depends on the number of threads.
    os.sched_setaffinity(0, {sorted(os.sched_getaffinity(0))[rank % len(os.sched_getaffinity(0))]})
    torch.set_num_threads(1)
    try:
        answer = "returned", work(*arguments)
    except BaseException:
        answer = "raised", traceback.format_exc()
    sender.send_bytes(pickle.dumps(answer))  # not send(): it would pass tensors as handles that die with the rank
    sender.close()
    os._exit(0)


def _collect(pipes: list[Connection], processes: list[BaseProcess], deadline: float) -> list[Any]:
    results: dict[int, Any] = {}
    while len(results) < len(pipes):
        waiting = [pipe for rank, pipe in enumerate(pipes) if rank not in results]
        ready = wait(waiting, timeout=max(0.0, deadline - time.monotonic()))
        if not ready:
            raise RankFailed(f"no answer from {len(waiting)} of {len(pipes)} ranks within the time limit")
        for pipe in ready:
            rank = pipes.index(pipe)
            try:
                how, value = pickle.loads(pipe.recv_bytes())
            except EOFError:
                processes[rank].join()
                raise RankFailed(f"rank {rank} died with exit code {processes[rank].exitcode}") from None
            if how == "raised":
                raise RankFailed(f"rank {rank}:\n{value}")
            results[rank] = value
    return [results[rank] for rank in range(len(pipes))]


def train(config: Path, *overrides: str) -> None:
    """What ``megaptune train --config CONFIG --set ...`` does, in this rank."""
    run_training(load_config(config, list(overrides)))


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
