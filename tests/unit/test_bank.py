"""Prompts in training: grouped encoders and steps against torch's own, learning rates, continuing bit by bit."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from megaptune.config import PromptConfig, TrainConfig
from megaptune.prompts.bank import Prompt, PromptBank
from megaptune.prompts.encoder import build_encoder
from megaptune.prompts.encoder_stack import EncoderStack
from megaptune.prompts.grouped import bilstm, linear
from megaptune.run.topology import Topology

CPU = torch.device("cpu")
ROWS, WIDTH = 5, 8


def bank_of(count: int, encoder: str = "lstm", dropout: float = 0.0, **train: Any) -> PromptBank:
    """Prompts of seeds 0, 1, ..., whose learning rates are 1, 2, ... times the configured one."""
    settings = TrainConfig(**{"learning_rate": 1e-2, **train})
    prompt = PromptConfig(encoder=encoder, dropout=dropout)
    made = PromptBank(WIDTH, prompt, settings, {ROWS: count}, CPU, Topology(), sharded=False)
    for seed in range(count):
        made.add(Prompt(f"job{seed}", ROWS, seed, settings.learning_rate * (seed + 1), 3))
    return made


def gradient_of(step: int, count: int = 1) -> Tensor:
    return torch.randn(count * ROWS, WIDTH, generator=torch.Generator().manual_seed(step))


def advance(bank: PromptBank, steps: int) -> None:
    for _ in range(steps):
        bank.table()
        bank.step(gradient_of(bank.prompts[0].step, len(bank.prompts)))


def rates(steps: int, **train: Any) -> list[float]:
    """The learning rate of each step; an epoch is three steps."""
    bank = bank_of(1, **{"encoder": "table", "learning_rate": 1.0, **train})
    found = []
    for _ in range(steps):
        found.append(bank.prompts[0].rate(bank.train))
        advance(bank, 1)
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


# -- grouped layers --------------------------------------------------------------------------------------------------


def lstm_arguments(rows: int, inputs: int = 5, hidden: int = 2) -> list[Tensor]:
    generator = torch.Generator().manual_seed(rows)
    shapes = (3, rows, inputs), (3, 2, 4 * hidden, inputs), (3, 2, 4 * hidden, hidden), *[(3, 2, 4 * hidden)] * 2
    return [torch.randn(shape, generator=generator, dtype=torch.float64).requires_grad_() for shape in shapes]


@pytest.mark.parametrize("rows", [1, 4])
def test_gradients_of_the_grouped_lstm_are_those_of_differences(rows: int):
    assert torch.autograd.gradcheck(bilstm, lstm_arguments(rows))


@pytest.mark.parametrize("rows", [1, 6])
def test_grouped_lstm_is_torchs(rows: int):
    x, *weights = lstm_arguments(rows)
    states = bilstm(x, *weights)
    for job in range(3):
        torchs = nn.LSTM(5, 2, bidirectional=True, batch_first=True).double()
        for name, stacked in zip(("weight_ih", "weight_hh", "bias_ih", "bias_hh"), weights, strict=True):
            for direction, suffix in enumerate(("", "_reverse")):
                getattr(torchs, f"{name}_l0{suffix}").data.copy_(stacked.data[job, direction])
        torch.testing.assert_close(states[job], torchs(x[job : job + 1])[0][0])


def test_gradients_of_the_grouped_linear_are_those_of_differences():
    x, weight, bias = torch.randn(3, 4, 5), torch.randn(3, 2, 5), torch.randn(3, 2)
    assert torch.autograd.gradcheck(linear, [t.double().requires_grad_() for t in (x, weight, bias)])


# -- steps -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("encoder", ["lstm", "mlp", "table"])
@pytest.mark.parametrize("optimizer", ["adam", "sgd"])
@pytest.mark.parametrize("limit", [None, 1.0])
def test_every_prompt_steps_as_under_torchs_own_optimizer(encoder: str, optimizer: str, limit: float | None):
    """Six prompts, which is more than a chunk, at six rates, against modules of torch one by one."""
    count, settings = 6, {"optimizer": optimizer, "weight_decay": 0.1, "max_gradient_norm": limit}
    bank = bank_of(count, encoder, schedule="constant", **settings)
    modules = [build_encoder(encoder, ROWS, WIDTH, 0.0, seed) for seed in range(count)]
    kind = {"adam": torch.optim.Adam, "sgd": torch.optim.SGD}[optimizer]
    optimizers = [
        kind(module.parameters(), lr=1e-2 * (seed + 1), weight_decay=0.1) for seed, module in enumerate(modules)
    ]
    for step in range(4):
        gradient = 3 * gradient_of(step, count)
        table = bank.table()
        norms = bank.step(gradient)
        for prompt, module, steps in zip(bank.prompts, modules, optimizers, strict=True):
            rows = module()
            torch.testing.assert_close(table[prompt.span], rows.detach(), rtol=1e-5, atol=1e-6)
            steps.zero_grad()
            rows.backward(gradient[prompt.span])
            norm = nn.utils.clip_grad_norm_(module.parameters(), limit or float("inf"))
            assert norms[prompt.name] == pytest.approx(float(norm), rel=1e-4)
            steps.step()
    for prompt, module in zip(bank.prompts, modules, strict=True):
        torch.testing.assert_close(bank.vectors()[prompt.span], module().detach(), rtol=1e-4, atol=1e-5)


def test_threads_and_neighbours_do_not_change_a_bit():
    """Of a width that threads share: a prompt alone in one thread, and with six others in two."""
    settings, found, threads = TrainConfig(), [], torch.get_num_threads()
    for count, used in ((7, 2), (1, 1)):
        torch.set_num_threads(used)
        bank = PromptBank(192, PromptConfig(), settings, {ROWS: count}, CPU, Topology(), sharded=False)
        for seed in range(count):
            bank.add(Prompt(f"job{seed}", ROWS, seed, 1e-2, 3))
        for step in range(2):
            table = bank.table()
            bank.step(torch.sin(table * (step + 2)))
        found.append(bank.vectors()[:ROWS])
    torch.set_num_threads(threads)
    assert torch.equal(*found)


def test_a_prompt_that_leaves_does_not_disturb_the_others():
    whole, rest = bank_of(3), bank_of(3)
    advance(whole, 1)
    advance(rest, 1)
    rest.remove(rest.prompts[0])
    kept = gradient_of(7, 3)
    whole.table()
    whole.step(kept)
    rest.table()
    rest.step(kept[ROWS:])
    assert torch.equal(rest.vectors(), whole.vectors()[ROWS:])
    rest.add(Prompt("new", ROWS, 9, 1e-2, 3))
    torch.testing.assert_close(rest.vectors()[-ROWS:], build_encoder("lstm", ROWS, WIDTH, 0.0, 9)().detach())


def test_dropout_acts_in_training_and_repeats_step_by_step():
    bank = bank_of(2, dropout=0.5)
    first = bank.table()
    assert torch.equal(bank.table(), first)
    assert not torch.equal(first, bank.vectors())
    bank.prompts[1].step += 1
    later = bank.table()
    assert torch.equal(later[:ROWS], first[:ROWS])
    assert not torch.equal(later[ROWS:], first[ROWS:])


def test_best_vectors_are_those_that_were_kept():
    bank = bank_of(2)
    advance(bank, 1)
    bank.keep_best(bank.prompts[1])
    kept = bank.vectors()
    advance(bank, 2)
    now = bank.vectors()
    torch.testing.assert_close(bank.best_vectors(bank.prompts[1]), kept[ROWS:], rtol=0, atol=0)
    assert torch.equal(bank.vectors(), now)
    assert not torch.equal(now, kept)


# -- saving ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("encoder", ["lstm", "mlp", "table"])
@pytest.mark.parametrize("optimizer", ["adam", "sgd"])
@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_loaded_prompts_continue_bit_by_bit(encoder: str, optimizer: str, dropout: float):
    settings = {"encoder": encoder, "optimizer": optimizer, "dropout": dropout if encoder == "lstm" else 0.0}
    straight, continued = bank_of(2, **settings), bank_of(2, **settings)
    advance(straight, 4)
    for source, target in zip(straight.prompts, continued.prompts, strict=True):
        continued.load(target, {name: t.clone() for name, t in straight.tensors(source).items()}, 4)
    advance(straight, 5)
    advance(continued, 5)
    for source, target in zip(straight.prompts, continued.prompts, strict=True):
        ours, theirs = continued.tensors(target), straight.tensors(source)
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_adams_moments_are_saved_under_their_parameters_names():
    bank = bank_of(1, encoder="table")
    names = ["best.embedding.weight", "encoder.embedding.weight"]
    names += ["optimizer.embedding.weight.exp_avg", "optimizer.embedding.weight.exp_avg_sq"]
    assert sorted(bank.tensors(bank.prompts[0])) == names


@pytest.mark.parametrize("rows", [1, 2, 6])
@pytest.mark.parametrize("encoder", ["lstm", "mlp"])
def test_an_encoder_alone_is_bit_by_bit_the_one_in_company(encoder: str, rows: int):
    """Over three steps, at a width where torch has a kernel of its own for a matrix and a vector."""
    made = []
    for count in (1, 2, 3):
        stack = EncoderStack(rows, 32, PromptConfig(encoder=encoder), TrainConfig(), count, CPU)
        for _ in range(count):
            stack.add(4)
        for step in range(3):
            stack.table([0] * count)
            gradient = torch.randn(rows, 32, generator=torch.Generator().manual_seed(step))
            stack.step(torch.stack([gradient] * count), [0.1] * count, [step] * count)
        made.append(stack.table(None))
    assert all(torch.equal(found[place], made[0][0]) for found in made for place in range(len(found)))


def test_prompts_of_several_kinds_train_side_by_side():
    """Each as it would alone: an LSTM, plain vectors of the same number of rows, and a head."""
    kinds = (None, "table", "head")
    shapes = [Prompt("", ROWS, 0, 0.1, 3, kind).shape for kind in kinds]

    def trained(chosen: tuple[str | None, ...]) -> dict[str | None, Tensor]:
        bank = PromptBank(
            WIDTH, PromptConfig(), TrainConfig(), dict.fromkeys(shapes, 1), CPU, Topology(), sharded=False
        )
        prompts = {kind: Prompt(f"{kind}", ROWS, 3, 0.1, 3, kind) for kind in chosen}
        for prompt in prompts.values():
            bank.add(prompt)
        for step in range(2):
            bank.table()
            bank.step(gradient_of(step).repeat(len(chosen), 1))
            for prompt in prompts.values():
                bank.keep_best(prompt)
        vectors = bank.vectors()
        for prompt in prompts.values():
            assert torch.equal(bank.best_vectors(prompt), vectors[prompt.span])
        return {kind: vectors[prompt.span] for kind, prompt in prompts.items()}

    together = trained(kinds)
    for kind in kinds:
        assert torch.equal(together[kind], trained((kind,))[kind])
    assert together["head"].abs().max() < 0.5 < together["table"].abs().max()  # a head starts near nothing
