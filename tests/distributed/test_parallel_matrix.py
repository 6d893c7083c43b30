"""Every layout against one process on transformers' own model: tensor parallel x data parallel x ZeRO.

Tolerance: 2e-5 of the largest element, in fp32. Divided sums round differently from whole ones, by some 1e-7 a layer.
"""

import itertools

import pytest
import torch
from plain import SIZES, Trained, plainly_trained, save_model, settings, trained
from ranks import run_ranks

pytestmark = pytest.mark.dist

TOLERANCE = 2e-5
SGD = {"optimizer": "sgd", "learning_rate": 0.5, "weight_decay": 0.01, "schedule": "constant"}
LAYOUTS = list(itertools.product((1, 2), (1, 2), (0, 3)))


def assert_close(found: torch.Tensor, expected: torch.Tensor, tolerance: float = TOLERANCE) -> None:
    torch.testing.assert_close(found, expected, rtol=0, atol=tolerance * float(expected.abs().max()))


def assert_same_training(found: Trained, expected: Trained) -> None:
    assert found.losses == pytest.approx(expected.losses, rel=TOLERANCE)
    for mine, theirs in zip(found.gradients, expected.gradients, strict=True):
        assert_close(mine, theirs)
    assert_close(found.vectors, expected.vectors)


@pytest.fixture(scope="module", params=list(SIZES))
def plain(request, tmp_path_factory):
    """A family's folder, and how one process trains on it with SGD."""
    folder = save_model(request.param, tmp_path_factory.mktemp(request.param) / "model")
    return folder, plainly_trained(settings(folder, folder.parent / "run", train=SGD))


@pytest.mark.parametrize(("tensor_parallel", "replicas", "stage"), LAYOUTS)
def test_layout_trains_as_one_process_does(plain, tensor_parallel, replicas, stage, tmp_path):
    """SGD, because it carries the scale of the gradient into the vectors; Adam divides it away."""
    folder, expected = plain
    parallel = {"tensor_parallel": tensor_parallel, "zero_stage": stage}
    config = settings(folder, tmp_path / "run", train=SGD, parallel=parallel)
    results = run_ranks(tensor_parallel * replicas, trained, config)
    for found in results:
        assert_same_training(found, expected)
        assert torch.equal(found.vectors, results[0].vectors)  # no rank drifts from another


@pytest.mark.parametrize("family", list(SIZES))
def test_gradients_with_a_norm_above_one_are_not_clipped(family, tmp_path):
    """DeepSpeed clips at 1.0 unless told otherwise. One step: weights this large amplify rounding from step to step."""
    folder = save_model(family, tmp_path / "model", initializer_range=0.6, init_std=0.6)
    steep = {**SGD, "learning_rate": 0.01, "weight_decay": 0.0}
    parallel = {"tensor_parallel": 2, "zero_stage": 3}
    expected = plainly_trained(settings(folder, tmp_path / "plain", train=steep), steps=1)
    found = run_ranks(4, trained, settings(folder, tmp_path / "run", train=steep, parallel=parallel), 1)[0]
    assert expected.gradients[0].norm() > 1
    assert_close(found.gradients[0], expected.gradients[0], 1e-4)
    assert_close(found.vectors, expected.vectors)


def test_adam_agrees_within_its_own_tolerance(plain, tmp_path):
    """Adam's first steps are the sign of the gradient: where one is nearly zero, rounding decides the sign, and the
    element moves by the learning rate either way. So the vectors agree to a few learning rates, the losses to 1e-3."""
    folder, _ = plain
    adam = {"optimizer": "adam", "learning_rate": 1e-3, "weight_decay": 0.0, "schedule": "constant"}
    expected = plainly_trained(settings(folder, tmp_path / "plain", train=adam))
    config = settings(folder, tmp_path / "run", train=adam, parallel={"tensor_parallel": 2, "zero_stage": 3})
    found = run_ranks(2, trained, config)[0]
    assert found.losses == pytest.approx(expected.losses, rel=1e-3)
    torch.testing.assert_close(found.vectors, expected.vectors, rtol=0, atol=10 * 1e-3)


@pytest.mark.parametrize(
    ("family", "sizes"),
    [
        ("gpt2", {}),
        ("llama", {"num_key_value_heads": 2}),  # two ranks hold the same key-value head
        ("llama", {"num_key_value_heads": 4}),
        ("bert", {}),
    ],
)
def test_four_ranks_share_every_layer(family, sizes, tmp_path):
    folder = save_model(family, tmp_path / "model", **sizes)
    expected = plainly_trained(settings(folder, tmp_path / "plain", train=SGD))
    config = settings(folder, tmp_path / "run", train=SGD, parallel={"tensor_parallel": 4, "zero_stage": 3})
    for found in run_ranks(4, trained, config):
        assert_same_training(found, expected)


@pytest.mark.parametrize("family", ["gpt2", "llama", "bert"])
@pytest.mark.parametrize("stage", [0, 3])
def test_activation_checkpointing_changes_nothing(family, stage, tmp_path):
    folder = save_model(family, tmp_path / "model")
    parallel = {"tensor_parallel": 2, "zero_stage": stage}
    kept = run_ranks(2, trained, settings(folder, tmp_path / "kept", train=SGD, parallel=parallel))[0]
    parallel["activation_checkpointing"] = True
    again = run_ranks(2, trained, settings(folder, tmp_path / "again", train=SGD, parallel=parallel))[0]
    assert again.losses == kept.losses
    assert torch.equal(again.vectors, kept.vectors)
