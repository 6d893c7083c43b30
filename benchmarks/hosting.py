"""The memory plan against real ranks on this machine, layout by layout: what it predicts and what is measured.

    python benchmarks/hosting.py [--families gpt2 llama bert] [--width 256] [--blocks 6]

Random fp32 backbones, one micro-batch of 8 inputs of 24 tokens a replica, over gloo. held: bytes of weights between
steps. saved: bytes that autograd keeps for backward. sent: bytes that a rank sends in a step, as rings send them. of
1/n: what a rank holds, as a multiple of the model divided by tensor-parallel ranks and ZeRO-3 replicas.
"""

import argparse
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests" / "helpers"))

from measure import EXAMPLES, ROWS, TOKENS, measure_step
from ranks import run_ranks
from rich.console import Console
from rich.table import Table
from sized import MASKED, save_sized

from megaptune.planning.communication import communication_of
from megaptune.planning.layout import Layout
from megaptune.planning.memory import weight_bytes
from megaptune.planning.workload import Shapes, Workload

LAYOUTS = [Layout(tp, dp, stage) for tp in (1, 2) for dp in (1, 2) for stage in (0, 3)]
LAYOUTS += [Layout(tp, dp, stage, "none", True) for tp, dp, stage in ((1, 1, 0), (2, 1, 0), (1, 2, 3))]


def row(folder: Path, family: str, layout: Layout) -> list[str]:
    """Predicted and measured figures of rank 0, with their ratios."""
    shapes = Shapes(folder, "masked" if family in MASKED else "causal", "fp32")
    size, batch = layout.tensor_parallel, EXAMPLES * layout.replicas
    sets = {"vocabulary": None}
    work = Workload(batch, EXAMPLES, TOKENS, EXAMPLES, TOKENS, ROWS, "lstm", "adam", "vocabulary", sets, False, "")
    traced = shapes.activations(size, EXAMPLES, TOKENS, layout.activation_checkpointing)
    predicted = {
        "held": weight_bytes(shapes.tensors(0, size), layout),
        "saved": traced.saved_bytes,
        "sent": communication_of(shapes, work, layout).sent_bytes,
    }
    found = run_ranks(layout.world_size, measure_step, folder, layout)[0]
    measured = {"held": found["held"], "saved": found["saved"], "sent": found["model_sent"] + found["table_sent"]}
    cells = [family, str(layout)]
    for name in predicted:
        ratio = f"{predicted[name] / measured[name]:.3f}" if measured[name] else "-"
        cells += [f"{predicted[name] / 1024:,.1f}", f"{measured[name] / 1024:,.1f}", ratio]
    parts = size * (layout.replicas if layout.zero_stage == 3 else 1)
    return [*cells, f"{found['held'] * parts / (shapes.num_parameters * shapes.itemsize):.3f}"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--families", nargs="+", default=["gpt2", "llama", "bert"])
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--blocks", type=int, default=6)
    arguments = parser.parse_args()
    table = Table(title="KiB of a rank: predicted, measured, predicted / measured")
    for name in ("family", "layout"):
        table.add_column(name)
    for name in ("held", "", "", "saved", "", "", "sent", "", "", "of 1/n"):
        table.add_column(name, justify="right")
    with tempfile.TemporaryDirectory() as scratch:
        for family in arguments.families:
            folder = save_sized(family, Path(scratch) / family, width=arguments.width, blocks=arguments.blocks)
            for layout in LAYOUTS:
                table.add_row(*row(folder, family, layout))
            table.add_section()
    Console(width=170).print(table)


if __name__ == "__main__":
    main()
