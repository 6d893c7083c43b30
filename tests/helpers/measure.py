"""What a rank really holds, keeps for backward and sends: counted, to be held against the memory plan."""

import contextlib
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from hosting import open_host
from torch import Tensor

from megaptune.backbone.inputs import Padded
from megaptune.planning.layout import Layout
from megaptune.run.exact_sum import sum_exactly
from megaptune.run.topology import disconnect
from megaptune.scoring import Scorer

EXAMPLES, TOKENS, ROWS = 8, 24, 2  # of the step that measure_step takes; rows of the prompt table

# Collectives by name: which argument is what travels. The payload of a reduction is its tensor, that of a gather all
# ranks' output.
_PAYLOAD = {
    "all_reduce": 0,
    "all_gather_into_tensor": 0,
    "_all_gather_base": 0,
    "all_gather": 0,
    "broadcast": 0,
    "reduce_scatter_tensor": 1,
    "reduce": 0,
}


class Traffic:
    """Payload bytes and calls per (collective, number of ranks), of collectives among several ranks."""

    def __init__(self) -> None:
        self.payload: dict[tuple[str, int], int] = defaultdict(int)
        self.calls: dict[tuple[str, int], int] = defaultdict(int)

    def clear(self) -> None:
        self.payload.clear()
        self.calls.clear()

    def sent_bytes(self) -> float:
        """What a ring sends per rank: 2 (n - 1) / n of a reduced tensor, (n - 1) / n of a gathered one."""
        return sum(
            size * (2 if name == "all_reduce" else 1) * (ranks - 1) / ranks
            for (name, ranks), size in self.payload.items()
        )


def _bytes(value: Any) -> int:
    if isinstance(value, Tensor):
        return value.numel() * value.itemsize
    return sum(_bytes(item) for item in value)


@contextlib.contextmanager
def counted_traffic() -> Iterator[Traffic]:
    """Count what goes through ``torch.distributed``, whoever calls it.

    To be entered before DeepSpeed joins the ranks: it looks these functions up once.
    """
    traffic = Traffic()
    originals = {name: getattr(torch.distributed, name) for name in _PAYLOAD if hasattr(torch.distributed, name)}
    depth = 0

    def wrap(name: str, original: Any) -> Any:
        def call(*args: Any, **named: Any) -> Any:
            nonlocal depth
            group = named.get("group")
            if group is None:
                group = next((a for a in args if isinstance(a, torch.distributed.ProcessGroup)), None)
            ranks = torch.distributed.get_world_size(group)
            if depth == 0 and ranks > 1:
                place = _PAYLOAD[name]
                tensor = args[place] if len(args) > place else next(iter(named.values()))
                traffic.payload[name, ranks] += _bytes(tensor)
                traffic.calls[name, ranks] += 1
            depth += 1
            try:
                return original(*args, **named)
            finally:
                depth -= 1

        return call

    for name, original in originals.items():
        setattr(torch.distributed, name, wrap(name, original))
    try:
        yield traffic
    finally:
        for name, original in originals.items():
            setattr(torch.distributed, name, original)


@contextlib.contextmanager
def counted_saved(module: torch.nn.Module) -> Iterator[dict[int, int]]:
    """Bytes by storage that autograd keeps for backward, without the module's own parameters and buffers."""
    storages: dict[int, int] = {}
    held = []  # a freed storage's address could come back

    def pack(tensor: Tensor) -> Tensor:
        own = {parameter.untyped_storage().data_ptr() for parameter in module.parameters()}
        own |= {buffer.untyped_storage().data_ptr() for buffer in module.buffers()}
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own and not isinstance(tensor, torch.nn.Parameter):
            held.append(tensor)
            storages[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        yield storages


def held_bytes(module: torch.nn.Module) -> int:
    """Bytes of parameters in this rank's memory: ZeRO 3's shares where it has partitioned them."""
    total = 0
    for parameter in module.parameters():
        share = getattr(parameter, "ds_tensor", None)
        total += (parameter if share is None else share).numel() * parameter.itemsize
    return total


def gathered_elements(module: torch.nn.Module) -> int:
    """Elements of ZeRO 3's parameters that are whole in this rank's memory at the moment."""
    return sum(p.numel() for p in module.parameters() if hasattr(p, "ds_tensor") and p.numel() == p.ds_numel)


def measure_step(folder: Path, layout: Layout) -> dict[str, float]:
    """What this rank holds, keeps and sends in a step; the fifth, when ZeRO 3 knows the order of modules."""
    with counted_traffic() as traffic:
        host = open_host(
            folder,
            tensor_parallel=layout.tensor_parallel,
            zero_stage=layout.zero_stage,
            activation_checkpointing=layout.activation_checkpointing,
        )
        held, scorer = held_bytes(host.module), Scorer(host, None)
        slots = torch.arange(EXAMPLES * TOKENS).view(EXAMPLES, TOKENS) % 500
        slots[:, :ROWS] = -1 - torch.arange(ROWS)
        mask = None
        if host.kind == "masked":
            mask = torch.ones_like(slots)
            mask[0, -4:] = 0  # batches are padded
        peak = 0

        def look(*_: object) -> None:
            nonlocal peak
            peak = max(peak, gathered_elements(host.module))

        for module in host.module.modules():
            module.register_forward_hook(look)
        for _ in range(5):
            traffic.clear()
            table = torch.randn(ROWS, host.width).requires_grad_()
            with counted_saved(host.module) as saved:
                features = host.features(Padded(slots, mask, torch.full((EXAMPLES,), 5)), table)
            loss, _, _ = scorer(features, torch.arange(EXAMPLES))
            loss.sum().backward()
            forward_backward = traffic.sent_bytes()
            sum_exactly([table.grad], 1, torch.zeros(4, dtype=torch.float64), host.grid.speaks)
        disconnect()
        calls = dict(traffic.calls)
    return {
        "held": held,
        "saved": sum(saved.values()),
        "gathered": peak * 4,
        "model_sent": forward_backward,
        "table_sent": traffic.sent_bytes() - forward_backward,
        "calls": sum(calls.values()),
    }
