"""P-tuning as plainly as it can be said, on transformers' own model, to hold every layout against; and examples for it.

Nothing here is divided, saved or restricted: whole model, all logits, cross-entropy, torch's optimizer.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForMaskedLM

from megaptune.config import Config, validate
from megaptune.examples import EncodedTask, Example
from megaptune.prompts.encoder import build_encoder
from megaptune.prompts.template import Template
from megaptune.tasks.records import Record

ROWS, VOCABULARY, STEPS, BATCH = 3, 121, 5, 8  # an odd vocabulary: no number of ranks divides it

SIZES: dict[str, dict[str, Any]] = {
    "gpt2": {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64},
    "llama": {"num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 64},
    "gpt_neox": {"num_attention_heads": 4, "intermediate_size": 64},
    "opt": {"num_attention_heads": 4, "ffn_dim": 64, "word_embed_proj_dim": 32},
    "xglm": {"d_model": 32, "num_layers": 2, "attention_heads": 4, "ffn_dim": 64},
    "bert": {"num_attention_heads": 4, "intermediate_size": 64},
}
_COMMON = {"hidden_size": 32, "num_hidden_layers": 2, "vocab_size": VOCABULARY, "max_position_embeddings": 64}
_IDS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}


def save_model(family: str, folder: Path, **sizes: Any) -> Path:
    """A random model whose weights, biases and norms included, are far enough from nothing to tell layouts apart."""
    config = AutoConfig.for_model(family, **{**_COMMON, **_IDS, **SIZES.get(family, {}), **sizes})
    torch.manual_seed(0)
    auto = AutoModelForMaskedLM if family in ("bert", "roberta") else AutoModelForCausalLM
    model = auto.from_config(config)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
    model.save_pretrained(folder)
    return folder


def examples(masked: bool, count: int = 20) -> list[Example]:
    """Inputs of 5 to 12 slots with three pseudo tokens; for a masked model something follows the answer's place."""
    generator = torch.Generator().manual_seed(2)
    found = []
    for number in range(count):
        length = 5 + number % 8
        slots = torch.randint(3, VOCABULARY, (length,), generator=generator).tolist()
        slots[0], slots[2], slots[-2] = -1, -2, -3
        answer = int(torch.randint(3, VOCABULARY, (1,), generator=generator))
        place = length - 2 if masked else length - 1
        found.append(Example(slots, place, answer, Record(f"subject {number}", f"answer {number}", {}, "")))
    return found


def settings(folder: Path, run: Path, **sections: Any) -> Config:
    """A configuration for :func:`trained`; its task is never read."""
    raw = {
        "run": {"directory": str(run)},
        "backbone": {"path": str(folder)},
        "task": {"type": "custom", "test": "none", "train": "none", "dev": "none", "answer": "answer"},
        "methods": ["ptuning"],
        "monitor": {"tensorboard": False},
        "train": {"global_batch": BATCH, "micro_batch": 2, "epochs": 3, **sections.pop("train", {})},
        **sections,
    }
    return validate(raw, "test")


@dataclass(frozen=True)
class Trained:
    """Per step: loss and gradient of the table [R, D]; at the end: the vectors [R, D]."""

    losses: list[float]
    gradients: list[Tensor]
    vectors: Tensor


def plainly_trained(config: Config, steps: int = STEPS) -> Trained:
    """One process, the whole model."""
    from megaptune.batches import EpochPlan

    folder, train = config.backbone.path, config.train
    masked = AutoConfig.from_pretrained(folder).model_type == "bert"
    auto = AutoModelForMaskedLM if masked else AutoModelForCausalLM
    model = auto.from_pretrained(folder).eval().requires_grad_(False)
    data = examples(masked)
    encoder = build_encoder("lstm", ROWS, model.get_input_embeddings().weight.shape[1], 0.0, 0)
    optimizer = {"sgd": torch.optim.SGD, "adam": torch.optim.Adam}[train.optimizer](
        encoder.parameters(), lr=train.learning_rate, weight_decay=train.weight_decay
    )
    plan = EpochPlan(len(data), train.global_batch, train.drop_last, 0)
    losses, gradients = [], []
    for step in range(steps):
        table = encoder()
        loss = plain_loss(model, [data[index] for index in plan.indices(step)], table, masked)
        gradients.append(torch.autograd.grad(loss, table, retain_graph=True)[0])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    return Trained(losses, gradients, encoder().detach())


def plain_loss(model: nn.Module, members: list[Example], table: Tensor, masked: bool) -> Tensor:
    """Mean cross-entropy at the answers, over the whole vocabulary."""
    embedding = model.get_input_embeddings()
    scale = float(getattr(embedding, "embed_scale", 1.0) or 1.0)
    length = max(len(member.slots) for member in members)
    rows, mask = [], torch.zeros(len(members), length, dtype=torch.long)
    for number, member in enumerate(members):
        pieces = [table[-1 - s] * scale if s < 0 else embedding(torch.tensor(s)) for s in member.slots]
        pieces += [embedding(torch.tensor(0))] * (length - len(pieces))
        mask[number, : len(member.slots)] = 1
        rows.append(torch.stack(pieces))
    logits = model(inputs_embeds=torch.stack(rows), attention_mask=mask).logits
    at_answers = logits[torch.arange(len(members)), torch.tensor([member.answer_position for member in members])]
    return nn.functional.cross_entropy(at_answers, torch.tensor([member.answer for member in members]))


def trained(config: Config, steps: int = STEPS) -> Trained:
    """The same by megaptune, in a rank of ``run_ranks``, under the configuration's layout."""
    import os

    from hosting import open_host

    from megaptune.run.directory import RunDirectory
    from megaptune.run.monitor import Monitor
    from megaptune.run.stopping import StopRequest
    from megaptune.run.topology import disconnect, read_environment
    from megaptune.scoring import Scorer
    from megaptune.trainer import Trainer

    parallel = {key: value for key, value in config.parallel.model_dump().items() if key != "layout"}
    host = open_host(Path(config.backbone.path), config.backbone.dtype, **parallel)
    data = examples(host.kind == "masked")
    template = Template("[P] [P] [P] [answer]", host.kind)
    task = EncodedTask(template, data, data[:2], data[:2])
    folder = RunDirectory(config.run.directory).job("t", "ptuning", 0)
    scorers = {"vocabulary": Scorer(host, None)}
    topology = read_environment(os.environ)
    trainer = Trainer(config, 0, "job", host, topology, task, scorers, 0, Monitor(False), folder, StopRequest(None))
    losses, gradients = [], []
    for step in range(steps):
        gradients.append(trainer.gradient(trainer.batches.indices(step), trainer.prompt.vectors())[0])
        sums = trainer.train_step()
        losses.append(sums.loss / sums.examples)
    vectors = trainer.prompt.vectors()
    disconnect()
    return Trained(losses, gradients, vectors)
