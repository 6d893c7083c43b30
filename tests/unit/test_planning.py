"""The memory plan by itself: 11B from first principles, the choice of a layout, refusals, sizes."""

from dataclasses import replace
from pathlib import Path

import pytest
from sized import save_sized

from megaptune.config import Config, ParallelConfig
from megaptune.errors import BackboneError, SetupError
from megaptune.planning import settle as settling
from megaptune.planning.choice import candidate, recommend, require_fit, weigh
from megaptune.planning.communication import communication_of
from megaptune.planning.layout import Layout, Machines, gibibytes, parse_size
from megaptune.planning.memory import memory_of, weight_bytes
from megaptune.planning.workload import Shapes, Workload, encoder_elements
from megaptune.run.monitor import Monitor

ROOT = Path(__file__).resolve().parents[2]
D, F, L, V = 3072, 18432, 72, 51200  # megatron_11b: width, features, blocks, vocabulary
FOUR_NODES = Machines(4, 8, 80 * 2**30)
WORK = Workload(8, 2, 64, 32, 64, 9, "lstm", "adam", "vocabulary", {"vocabulary": None}, False, "")


@pytest.fixture(scope="module")
def megatron():
    return Shapes(ROOT / "configs" / "backbone" / "megatron_11b", "causal", "bf16")


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """Four blocks, 256 wide, eight heads of which four hold keys: 4.6 million parameters in fp32."""
    folder = tmp_path_factory.mktemp("small") / "llama"
    return Shapes(save_sized("llama", folder, weights=False, width=256, blocks=4), "causal", "fp32")


# -- 11B from first principles ---------------------------------------------------------------------------------------

BLOCK = 4 * (D * D + D) + 2 * D * F + F + D + 2 * 2 * D  # attention, MLP, two norms
PARAMETERS = V * D + L * BLOCK
DIVIDED = V * D + L * (4 * D * D + 3 * D + 2 * D * F + F)  # all but norms and the biases of row layers


def test_megatron_11b_has_the_parameters_of_the_paper(megatron):
    assert megatron.num_parameters == PARAMETERS == 11_032_240_128


@pytest.mark.parametrize("size", [1, 2, 4, 8, 16, 32])
def test_weights_in_bf16_are_two_bytes_a_parameter(megatron, size):
    held = weight_bytes(megatron.tensors(0, size), Layout(size, 32 // size))
    assert held == 2 * (DIVIDED // size + PARAMETERS - DIVIDED)
    assert held == pytest.approx(2 * PARAMETERS / size, rel=0.01)


@pytest.mark.parametrize(("size", "replicas"), [(1, 32), (8, 4), (2, 16)])
def test_zero_3_shares_what_tensor_parallelism_leaves(megatron, size, replicas):
    held = weight_bytes(megatron.tensors(0, size), Layout(size, replicas, 3))
    assert held == pytest.approx(2 * PARAMETERS / (size * replicas), rel=0.01)


def test_the_lstm_encoder_of_an_11b_backbone():
    lstm = sum(2 * 4 * (D // 2) * (inputs + D // 2 + 2) for inputs in (D, D))  # two layers, both directions
    assert encoder_elements("lstm", 9, D) == 9 * D + lstm + 2 * (D * D + D)
    assert encoder_elements("table", 9, D) == 9 * D


def test_traffic_of_a_step_of_11b(megatron):
    hidden = 2 * 64 * D * 2  # a micro-batch of two inputs of 64 tokens in bf16
    softmax = 2 * (4 + 8 + 8 + 8 + 4 * D)
    expected = 2 * 7 / 8 * ((4 * L + 1) * hidden + softmax)
    sent = communication_of(megatron, WORK, Layout(8, 4))
    assert sent.tensor_parallel == pytest.approx(expected)
    assert sent.zero_3 == sent.host_link == 0
    assert sent.table == pytest.approx(2 * 31 / 32 * 9 * D * 4 + 31 * (5 + 9) * 8)
    assert communication_of(megatron, WORK, Layout(1, 32)).tensor_parallel == 0
    again = communication_of(megatron, WORK, Layout(8, 4, 0, "none", True)).tensor_parallel
    assert again / sent.tensor_parallel == pytest.approx((6 * L + 1) / (4 * L + 1), rel=1e-3)


def test_zero_3_without_tensor_parallelism_fetches_the_weights_almost_twice(megatron):
    sent = communication_of(megatron, WORK, Layout(1, 32, 3)).zero_3
    assert 1.9 * 2 * PARAMETERS * 31 / 32 < sent <= 2 * 2 * PARAMETERS * 31 / 32 * 1.001


def test_checkpointing_keeps_one_tensor_a_block(megatron):
    kept = megatron.activations(1, 2, 64, checkpointing=True).saved_bytes
    assert kept == pytest.approx(L * 2 * 64 * D * 2, rel=0.01)


def test_offloaded_weights_lie_in_host_memory(megatron):
    memory = memory_of(megatron, WORK, Layout(8, 4, 3, "cpu"), FOUR_NODES)
    assert memory.device["weights"] == 0
    assert memory.host["offloaded weights"] == pytest.approx(2 * PARAMETERS / 32, rel=0.01)


def test_larger_groups_follow_from_two_traces(small, megatron):
    for shapes in (small, megatron):
        for checkpointing in (False, True):
            settings = (4, 2, 32, checkpointing)
            assert shapes.activations(*settings).saved_bytes == shapes.traced(*settings).saved_bytes
            assert shapes.activations(*settings).working_bytes >= shapes.traced(*settings).working_bytes


def test_more_ranks_than_key_value_heads_are_traced(small):
    assert small.activations(8, 2, 32) == small.traced(8, 2, 32)


def test_a_tuned_lm_needs_gradients_and_moments(small):
    elements = small.num_parameters
    work = replace(WORK, evaluation_batch=1)  # so that training is the peak
    tuned = replace(work, tuned=True)
    machines = Machines(1, 2, 2**34)
    one = memory_of(small, tuned, Layout(1, 2, 1), machines).device
    three = memory_of(small, tuned, Layout(1, 2, 3), machines).device
    assert {c.layout.zero_stage for c in weigh(small, tuned, machines, ParallelConfig())} == {1, 2, 3}
    size = 4 * elements
    assert communication_of(small, tuned, Layout(1, 2, 1)).tuned_lm == size  # half of it out, half of it back
    assert one["LM optimizer"] == pytest.approx(12 * elements / 2, rel=0.01)  # fp32 copy and two moments, halved
    assert one["LM gradients"] >= 4 * elements
    assert three["LM gradients"] < one["LM gradients"]
    assert one["saved activations"] > memory_of(small, work, Layout(1, 2, 0), machines).device["saved activations"]


# -- the choice ------------------------------------------------------------------------------------------------------


def _best(shapes, work, machines, **parallel):
    return recommend(weigh(shapes, work, machines, ParallelConfig(layout="auto", **parallel)), work)


def _needs(shapes, work, layout, machines):
    """Device memory in which a layout just fits."""
    return int(memory_of(shapes, work, layout, machines).device_bytes / 0.9) + 1


def test_no_tensor_parallelism_where_the_model_fits_and_all_ranks_work(megatron):
    best, _ = _best(megatron, replace(WORK, global_batch=64), FOUR_NODES)
    assert best.layout == Layout(1, 32)


def test_groups_grow_until_no_rank_is_idle(megatron):
    best, reason = _best(megatron, WORK, FOUR_NODES)
    assert best.layout == Layout(8, 4)
    assert "4 micro-batches of 2" in reason
    assert "28 ranks without work" in reason


def test_the_order_of_what_is_given_up(small):
    """With less and less memory: whole replicas, larger groups, then blocks are computed twice."""
    work = replace(WORK, global_batch=16, micro_batch=4, tokens=64, evaluation_batch=1)
    order = [Layout(1, 4), Layout(2, 2), Layout(4, 1), Layout(4, 1, 0, "none", True)]
    machines = Machines(1, 4, 2**40)
    for layout in order:
        tight = replace(machines, memory_bytes=_needs(small, work, layout, machines))
        best, reason = _best(small, work, tight)
        assert best.layout == layout
        assert best.memory is not None
        assert best.memory.device_bytes <= 0.9 * tight.memory_bytes
        if layout.activation_checkpointing:
            assert "computed again" in reason


def test_weights_are_shared_before_they_are_offloaded(megatron):
    work = replace(WORK, global_batch=64, encoder="table")
    one_rank_a_node = Machines(16, 1, 20 * 2**30)  # no tensor parallelism: a group would span nodes
    best, reason = _best(megatron, work, one_rank_a_node)
    assert best.layout == Layout(1, 16, 3)
    assert "every replica holds its weights" in reason
    alone = Machines(1, 1, 20 * 2**30, 64 * 2**30)
    best, _ = _best(megatron, work, alone)
    assert best.layout == Layout(1, 1, 3, "cpu")
    assert best.communication is not None
    assert best.communication.host_link > 2 * PARAMETERS


def test_across_nodes_only_when_asked_for(megatron):
    machines = Machines(8, 1, 12 * 2**30)
    work = replace(WORK, encoder="table")
    assert _best(megatron, work, machines)[0].layout.tensor_parallel == 1
    assert _best(megatron, work, machines, across_nodes=True)[0].layout.tensor_parallel > 1


def test_disk_only_with_a_folder_for_it(megatron, tmp_path):
    alone, work = Machines(1, 1, 20 * 2**30, 16 * 2**30), replace(WORK, encoder="table")
    with pytest.raises(SetupError, match=r"no layout fits.*offload_folder"):
        _best(megatron, work, alone)
    assert _best(megatron, work, alone, offload_folder=tmp_path)[0].layout.offload == "nvme"


def test_a_size_that_does_not_divide_the_heads_is_no_candidate(small):
    machines = Machines(1, 3, 2**40)
    (found,) = [c for c in weigh(small, WORK, machines, ParallelConfig()) if c.layout == Layout(3, 1)]
    assert found.problem is not None
    assert "do not divide" in found.problem
    assert _best(small, WORK, machines)[0].layout == Layout(1, 3)


def test_a_family_without_a_table_is_never_divided(tmp_path):
    from transformers import AutoConfig

    sizes = {"hidden_size": 32, "n_layer": 2, "n_head": 4, "vocab_size": 120}
    AutoConfig.for_model("bloom", **sizes).save_pretrained(tmp_path)
    shapes = Shapes(tmp_path, "causal", "fp32")
    found = weigh(shapes, WORK, Machines(1, 4, 2**40), ParallelConfig())
    assert {(c.layout.tensor_parallel, c.layout.activation_checkpointing) for c in found} == {(1, False)}


def test_a_bank_holds_its_encoders_and_ranks_own_them_in_turn(megatron):
    """41 encoders with moments on 4 GPUs: 11 on the fullest, 41 on each where they are not sharded."""
    size = 4 * encoder_elements("lstm", WORK.prompt_rows, D)
    for sharded, held in ((None, 11), (False, 41)):
        work = replace(WORK, jobs=41, global_batch=41 * 8, sharded=sharded)
        memory = memory_of(megatron, work, Layout(4, 1), Machines(1, 4, 2**40))
        assert memory.device["prompt optimizer"] == 2 * held * size
        assert memory.device["prompt encoder"] == (held + min(held, 16)) * size
        assert memory.host["best prompt"] == held * size


# -- refusals --------------------------------------------------------------------------------------------------------


def test_a_layout_that_cannot_fit_is_refused_with_its_sizes_and_the_nearest_that_fits(megatron):
    parallel, machines = ParallelConfig(), Machines(1, 8, 24 * 2**30)
    with pytest.raises(SetupError) as refused:
        require_fit(megatron, WORK, Layout(1, 8), machines, parallel)
    message = str(refused.value)
    assert "weights 20.55 GiB" in message
    assert "of 21.60 GiB a rank" in message
    assert "set parallel.tensor_parallel: " in message
    assert "check_memory: false" in message
    assert refused.value.exit_code == 3
    require_fit(megatron, WORK, Layout(2, 4), machines, parallel)


def test_host_memory_is_checked_too(megatron):
    machines = Machines(1, 8, 24 * 2**30, host_bytes=2**34)
    assert "host memory" in str(candidate(megatron, WORK, Layout(1, 8, 3, "cpu"), machines).problem)


def test_a_layout_that_cannot_be_divided_is_left_to_the_place_that_says_so(small):
    assert candidate(small, WORK, Layout(3, 1), Machines(1, 3, 2**40)).memory is None
    with pytest.raises(BackboneError, match="do not divide"):
        memory_of(small, WORK, Layout(3, 1), Machines(1, 3, 2**40))
    require_fit(small, WORK, Layout(3, 1), Machines(1, 3, 2**10), ParallelConfig())


def _config(**parallel: object) -> Config:
    task = {"type": "custom", "train": "t", "dev": "d", "test": "e", "answer": "a"}
    settings = {"backbone": {"path": "b"}, "task": task, "methods": ["ptuning"], "parallel": parallel}
    return Config.model_validate(settings)


def test_settling_fills_in_what_auto_leaves_open(megatron):
    settled = settling.settle(_config(layout="auto"), megatron, WORK, FOUR_NODES, Monitor(speaks=False))
    assert (settled.layout, settled.tensor_parallel, settled.zero_stage) == ("stated", 8, 0)


def test_settling_checks_what_is_stated_unless_told_not_to(megatron):
    quiet, machines = Monitor(speaks=False), Machines(1, 1, 8 * 2**30)
    with pytest.raises(SetupError, match="does not fit"):
        settling.settle(_config(), megatron, WORK, machines, quiet)
    unchecked = _config(check_memory=False)
    assert settling.settle(unchecked, megatron, WORK, machines, quiet) == unchecked.parallel
    with pytest.raises(SetupError, match="do not divide into tensor-parallel groups"):
        settling.settle(_config(tensor_parallel=2), megatron, WORK, machines, quiet)


def test_ranks_of_a_host_share_the_weights_of_a_file_on_a_cpu(small):
    shared = memory_of(small, WORK, Layout(1, 4), Machines(1, 4, 2**34, device="cpu")).device
    assert shared["weights"] == -(-small.num_parameters * 4 // 4)
    own = memory_of(small, WORK, Layout(1, 4), Machines(1, 4, 2**34)).device
    assert own["weights"] == small.num_parameters * 4


# -- sizes -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "size"), [("80GiB", 80 * 2**30), ("80", 80 * 2**30), ("80 GB", 80 * 10**9), ("512mib", 2**29)]
)
def test_sizes_are_read(text, size):
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "GiB", "-1GiB", "80TB", "eighty"])
def test_what_is_no_size_is_refused(text):
    with pytest.raises(ValueError):  # noqa: PT011  the command line words it
        parse_size(text)


def test_sizes_are_written():
    assert [gibibytes(size) for size in (0, 2048, 5 * 2**20, 3 * 2**29, 200 * 2**30)] == [
        "0 B",
        "2.00 KiB",
        "5.00 MiB",
        "1.50 GiB",
        "200 GiB",
    ]


# -- kept contexts ---------------------------------------------------------------------------------------------------


def test_kept_contexts_are_counted_up_to_their_budget(small):
    """Two tensors x 4 blocks x 4 heads x 32 numbers of 4 bytes a token; and a micro-batch's of them side by side."""
    assert [small.context_token_bytes(size) for size in (1, 2)] == [4096, 2048]
    work = replace(WORK, context_tokens=1000, longest_context=50, device_contexts=2**20, host_contexts=2**30)
    side_by_side = work.evaluation_batch * 50 * 4096
    on_cpu = memory_of(small, work, Layout(), Machines(1, 1, 2**34, device="cpu"))
    assert on_cpu.device["kept contexts"] == 1000 * 4096 + side_by_side
    on_gpu = memory_of(small, work, Layout(), FOUR_NODES)
    assert on_gpu.device["kept contexts"] == 2**20 + side_by_side
    assert on_gpu.host["kept contexts"] == 1000 * 4096 - 2**20
