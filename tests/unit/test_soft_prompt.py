"""A prompt in training: encoders, the learning rate of every step, and continuing from saved state bit by bit."""

from typing import Any

import pytest
import torch
from torch import Tensor

from megaptune.config import PromptConfig, TrainConfig
from megaptune.prompts.encoder import build_encoder
from megaptune.prompts.soft_prompt import SoftPrompt

CPU = torch.device("cpu")
ROWS, WIDTH = 5, 8


def prompt(seed: int = 0, encoder: str = "lstm", dropout: float = 0.0, **train: Any) -> SoftPrompt:
    settings = TrainConfig(**{"learning_rate": 1e-2, **train})
    return SoftPrompt(ROWS, WIDTH, PromptConfig(encoder=encoder, dropout=dropout), settings, 3, seed, CPU)


def gradient_of(step: int) -> Tensor:
    return torch.randn(ROWS, WIDTH, generator=torch.Generator().manual_seed(step))


def advance(tuned: SoftPrompt, steps: int) -> None:
    for _ in range(steps):
        tuned.apply(tuned.table(), gradient_of(tuned.step))


def rates(steps: int, **train: Any) -> list[float]:
    """The learning rate of each step; an epoch is three steps."""
    tuned = prompt(**{"encoder": "table", "learning_rate": 1.0, **train})
    found = []
    for _ in range(steps):
        found.append(tuned.learning_rate())
        advance(tuned, 1)
    return found


# -- encoders --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["lstm", "mlp", "table"])
@pytest.mark.parametrize("width", [8, 7])
def test_encoder_gives_a_row_per_pseudo_token(name: str, width: int):
    table = build_encoder(name, ROWS, width, 0.0, seed=0)()
    assert table.shape == (ROWS, width)
    assert table.dtype == torch.float32


def test_lstm_encoder_has_the_papers_shape():
    """Embedding, two layers of two directions of half the width, and an MLP of two layers as wide as the backbone."""
    encoder = build_encoder("lstm", ROWS, WIDTH, 0.0, seed=0)
    shapes = {name: tuple(weight.shape) for name, weight in encoder.named_parameters()}
    half = WIDTH // 2
    assert shapes["embedding.weight"] == (ROWS, WIDTH)
    for layer in (0, 1):
        for direction in ("", "_reverse"):
            assert shapes[f"lstm.weight_ih_l{layer}{direction}"] == (4 * half, WIDTH)
            assert shapes[f"lstm.weight_hh_l{layer}{direction}"] == (4 * half, half)
    assert shapes["mlp.0.weight"] == shapes["mlp.2.weight"] == (WIDTH, WIDTH)


def test_every_row_of_the_lstm_encoder_depends_on_every_other():
    encoder = build_encoder("lstm", ROWS, WIDTH, 0.0, seed=0)
    before = encoder()
    with torch.no_grad():
        encoder.embedding.weight[2] += 1.0
    assert ((encoder() - before).abs().amax(dim=1) > 0).all()


def test_encoder_weights_depend_on_the_seed_alone():
    torch.manual_seed(11)
    first = build_encoder("lstm", ROWS, WIDTH, 0.0, seed=4)()
    torch.manual_seed(12)
    assert torch.equal(build_encoder("lstm", ROWS, WIDTH, 0.0, seed=4)(), first)
    assert not torch.equal(build_encoder("lstm", ROWS, WIDTH, 0.0, seed=5)(), first)


def test_building_an_encoder_leaves_the_global_random_state():
    state = torch.get_rng_state()
    build_encoder("lstm", ROWS, WIDTH, 0.0, seed=4)
    assert torch.equal(torch.get_rng_state(), state)


# -- schedule --------------------------------------------------------------------------------------------------------


def test_exponential_schedule_is_a_factor_per_epoch():
    assert rates(7, schedule="exponential", decay_per_epoch=0.5) == [1, 1, 1, 0.5, 0.5, 0.5, 0.25]


def test_default_schedule_is_the_papers():
    assert rates(7)[3::3] == pytest.approx([0.98, 0.98**2])


def test_constant_schedule_stays():
    assert rates(7, schedule="constant") == [1] * 7


def test_linear_schedule_falls_to_its_last_step():
    assert rates(6, schedule="linear", epochs=2) == pytest.approx([1, 5 / 6, 4 / 6, 3 / 6, 2 / 6, 1 / 6])


def test_linear_schedule_keeps_its_final_fraction():
    assert rates(6, schedule="linear", epochs=2, final_fraction=0.4)[-3:] == pytest.approx([0.5, 0.4, 0.4])


@pytest.mark.parametrize("schedule", ["constant", "linear"])
def test_warm_up_rises_in_equal_steps(schedule: str):
    found = rates(6, schedule=schedule, epochs=2, warmup_steps=4)
    assert found[:4] == pytest.approx([0.25, 0.5, 0.75, 1.0])
    assert found[4] == 1.0


# -- steps -----------------------------------------------------------------------------------------------------------


def test_sgd_step_on_a_table_is_the_textbook_one():
    tuned = prompt(encoder="table", optimizer="sgd", learning_rate=0.5, weight_decay=0.1)
    before, gradient = tuned.vectors(), gradient_of(0)
    norm = tuned.apply(tuned.table(), gradient)
    assert torch.allclose(tuned.vectors(), before - 0.5 * (gradient + 0.1 * before))
    assert norm == pytest.approx(float(gradient.norm()))


def test_adam_counts_weight_decay_into_the_gradient_as_the_paper_does():
    tuned = prompt(encoder="table", learning_rate=0.5, weight_decay=0.1)
    before = tuned.vectors()
    tuned.apply(tuned.table(), torch.zeros(ROWS, WIDTH))
    # The first Adam step has the size of the rate whatever the gradient's; decoupled decay would be 0.05 * before.
    assert torch.allclose(tuned.vectors(), before - 0.5 * before.sign(), atol=1e-4)


def test_gradient_is_clipped_only_when_asked_for():
    gradient = 100 * gradient_of(0)
    free = prompt(encoder="table", optimizer="sgd", learning_rate=1.0, weight_decay=0)
    bound = prompt(encoder="table", optimizer="sgd", learning_rate=1.0, weight_decay=0, max_gradient_norm=1.0)
    start = free.vectors()
    assert free.apply(free.table(), gradient) == bound.apply(bound.table(), gradient)
    assert torch.allclose(start - free.vectors(), gradient, rtol=1e-4)
    assert float((start - bound.vectors()).norm()) == pytest.approx(1.0, rel=1e-4)


def test_dropout_acts_in_training_and_repeats_step_by_step():
    tuned = prompt(dropout=0.5)
    assert torch.equal(tuned.table(), tuned.table())
    assert not torch.equal(tuned.table(), tuned.vectors())
    first = tuned.table()
    tuned.step += 1
    assert not torch.equal(tuned.table(), first)


def test_vectors_of_other_weights_leave_the_prompt_as_it_is():
    tuned = prompt()
    start, weights = tuned.vectors(), tuned.weights()
    advance(tuned, 2)
    now = tuned.vectors()
    assert torch.equal(tuned.vectors_of(weights), start)
    assert torch.equal(tuned.vectors(), now)
    assert not torch.equal(now, start)


def test_remembered_weights_do_not_move_with_the_encoder():
    tuned = prompt()
    weights = tuned.weights()
    before = {name: weight.clone() for name, weight in weights.items()}
    advance(tuned, 1)
    assert all(torch.equal(weights[name], before[name]) for name in before)


# -- saving ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("encoder", ["lstm", "mlp", "table"])
@pytest.mark.parametrize("optimizer", ["adam", "sgd"])
@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_loaded_prompt_continues_bit_by_bit(encoder: str, optimizer: str, dropout: float):
    settings = {"encoder": encoder, "optimizer": optimizer, "dropout": dropout}
    straight = prompt(**settings)
    advance(straight, 4)
    saved = straight.tensors()
    continued = prompt(seed=0, **settings)
    continued.load({name: tensor.clone() for name, tensor in saved.items()}, 4)
    advance(straight, 5)
    advance(continued, 5)
    assert straight.step == continued.step == 9
    assert straight.learning_rate() == continued.learning_rate()
    ends = straight.tensors(), continued.tensors()
    assert ends[0].keys() == ends[1].keys()
    assert all(torch.equal(ends[0][name], ends[1][name]) for name in ends[0])


def test_adams_moments_are_saved_under_their_parameters_names():
    tuned = prompt(encoder="table")
    assert sorted(tuned.tensors()) == ["encoder.embedding.weight"]
    advance(tuned, 1)
    assert sorted(tuned.tensors()) == [
        "encoder.embedding.weight",
        "optimizer.embedding.weight.exp_avg",
        "optimizer.embedding.weight.exp_avg_sq",
        "optimizer.embedding.weight.step",
    ]


@pytest.mark.parametrize("name", ["lstm", "mlp", "table"])
def test_encoder_gives_the_same_bits_through_deepspeeds_linear(name, monkeypatch):
    """ZeRO 3 replaces torch's linear for the whole process, the encoder's included."""
    from deepspeed.runtime.zero.linear import zero3_linear_wrap

    encoder = build_encoder(name, 6, 576, 0.0, 0)
    expected = encoder()
    monkeypatch.setattr(torch.nn.functional, "linear", zero3_linear_wrap)
    assert torch.equal(encoder(), expected)
