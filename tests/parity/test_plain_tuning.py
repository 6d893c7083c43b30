"""Tuning the LM against the same stated again in plain PyTorch: one process, transformers' own model, torch's SGD.

The statement shares no code with the package. SGD, because Adam divides by the gradient's own size: a gradient that is
zero but for rounding (a key's bias, which softmax cancels) becomes a full step, whose sign is that of the rounding.
Five steps in fp32 agree to 2e-5 of the largest entry of a tensor; with these learning rates weights move by over a
hundred times that.
"""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from ranks import run_ranks
from torch import nn

pytestmark = pytest.mark.dist

STEPS, RATE, LM_RATE, DECAY = 5, 0.3, 0.02, 0.01
SETTINGS = {"optimizer": "sgd", "learning_rate": RATE, "lm_learning_rate": LM_RATE, "weight_decay": DECAY}


def trained_here(config_path: Path, method: str, steps: int, overrides: list[str]) -> dict[str, Any]:
    """Losses, batch orders, norms, the prompt's start and end, and all weights of the LM, in a rank."""
    from megaptune.backbone.tuned_host import TunedHost
    from megaptune.backbone.weight_pieces import Pieces, Place
    from megaptune.config import load_config
    from megaptune.methods import METHODS
    from megaptune.preparation import prepare_run
    from megaptune.run.grid import build_grid
    from megaptune.run.monitor import Monitor
    from megaptune.run.stopping import StopRequest
    from megaptune.run.topology import connect, disconnect, everywhere
    from megaptune.scoring import Scorer
    from megaptune.trainer import Trainer

    config = load_config(config_path, overrides)
    prepared = prepare_run(config, Monitor(False))
    topology = connect()
    grid = build_grid(topology, config.parallel.tensor_parallel)
    device = topology.device
    host = TunedHost(prepared.backbone, config.backbone.dtype, config.parallel, grid, device, config.train)
    task = prepared.tasks[0]
    scorers = {reading: Scorer(host, task.candidates[reading]) for reading in ("vocabulary", "answers")}
    folder = config.run.directory / f"{method}-{'-'.join(overrides)}".replace("=", "")
    arguments = host, topology, task.encoded(METHODS[method]), scorers, prepared.pad_id, Monitor(False), folder
    trainer = Trainer(config, 0, "job", *arguments, StopRequest(None))
    start = trainer.prompt.weights()
    losses, orders, norms = [], [], []

    def noted(sums, table, gradient, step_norms, rates):
        norms.append(step_norms.get("lm_gradient_norm"))

    trainer.report = noted
    for step in range(steps):
        orders.append(trainer.batches.indices(step))
        sums = trainer.train_step()
        losses.append(sums.loss / sums.examples)
    file = folder / f"rank{topology.rank}.safetensors"
    file.parent.mkdir(parents=True, exist_ok=True)
    everywhere(topology, lambda: host.weights.write(file))
    pieces = Pieces(sorted(file.parent.glob("rank*.safetensors")))
    weights = {}
    for name, shape in host.shapes.items():
        place = Place(shape, None, 0, torch.Size(shape).numel())
        weights[name] = pieces.take("weight", name, place).view(shape).clone()
    answer = {"losses": losses, "orders": orders, "norms": norms, "start": start, "weights": weights}
    answer["vectors"] = trainer.prompt.vectors()
    disconnect()
    return answer


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


def trained_plainly(kind, folder, tokenizer, facts, orders, start, clip=None, candidates=None) -> dict[str, Any]:
    from transformers import AutoModelForCausalLM, AutoModelForMaskedLM

    auto = AutoModelForMaskedLM if kind == "bert" else AutoModelForCausalLM
    model = auto.from_pretrained(folder).eval()
    records = [json.loads(line) for line in facts["train"].read_text().splitlines()]
    groups = [{"params": list(model.parameters()), "lr": LM_RATE}]
    rows = None
    if start:
        rows = nn.Parameter(start["embedding.weight"].clone())
        groups.append({"params": [rows], "lr": RATE})
    optimizer = torch.optim.SGD(groups, weight_decay=DECAY)
    losses, norms = [], []
    for order in orders:
        loss = plain_loss(model, tokenizer, kind, [records[index] for index in order], rows, candidates)
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        norms.append(float(nn.utils.clip_grad_norm_(model.parameters(), clip or float("inf"))))
        if rows is not None and clip:
            nn.utils.clip_grad_norm_([rows], clip)
        optimizer.step()
    return {"losses": losses, "norms": norms, "weights": dict(model.named_parameters()), "vectors": rows}


def assert_agree(ours, plain, folder) -> None:
    from safetensors.torch import load_file

    assert ours["losses"] == pytest.approx(plain["losses"], rel=2e-5)
    assert ours["norms"] == pytest.approx(plain["norms"], rel=2e-5)
    original = load_file(folder / "model.safetensors")
    assert ours["weights"].keys() == plain["weights"].keys()
    moved = 0.0
    for name, expected in plain["weights"].items():
        largest = float(expected.detach().abs().max())
        torch.testing.assert_close(ours["weights"][name], expected.detach(), rtol=0, atol=2e-5 * max(largest, 0.1))
        if name in original:
            moved = max(moved, float((expected.detach() - original[name]).abs().max()) / largest)
    assert moved > 0.01
    if plain["vectors"] is not None:
        expected = plain["vectors"].detach()
        torch.testing.assert_close(ours["vectors"], expected, rtol=0, atol=2e-5 * float(expected.abs().max()))


# ranks, overrides. Each stage with two replicas and with two tensor-parallel ranks; both together at stage 3.
LAYOUTS = {
    "one rank, zero 1": (1, ["parallel.zero_stage=1"]),
    "dp 2, zero 1": (2, ["parallel.zero_stage=1"]),
    "dp 2, zero 2": (2, ["parallel.zero_stage=2"]),
    "dp 2, zero 3": (2, ["parallel.zero_stage=3"]),
    "tp 2, zero 1": (2, ["parallel.zero_stage=1", "parallel.tensor_parallel=2"]),
    "tp 2, zero 2": (2, ["parallel.zero_stage=2", "parallel.tensor_parallel=2"]),
    "tp 2, zero 3": (2, ["parallel.zero_stage=3", "parallel.tensor_parallel=2"]),
    "tp 2, dp 2, zero 3": (4, ["parallel.zero_stage=3", "parallel.tensor_parallel=2"]),
}


@pytest.fixture
def setting(config_file, tiny, facts, tokenizers):
    """``setting(kind)``: the configuration file, and what the plain statement needs."""

    def make(kind: str):
        train = {**SETTINGS, "schedule": "constant"}
        methods = ["finetune", "ptuning+finetune"]
        # 24 examples in batches of 7 in pieces of 3: three pieces, which two replicas do not share evenly.
        train |= {"global_batch": 7, "micro_batch": 3}
        config = config_file(kind, train=train, methods=methods, prompt={"encoder": "table"})
        return config, (kind, tiny(kind), tokenizers(kind), facts)

    return make


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("kind", ["llama", "gpt2", "bert"])
def test_prompt_and_lm_together(kind, layout, setting):
    ranks, overrides = LAYOUTS[layout]
    config, plainly = setting(kind)
    all_ranks = run_ranks(ranks, trained_here, config, "ptuning+finetune", STEPS, overrides)
    ours = all_ranks[0]
    assert all(other["losses"] == ours["losses"] for other in all_ranks)
    assert_agree(ours, trained_plainly(*plainly, ours["orders"], ours["start"]), plainly[1])
