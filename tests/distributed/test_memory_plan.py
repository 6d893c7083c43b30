"""The memory plan against real ranks: weights held, activations kept, bytes sent, in every layout."""

from pathlib import Path

import pytest
from measure import EXAMPLES, ROWS, TOKENS, measure_step
from ranks import run_ranks
from sized import MASKED, save_sized

from megaptune.backbone import zero_config
from megaptune.planning import communication, memory
from megaptune.planning.communication import communication_of, reduced
from megaptune.planning.layout import Layout
from megaptune.planning.memory import gathered_bytes, weight_bytes
from megaptune.planning.workload import Shapes, Workload

pytestmark = pytest.mark.dist

WITHIN = 0.1  # of what is measured; most agree to the byte

LAYOUTS = [Layout(tp, dp, stage) for tp in (1, 2) for dp in (1, 2) for stage in (0, 3)]
CHECKPOINTED = [Layout(tp, dp, stage, "none", True) for tp, dp, stage in ((1, 1, 0), (2, 1, 0), (1, 2, 3))]
FAMILIES = {"gpt2": [*LAYOUTS, *CHECKPOINTED], "llama": [*LAYOUTS, *CHECKPOINTED], "bert": [*LAYOUTS, *CHECKPOINTED]}
FAMILIES |= {family: [Layout(2, 1, 0), Layout(1, 2, 3), CHECKPOINTED[0]] for family in ("xglm", "gpt_neox", "opt")}
CASES = [(family, layout) for family, layouts in FAMILIES.items() for layout in layouts]


@pytest.fixture(scope="module")
def sized(tmp_path_factory):
    """``sized("llama")``: the folder of a backbone large enough for constants not to count."""
    root = tmp_path_factory.mktemp("sized")

    def folder(family: str) -> Path:
        return root / family if (root / family).is_dir() else save_sized(family, root / family)

    return folder


def _plan(folder: Path, family: str, layout: Layout) -> tuple[Shapes, Workload]:
    shapes = Shapes(folder, "masked" if family in MASKED else "causal", "fp32")
    batch = EXAMPLES * layout.replicas
    work = Workload(
        batch, EXAMPLES, TOKENS, EXAMPLES, TOKENS, ROWS, "lstm", "adam", "vocabulary", {"vocabulary": None}, False, ""
    )
    return shapes, work


@pytest.mark.parametrize(("family", "layout"), CASES, ids=lambda value: str(value).replace(" ", ""))
def test_predicted_bytes_are_the_measured_ones(sized, family, layout):
    folder = sized(family)
    shapes, work = _plan(folder, family, layout)
    zero_3 = layout.zero_stage == 3
    saved = shapes.activations(layout.tensor_parallel, EXAMPLES, TOKENS, layout.activation_checkpointing).saved_bytes
    sent = communication_of(shapes, work, layout)
    for rank, found in enumerate(run_ranks(layout.world_size, measure_step, folder, layout)):
        tensors = shapes.tensors(rank % layout.tensor_parallel, layout.tensor_parallel)
        assert found["held"] == weight_bytes(tensors, layout)
        assert saved == pytest.approx(found["saved"], rel=WITHIN)
        assert sent.tensor_parallel + sent.zero_3 == pytest.approx(found["model_sent"], rel=WITHIN)
        assert sent.table == found["table_sent"]
        if zero_3:
            assert gathered_bytes(shapes, work, layout, tensors) == pytest.approx(found["gathered"], rel=WITHIN)


@pytest.mark.parametrize(("reused", "prefetched"), [(600_000, 100_000), (1_000_000, 50_000)])
def test_of_a_model_beyond_what_may_live_at_a_time(tmp_path, monkeypatch, reused, prefetched):
    """Real limits are a thousand times higher, as are the models that they are for. What is gathered is bounded from
    above: how far DeepSpeed fetches ahead depends on how many modules run."""
    for module in (zero_config, memory, communication):
        monkeypatch.setattr(module, "REUSE_ELEMENTS", reused)
    for module in (zero_config, memory):
        monkeypatch.setattr(module, "PREFETCHED_ELEMENTS", prefetched)
    folder, layout = save_sized("gpt2", tmp_path / "gpt2", blocks=12), Layout(1, 2, 3)
    shapes, work = _plan(folder, "gpt2", layout)
    sent = communication_of(shapes, work, layout).zero_3
    for found in run_ranks(2, measure_step, folder, layout):
        assert found["gathered"] < 0.6 * shapes.num_parameters * 4  # the limit is felt
        predicted = gathered_bytes(shapes, work, layout, shapes.tensors(0, 1))
        assert found["gathered"] <= predicted <= 1.5 * found["gathered"]
        assert found["model_sent"] > 1.5 * shapes.num_parameters * 4 / 2  # most weights are fetched twice
        assert sent == pytest.approx(found["model_sent"], rel=0.15)


def test_a_rank_holds_its_part_of_the_model(sized):
    """TP 2 x ZeRO 3 over 2: a quarter of the model, norms and biases of rows included, to 5 %."""
    shapes, _ = _plan(sized("gpt2"), "gpt2", Layout())
    for found in run_ranks(4, measure_step, sized("gpt2"), Layout(2, 2, 3)):
        assert found["held"] == pytest.approx(shapes.num_parameters * shapes.itemsize / 4, rel=0.05)


@pytest.mark.parametrize("world", [2, 4])
def test_replicas_send_the_gradient_of_the_table_and_nothing_else(sized, world):
    """As many bytes as the table has, times the world's all-reduce factor; beside it a few numbers per rank."""
    table = ROWS * 128 * 4
    for found in run_ranks(world, measure_step, sized("gpt2"), Layout(1, world, 0)):
        assert found["model_sent"] == 0
        assert found["calls"] == 2
        figures = (world - 1) * (5 + ROWS) * 8
        assert found["table_sent"] - figures <= reduced(table, world)
