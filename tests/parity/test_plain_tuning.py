"""Tuning the LM against the same stated again in plain PyTorch: one process, transformers' own model, torch's SGD.

The statement shares no code with the package. SGD, because Adam divides by the gradient's own size: a gradient that is
zero but for rounding (a key's bias, which softmax cancels) becomes a full step, whose sign is that of the rounding.
Five steps in fp32 agree to 2e-5 of the largest entry of a tensor; with these learning rates weights move by over a
hundred times that.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from ranks import run_ranks
from torch import nn

pytestmark = pytest.mark.dist

STEPS, RATE, LM_RATE, DECAY, CLIP = 5, 0.3, 0.02, 0.01, 0.5
SETTINGS = {"optimizer": "sgd", "learning_rate": RATE, "lm_learning_rate": LM_RATE, "weight_decay": DECAY}
# 24 examples in batches of 7 in pieces of 3: three pieces, which two replicas do not share evenly.
SETTINGS |= {"schedule": "constant", "global_batch": 7, "micro_batch": 3}
ADAM = ("train.optimizer=adam", "train.learning_rate=1e-3", "train.lm_learning_rate=1e-3")


@dataclass(frozen=True)
class Case:
    """A method under a layout, with more overrides of the configuration."""

    stage: int
    method: str = "ptuning+finetune"
    clip: float | None = None
    over: str = "vocabulary"
    more: tuple[str, ...] = ()

    def overrides(self, tensor_parallel: int) -> list[str]:
        clip = [f"train.max_gradient_norm={self.clip}"] if self.clip else []
        layout = [f"parallel.zero_stage={self.stage}", f"parallel.tensor_parallel={tensor_parallel}"]
        return [*layout, f"scoring.train_over={self.over}", *clip, *self.more]


def trained_here(config_path: Path, cases: list[Case], tensor_parallel: int) -> list[dict[str, Any]]:
    """In a rank, one case after the other."""
    from megaptune.run.grid import build_grid
    from megaptune.run.topology import connect, disconnect

    topology = connect()
    grid = build_grid(topology, tensor_parallel)
    answers = [_train(config_path, case, case.overrides(tensor_parallel), topology, grid) for case in cases]
    disconnect()
    return answers


def _train(config_path: Path, case: Case, overrides: list[str], topology: Any, grid: Any) -> dict[str, Any]:
    """Losses, batch orders, norms, the prompt's start and end, and all weights of the LM."""
    from hosting import training

    from megaptune.backbone.tuned_host import TunedHost
    from megaptune.backbone.weight_pieces import Pieces, Place
    from megaptune.config import load_config
    from megaptune.methods import METHODS
    from megaptune.preparation import prepare_run
    from megaptune.run.monitor import Monitor
    from megaptune.run.topology import everywhere

    config = load_config(config_path, [*overrides, f"methods=[{case.method}]"])
    prepared = prepare_run(config, Monitor(False))
    device = topology.device
    host = TunedHost(prepared.backbone, config.backbone.dtype, config.parallel, grid, device, config.train)
    task = prepared.tasks[0]
    answers = {"answers": task.candidates["answers"]}
    trainer = training(config, host, topology, task.encoded(METHODS[case.method]), **answers)
    folder = config.run.directory / str(abs(hash(case)))
    job = trainer.active[0]
    start = {name: weight.clone() for name, weight in job.prompt.best.items()}
    losses, orders, norms = [], [], []

    def noted(step, active, sums, table, gradient, rates, encoders, tuned):
        norms.append(tuned[1])
        losses.append(sums.loss[0] / sums.examples[0])

    trainer.report.step = noted
    for step in range(STEPS):
        orders.append(job.plan.indices(step))
        trainer.train_step()
    file = folder / f"rank{topology.rank}.safetensors"
    file.parent.mkdir(parents=True, exist_ok=True)
    everywhere(topology, lambda: host.weights.write(file))
    pieces = Pieces(sorted(file.parent.glob("rank*.safetensors")))
    weights = {}
    for name, shape in host.shapes.items():
        place = Place(shape, None, 0, torch.Size(shape).numel())
        weights[name] = pieces.take("weight", name, place).view(shape).clone()
    answer = {"losses": losses, "orders": orders, "norms": norms, "start": start, "weights": weights}
    return {**answer, "vectors": trainer.bank.vectors()}


def plain_loss(model, tokenizer, kind, facts, prompts, candidates):
    """Mean loss with ``[P*2] {city} [P] [answer] .`` (without prompts: ``{city} [answer] .``); causal: cut there."""
    embed = model.get_input_embeddings()
    pieces, answers, places = [], [], []
    for fact in facts:
        anchor = "" if kind == "bert" or prompts is None else " "
        city = tokenizer(anchor + fact["city"], add_special_tokens=False)["input_ids"]
        word = fact["country"] if kind == "bert" else " " + fact["country"]
        (answer,) = tokenizer(word, add_special_tokens=False)["input_ids"]
        before = {"llama": [tokenizer.bos_token_id], "gpt2": []}.get(kind, [tokenizer.cls_token_id])
        parts = [embed(torch.tensor(before, dtype=torch.long)), embed(torch.tensor(city))]
        if prompts is not None:
            parts = [parts[0], prompts[:2], parts[1], prompts[2:]]
        if kind == "bert":
            places.append(sum(len(part) for part in parts))
            (stop,) = tokenizer(".", add_special_tokens=False)["input_ids"]
            parts.append(embed(torch.tensor([tokenizer.mask_token_id, stop, tokenizer.sep_token_id])))
        else:
            places.append(sum(len(part) for part in parts) - 1)
        pieces.append(torch.cat(parts))
        answers.append(answer)
    lengths = torch.tensor([len(piece) for piece in pieces])
    padded = nn.utils.rnn.pad_sequence(pieces, batch_first=True)
    mask = torch.arange(padded.shape[1]) < lengths[:, None]
    logits = model(inputs_embeds=padded, attention_mask=mask.long()).logits
    at_answers = logits[torch.arange(len(facts)), torch.tensor(places)]
    labels = torch.tensor(answers)
    if candidates is not None:
        at_answers, labels = at_answers[:, candidates], torch.searchsorted(candidates, labels)
    return nn.functional.cross_entropy(at_answers, labels)


def trained_plainly(kind, folder, tokenizer, facts, case: Case, orders, start) -> dict[str, Any]:
    from transformers import AutoModelForCausalLM, AutoModelForMaskedLM

    auto = AutoModelForMaskedLM if kind == "bert" else AutoModelForCausalLM
    model = auto.from_pretrained(folder).eval()
    records = [json.loads(line) for line in facts["train"].read_text().splitlines()]
    groups = [{"params": list(model.parameters()), "lr": LM_RATE}]
    rows = None
    if start:
        rows = nn.Parameter(start["embedding.weight"].clone())
        groups.append({"params": [rows], "lr": RATE})
    optimizer: Any = torch.optim.SGD(groups, weight_decay=DECAY)
    if case.more == ADAM:
        groups = [{**group, "lr": 1e-3} for group in groups]
        optimizer = torch.optim.Adam(groups, weight_decay=DECAY)
    candidates = None
    if case.over == "answers":
        words = sorted({record["country"] for record in records})
        ids = [
            tokenizer(word if kind == "bert" else f" {word}", add_special_tokens=False)["input_ids"] for word in words
        ]
        candidates = torch.tensor(sorted(token for (token,) in ids))
    losses, norms = [], []
    for order in orders:
        loss = plain_loss(model, tokenizer, kind, [records[index] for index in order], rows, candidates)
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        norms.append(float(nn.utils.clip_grad_norm_(model.parameters(), case.clip or float("inf"))))
        if rows is not None and case.clip:
            nn.utils.clip_grad_norm_([rows], case.clip)
        optimizer.step()
    return {"losses": losses, "norms": norms, "weights": dict(model.named_parameters()), "vectors": rows}


def assert_agree(ours, plain, folder, tolerance: float = 2e-5) -> None:
    from safetensors.torch import load_file

    assert ours["losses"] == pytest.approx(plain["losses"], rel=tolerance)
    assert ours["norms"] == pytest.approx(plain["norms"], rel=tolerance)
    original = load_file(folder / "model.safetensors")
    assert ours["weights"].keys() == plain["weights"].keys()
    moved = 0.0
    for name, expected in plain["weights"].items():
        largest = float(expected.detach().abs().max())
        torch.testing.assert_close(ours["weights"][name], expected.detach(), rtol=0, atol=tolerance * max(largest, 0.1))
        if name in original:
            moved = max(moved, float((expected.detach() - original[name]).abs().max()) / largest)
    assert moved > 0.002
    if plain["vectors"] is not None:
        expected = plain["vectors"].detach()
        torch.testing.assert_close(ours["vectors"], expected, rtol=0, atol=tolerance * float(expected.abs().max()))


CASES = {
    # Ranks, tensor-parallel size, what they train one after the other.
    "one rank": (1, 1, [Case(0), Case(3, "finetune", over="answers")]),
    "two replicas": (2, 1, [Case(1), Case(2, clip=CLIP), Case(3), Case(2, "finetune", over="answers")]),
    "two shards": (2, 2, [Case(1, clip=CLIP), Case(2), Case(3, clip=CLIP), Case(3, "finetune", over="answers")]),
    "two by two": (4, 2, [Case(3), Case(3, more=("parallel.activation_checkpointing=true",)), Case(2, clip=CLIP)]),
}


@pytest.fixture
def compare(config_file, tiny, facts, tokenizers):
    """``compare(kind, ranks, tensor_parallel, cases)``: both ways, case by case."""

    def run(kind: str, ranks: int, tensor_parallel: int, cases: list[Case]) -> list[tuple[dict, dict]]:
        methods = ["finetune", "ptuning+finetune"]
        config = config_file(kind, train=SETTINGS, methods=methods, prompt={"encoder": "table"})
        by_rank = run_ranks(ranks, trained_here, config, cases, tensor_parallel)
        pairs = []
        for case, *ours in zip(cases, *by_rank, strict=True):
            assert all(other["losses"] == ours[0]["losses"] for other in ours)
            plain = trained_plainly(
                kind, tiny(kind), tokenizers(kind), facts, case, ours[0]["orders"], ours[0]["start"]
            )
            pairs.append((ours[0], plain))
        return pairs

    return run


@pytest.mark.parametrize(
    ("kind", "layout"),
    [
        *(("llama", layout) for layout in CASES),
        *(("gpt2", layout) for layout in ("two replicas", "two by two")),
        *(("bert", layout) for layout in ("two replicas", "two shards")),
    ],
)
def test_sgd_gives_the_same_losses_weights_and_prompts(kind, layout, compare, tiny):
    unclipped = []
    for case, (ours, plain) in zip(CASES[layout][2], compare(kind, *CASES[layout]), strict=True):
        assert_agree(ours, plain, tiny(kind))
        unclipped += [] if case.clip else plain["norms"]
        assert not case.clip or min(plain["norms"]) > case.clip
    assert max(unclipped) > 1  # which DeepSpeed would clip, untold


def test_adam_gives_the_same_losses(compare):
    """Weights whose gradient is zero but for rounding go their own way, by up to the learning rate a step; the losses,
    which do not depend on those, agree to 1e-4."""
    for ours, plain in compare("llama", 2, 2, [Case(1, more=ADAM), Case(3, more=ADAM)]):
        assert ours["losses"] == pytest.approx(plain["losses"], rel=1e-4)
        assert ours["losses"][-1] < ours["losses"][0]


def test_bf16_keeps_fp32_weights_and_follows_fp32(compare, tiny):
    """bf16 has 8 bits of mantissa. The fp32 weights hold updates that bf16 would round away."""
    from safetensors.torch import load_file

    bf16 = ("backbone.dtype=bf16",)
    start = load_file(tiny("llama") / "model.safetensors")
    for ours, plain in compare("llama", 2, 1, [Case(1, more=bf16), Case(3, more=bf16)]):
        assert ours["losses"] == pytest.approx(plain["losses"], rel=0.02)
        for name in ("model.layers.0.mlp.up_proj.weight", "model.embed_tokens.weight"):
            rounded = start[name].bfloat16().float()
            moved, expected = ours["weights"][name] - rounded, plain["weights"][name].detach() - start[name]
            assert torch.cosine_similarity(moved.flatten(), expected.flatten(), dim=0) > 0.99
            assert not torch.equal(ours["weights"][name].bfloat16().float(), ours["weights"][name])


def _refusal(config_path: Path) -> str:
    from megaptune.errors import BackboneError

    try:
        trained_here(config_path, [Case(1)], 4)
    except BackboneError as error:
        return str(error)
    return "no error"


def test_shared_key_value_heads_are_refused(config_file):
    """Four ranks would share llama's two heads; each would have a part of their gradient only."""
    config = config_file("llama", methods=["ptuning+finetune"])
    for message in run_ranks(4, _refusal, config):
        assert "2 key-value heads" in message
        assert "parallel.tensor_parallel" in message
