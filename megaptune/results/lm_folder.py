"""The tuned LM as a Hugging Face folder, put together from the ranks' pieces: no rank ever holds all of it."""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

from torch import Tensor

from megaptune.backbone.loading import DTYPES
from megaptune.backbone.tuned_host import TunedHost
from megaptune.backbone.weight_files import CHECKSUMS, write_checksums
from megaptune.backbone.weight_pieces import Pieces, Place, write_tensors
from megaptune.errors import CheckpointError, first_line
from megaptune.run.files import write_json
from megaptune.run.topology import Topology, everywhere, on_main

SHARD_BYTES = 1 << 30  # of a weight file, and so the most that rank 0 holds
_NOT_COPIED = (".safetensors", ".bin", ".pt", ".pth", ".gguf", ".index.json")


def write_tuned_lm(host: TunedHost, topology: Topology, folder: Path) -> None:
    """Write the weights as they are now, in the backbone's dtype, with its configuration and tokenizer.

    :raises CheckpointError: on every rank, when a file cannot be written.
    """
    part = folder.with_name(f".{folder.name}.part")
    on_main(topology, lambda: _make(part))
    name = f"lm-rank-{topology.rank:05d}.safetensors"
    everywhere(topology, lambda: host.weights.write(part / "pieces" / name, weights_only=True))
    on_main(topology, lambda: _assemble(host, part, folder))


def _make(part: Path) -> None:
    try:
        shutil.rmtree(part, ignore_errors=True)
        (part / "pieces").mkdir(parents=True)
    except OSError as error:
        raise CheckpointError(f"could not write {part}: {first_line(error)}") from error


def _assemble(host: TunedHost, part: Path, folder: Path) -> None:
    try:
        pieces = Pieces(sorted((part / "pieces").glob("*.safetensors")))
        groups = list(_shards(host))
        weight_map: dict[str, str] = {}
        for number, names in enumerate(groups, start=1):
            file = f"model-{number:05d}-of-{len(groups):05d}.safetensors"
            write_tensors(part / file, list(_weights(host, pieces, names)))
            weight_map |= dict.fromkeys(names, file)
        total_bytes = host.num_parameters * DTYPES[host.dtype].itemsize
        index = {"metadata": {"total_size": total_bytes}, "weight_map": weight_map}
        write_json(part / "model.safetensors.index.json", index)
        for file_ in host.folder.iterdir():
            if file_.is_file() and file_.name != CHECKSUMS and not file_.name.endswith(_NOT_COPIED):
                shutil.copy(file_, part / file_.name)
        config = json.loads((part / "config.json").read_text(encoding="utf-8"))
        write_json(part / "config.json", {**config, "dtype": str(DTYPES[host.dtype]).removeprefix("torch.")})
        shutil.rmtree(part / "pieces")
        write_checksums(part)
        shutil.rmtree(folder, ignore_errors=True)
        part.rename(folder)
    except OSError as error:
        raise CheckpointError(f"could not write {folder}: {first_line(error)}") from error


def _shards(host: TunedHost) -> Iterator[list[str]]:
    """The parameters' names in groups of SHARD_BYTES at most, or of one."""
    group: list[str] = []
    held_bytes = 0
    for name, shape in host.shapes.items():
        size = DTYPES[host.dtype].itemsize
        for length in shape:
            size *= length
        if group and held_bytes + size > SHARD_BYTES:
            yield group
            group, held_bytes = [], 0
        group.append(name)
        held_bytes += size
    yield group


def _weights(host: TunedHost, pieces: Pieces, names: list[str]) -> Iterator[tuple[str, Tensor]]:
    for name in names:
        shape = host.shapes[name]
        count = 1
        for length in shape:
            count *= length
        weight = pieces.take("weight", name, Place(shape, None, 0, count))
        yield name, weight.view(shape).to(DTYPES[host.dtype])
