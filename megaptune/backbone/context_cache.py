"""Keys and values of what precedes an example's first pseudo token, kept over epochs.

In a causal model nothing before the prompt depends on it, so a frozen backbone computes these tokens once: that is a
passage of 200 tokens against a prompt of six. Contexts are computed in chunks, which replicas share out and then hand
to each other; a chunk lies on the device, in host memory or in a file that is mapped, whichever has room first, and
what has room nowhere is computed anew every time. Files outlive the process: a resumed run reads them.

L layers, k key-value heads of this rank, E head width, S sequences, P tokens of the longest context, N of a chunk.
"""

import hashlib
import json
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from megaptune.backbone.context_files import ContextFiles
from megaptune.backbone.inputs import Packed, pack
from megaptune.config import SpeedConfig
from megaptune.errors import first_line
from megaptune.run.grid import ProcessGrid

Context = tuple[int, ...]

CHUNK_TOKENS = 2048
_GIB = 2**30


@dataclass(frozen=True)
class Chunk:
    """Contexts that are computed together: their number of tokens fits the matrix products, not an example's."""

    contexts: tuple[Context, ...]

    @property
    def num_tokens(self) -> int:
        return sum(len(context) for context in self.contexts)

    @property
    def name(self) -> str:
        return hashlib.sha256(json.dumps(self.contexts).encode()).hexdigest()[:24] + ".safetensors"


@dataclass
class Room:
    """Bytes left in each place."""

    device: int
    host: int
    disk: int

    @classmethod
    def of(cls, speed: SpeedConfig, device: torch.device) -> "Room":
        on_device = int(speed.context_device_gib * _GIB) if device.type == "cuda" else 0
        return cls(on_device, int(speed.context_host_gib * _GIB), int(speed.context_disk_gib * _GIB))

    def take(self, place: str, size: int) -> bool:
        left = getattr(self, place)
        if size > left:
            return False
        setattr(self, place, left - size)
        return True


@dataclass(frozen=True)
class Home:
    """Where a chunk lies, and whether a file holds it too."""

    place: Literal["device", "host", "disk"]
    in_file: bool


class ContextCache:
    """:param compute: a packed batch -> keys and values of its tokens [L, 2, k, N, E], on every rank of the grid alike.
    :param token_bytes: of one token's keys and values on this rank.
    :param folder: for files of this backbone and this rank's shard; None for none.
    """

    def __init__(
        self,
        compute: Callable[[Packed], Tensor],
        token_bytes: int,
        device: torch.device,
        grid: ProcessGrid,
        speed: SpeedConfig,
        folder: Path | None = None,
    ) -> None:
        self.compute, self.token_bytes, self.device, self.grid = compute, token_bytes, device, grid
        self.files = None if folder is None else ContextFiles(folder)
        self.room = Room.of(speed, device)
        if folder is None:
            self.room.disk = 0
        self.places: dict[Context, tuple[Tensor, int]] = {}  # a context's chunk, and its first token there
        self.space: Tensor | None = None
        self.problem = ""  # why files could not be written

    # -- reading -----------------------------------------------------------------------------------------------------

    def lengths(self, slots: Sequence[list[int]]) -> list[int]:
        """How many of each example's first tokens are kept."""
        contexts = [context_of(tokens) for tokens in slots]
        return [len(context) if context in self.places else 0 for context in contexts]

    def gather(self, contexts: Sequence[Context]) -> Tensor:
        """Keys and values [L, 2, S, k, P, E] of the contexts of S sequences, () for one without; zeros fill up."""
        found = [self.places[context] if context else None for context in contexts]
        some, _ = next(place for place in found if place is not None)
        layers, two, heads, _, width = some.shape
        longest = max(len(context) for context in contexts)
        kept = self._space(some, (layers, two, len(contexts), heads, longest, width))
        for number, (context, place) in enumerate(zip(contexts, found, strict=True)):
            kept[:, :, number, :, len(context) :] = 0
            if place is not None:
                chunk, first = place
                kept[:, :, number, :, : len(context)] = chunk[:, :, :, first : first + len(context)]
        return kept

    def _space(self, like: Tensor, shape: tuple[int, ...]) -> Tensor:
        """Memory to lay contexts out in, the same for every batch: fresh pages cost a CPU more than the copy.

        A backward pass that came after the next batch's forward would be refused by autograd, not wrong.
        """
        size = math.prod(shape)
        if self.space is None or self.space.numel() < size:
            self.space = like.new_empty(size, device=self.device)
        return self.space[:size].view(shape)

    # -- keeping -----------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def keep(self, contexts: Iterable[Context]) -> None:
        """Compute the contexts that are not there yet and have room. Collective: every rank calls this alike."""
        new = sorted({context for context in contexts if context not in self.places}, key=lambda c: (-len(c), c))
        planned = [(chunk, home) for chunk in _cut(new) if (home := self._home(chunk)) is not None]
        stored = self._stored([chunk for chunk, _ in planned])
        missing = []
        for (chunk, home), found in zip(planned, stored, strict=True):
            if found is None:
                missing.append((chunk, home))
            else:
                self._put(chunk, home, found)
        replicas, replica = self.grid.replicas, self.grid.replica
        for start in range(0, len(missing), replicas):
            turn = missing[start : start + replicas]
            mine = min(replica, len(turn) - 1)  # who has none left computes along: ZeRO 3 gathers from all
            computed = self.compute(_packed(turn[mine][0], self.device))
            if mine == replica:
                self._put(*turn[mine], computed)  # before it is shared, so that neighbours find its file
            for owner, (chunk, home) in enumerate(turn):
                shared = self._share(computed, owner, chunk)
                if owner != replica:
                    self._put(chunk, home, shared)

    def _home(self, chunk: Chunk) -> Home | None:
        """Where a chunk will lie: every rank decides alike, from sizes alone."""
        size = chunk.num_tokens * self.token_bytes
        if self.room.take("device", size):
            return Home("device", self.room.take("disk", size))
        if self.room.take("host", size):
            return Home("host", self.room.take("disk", size))
        return Home("disk", True) if self.room.take("disk", size) else None

    def _stored(self, chunks: list[Chunk]) -> list[Tensor | None]:
        """The chunks that every rank finds in its files."""
        found = [None if self.files is None else self.files.read(chunk.name) for chunk in chunks]
        if torch.distributed.is_initialized() and chunks:
            flags = torch.tensor([chunk is not None for chunk in found], dtype=torch.int32, device=self.device)
            torch.distributed.all_reduce(flags, op=torch.distributed.ReduceOp.MIN)
            found = [chunk if there else None for chunk, there in zip(found, flags.tolist(), strict=True)]
        return found

    def _share(self, computed: Tensor, owner: int, chunk: Chunk) -> Tensor:
        """The owner's chunk, on every replica."""
        if self.grid.replicas == 1:
            return computed
        layers, two, heads, _, width = computed.shape
        found = computed
        if owner != self.grid.replica:
            found = computed.new_empty(layers, two, heads, chunk.num_tokens, width)
        torch.distributed.broadcast(found, group=self.grid.data_group, group_src=owner)
        return found

    def _put(self, chunk: Chunk, home: Home, found: Tensor) -> None:
        if home.in_file and self.files is not None and not self.problem:
            try:
                self.files.write(chunk.name, found)
            except OSError as error:  # a copy less, or more host memory than was asked for; the run goes on
                self.problem = f"{self.files.folder}: {first_line(error)}"
            else:
                found = found if home.place != "disk" else self.files.map(chunk.name)
        found = found.to(self.device if home.place == "device" else "cpu")
        first = 0
        for context in chunk.contexts:
            self.places[context] = found, first
            first += len(context)


def context_of(slots: list[int]) -> Context:
    """What precedes the first pseudo token; nothing where there is none."""
    first = next((place for place, slot in enumerate(slots) if slot < 0), 0)
    return tuple(slots[:first])


def worth_keeping(slots: Sequence[list[int]], groups: Sequence[int]) -> list[Context]:
    """The contexts of examples, but for those that a whole group shares: they are computed once a batch anyway."""
    found: dict[int, set[Context]] = {}
    for tokens, group in zip(slots, groups, strict=True):
        found.setdefault(group, set()).add(context_of(tokens))
    return [context for contexts in found.values() if len(contexts) > 1 for context in contexts if context]


def _cut(contexts: list[Context]) -> list[Chunk]:
    """Chunks of at most CHUNK_TOKENS tokens, or of one context."""
    chunks: list[Chunk] = []
    held: list[Context] = []
    for context in contexts:
        if held and sum(map(len, held)) + len(context) > CHUNK_TOKENS:
            chunks.append(Chunk(tuple(held)))
            held = []
        held.append(context)
    return [*chunks, Chunk(tuple(held))] if held else chunks


def _packed(chunk: Chunk, device: torch.device) -> Packed:
    slots = [list(context) for context in chunk.contexts]
    return pack(slots, [len(tokens) - 1 for tokens in slots], [0] * len(slots), masked=False, device=device)
