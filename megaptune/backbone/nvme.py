"""What offload to NVMe needs before a weight is read: a folder with room, libaio, and two C++ ops of DeepSpeed's.

DeepSpeed compiles the ops at first use, for minutes, behind a lock that a killed build leaves for ever.
"""

import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path

from megaptune.errors import SetupError, first_line
from megaptune.run.topology import Topology, everywhere

_STALE_S = 1800


def prepare(topology: Topology, folder: Path, num_bytes: int, announce: Callable[[str], None]) -> None:
    """Let one rank of each host check its folder and compile; every rank then goes on, or gets the first error.

    :param num_bytes: of all weights; a host keeps the share of its ranks.
    """

    def work() -> None:
        if topology.local_rank == 0:
            check_folder(folder, num_bytes * topology.local_world_size // topology.world_size)
            build_ops(announce)

    everywhere(topology, work)


def check_folder(folder: Path, needed_bytes: int) -> None:
    """:raises SetupError: ``folder`` cannot be written to, or has less room than the weights take."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe = folder / f".megaptune-{os.getpid()}"
        probe.write_bytes(b"0")
        probe.unlink()
    except OSError as error:
        raise SetupError(f"parallel.offload_folder {folder} cannot be written to: {error.strerror}") from None
    free = shutil.disk_usage(folder).free
    if free < needed_bytes:
        raise SetupError(
            f"parallel.offload_folder {folder} has {free / 2**30:.1f} GiB free; this host's share of the weights takes "
            f"{needed_bytes / 2**30:.1f} GiB"
        )


def build_ops(announce: Callable[[str], None]) -> None:
    """Compile what is not compiled yet.

    :raises SetupError: without libaio or a compiler; a lock that a killed build left.
    """
    from deepspeed.ops.op_builder import AsyncIOBuilder, PinMemoryBuilder
    from torch.utils.cpp_extension import _get_build_directory

    for builder in (AsyncIOBuilder(), PinMemoryBuilder()):
        place = Path(_get_build_directory(builder.name, verbose=False))
        lock = place / "lock"
        if lock.exists() and time.time() - lock.stat().st_mtime > _STALE_S:
            raise SetupError(f"a build of DeepSpeed's {builder.name} was killed and left {lock}: remove {place}")
        if not builder.is_compatible(verbose=False):
            raise SetupError(
                f"offload: nvme needs libaio with its headers, for DeepSpeed's {builder.name}: install libaio-dev "
                "(Debian, Ubuntu) or libaio-devel"
            )
        if not (place / f"{builder.name}.so").exists():
            announce(f"building DeepSpeed's {builder.name} in {place}, once (minutes)")
        try:
            builder.load(verbose=False)
        except (RuntimeError, OSError, ImportError) as error:
            raise SetupError(f"DeepSpeed's {builder.name} could not be built in {place}: {first_line(error)}") from None
