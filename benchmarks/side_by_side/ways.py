"""The ways of computing one step of P-tuning and one evaluation, behind one face.

All start from the same encoder (two-layer bi-LSTM of half the width and an MLP) and step with torch's Adam.

B examples, T tokens, R table rows, D backbone width, V vocabulary, C candidates.
"""

import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from megaptune.backbone.description import describe_backbone
from megaptune.backbone.host import BackboneHost
from megaptune.batches import Member, collate, micro_batches
from megaptune.config import ParallelConfig, PromptConfig, SpeedConfig, TrainConfig
from megaptune.evaluation import evaluate
from megaptune.examples import Example
from megaptune.prompts.bank import Prompt, PromptBank
from megaptune.prompts.encoder import build_encoder
from megaptune.run.exact_sum import sum_exactly
from megaptune.run.grid import ProcessGrid
from megaptune.run.topology import read_environment
from megaptune.scoring import Scorer

TRAIN = TrainConfig(learning_rate=3e-4, schedule="constant")
EVERYTHING_OFF = {name: False for name, field in SpeedConfig.model_fields.items() if field.annotation is bool}


class Way(Protocol):
    """``step`` is what is timed: collating the examples, forward, backward, the optimizer's step."""

    name: str

    def step(self, members: Sequence[Example]) -> None: ...

    def evaluate(self, members: Sequence[Example], batch: int) -> Tensor:
        """Losses [B] without gradients; ranks or predictions are found as the way finds them."""

    def prepare(self, members: Sequence[Example]) -> None:
        """What is done once for all epochs over ``members``."""

    def weights(self) -> dict[str, list[Tensor]]:
        """The matrices of the ``blocks`` and of the ``head``, for counting products with them."""


def plain_model(folder: Path) -> Any:
    """The backbone as transformers loads it, frozen, fp32."""
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).requires_grad_(False)


def padded(rows: Sequence[list[int]], value: int) -> Tensor:
    """[B, T], filled up on the right."""
    return nn.utils.rnn.pad_sequence([torch.tensor(row) for row in rows], batch_first=True, padding_value=value)


class Unprepared:
    """A way that keeps nothing from one epoch to the next."""

    def prepare(self, members: Sequence[Example]) -> None:
        return


class Peft(Unprepared):
    """PEFT's P-tuning in its ordinary use: all virtual tokens in front, labels of -100 but for the answer."""

    name = "peft"

    def __init__(self, folder: Path, rows: int, pad_id: int) -> None:
        from peft import PromptEncoderConfig, TaskType, get_peft_model

        model, self.pad_id = plain_model(folder), pad_id
        settings = PromptEncoderConfig(
            task_type=TaskType.CAUSAL_LM,
            num_virtual_tokens=rows,
            encoder_reparameterization_type="LSTM",
            encoder_hidden_size=(model.config.hidden_size + 1) // 2,  # the paper's; PEFT's default is twice as wide
        )
        with warnings.catch_warnings(), torch.random.fork_rng(devices=[]):
            warnings.simplefilter("ignore")
            torch.manual_seed(0)
            self.model = get_peft_model(model, settings).train()
        trained = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        self.optimizer = torch.optim.Adam(trained, lr=TRAIN.learning_rate, weight_decay=TRAIN.weight_decay)

    def step(self, members: Sequence[Example]) -> None:
        rows = [[slot for slot in member.slots if slot >= 0] + [member.answer] for member in members]
        labels = [[-100] * (len(row) - 1) + row[-1:] for row in rows]
        output = self.model(
            input_ids=padded(rows, self.pad_id),
            attention_mask=padded([[1] * len(row) for row in rows], 0),
            labels=padded(labels, -100),
        )
        self.optimizer.zero_grad()
        output.loss.backward()
        self.optimizer.step()

    @torch.no_grad()
    def evaluate(self, members: Sequence[Example], batch: int) -> Tensor:
        self.model.eval()
        losses = []
        for start in range(0, len(members), batch):
            part = members[start : start + batch]
            rows = [[slot for slot in member.slots if slot >= 0] for member in part]
            ids, mask = padded(rows, self.pad_id), padded([[1] * len(row) for row in rows], 0)
            logits = self.model(input_ids=ids, attention_mask=mask).logits
            virtual = logits.shape[1] - ids.shape[1]
            at_answers = logits[torch.arange(len(part)), virtual + mask.sum(dim=1) - 1]
            at_answers.argmax(dim=-1)
            answers = torch.tensor([member.answer for member in part])
            losses.append(nn.functional.cross_entropy(at_answers, answers, reduction="none"))
        self.model.train()
        return torch.cat(losses)

    def weights(self) -> dict[str, list[Tensor]]:
        return _matrices(self.model.get_base_model())


class OnATable(Unprepared):
    """What steps through a table of rows and its gradient: this project, and the released way as stated here."""

    name: str

    def __init__(self, rows: int, width: int) -> None:
        self.encoder = build_encoder("lstm", rows, width, 0.0, 0)
        self.optimizer = torch.optim.Adam(self.encoder.parameters(), lr=TRAIN.learning_rate)

    def table(self) -> Tensor:
        """The rows [R, D] to train with."""
        return self.encoder()

    def apply(self, table: Tensor, gradient: Tensor) -> None:
        """One optimizer step from d loss / d ``table``."""
        self.optimizer.zero_grad()
        table.backward(gradient)
        self.optimizer.step()

    def gradient(self, members: Sequence[Example], table: Tensor) -> tuple[float, Tensor]:
        """Mean loss and its gradient with respect to ``table`` [R, D]."""
        raise AssertionError("each way has its own")

    def step(self, members: Sequence[Example]) -> None:
        table = self.table()
        _, gradient = self.gradient(members, table.detach())
        self.apply(table, gradient)


class Released(OnATable):
    """The released P-tuning code's way, stated by us: vectors written in by a Python loop, an attention mask, logits
    at every position, and a full sort of all of them to find the hits.

    ``candidates`` [C] restricts the softmax, to compare with ways that are restricted.
    """

    name = "released"

    def __init__(self, folder: Path, rows: int, pad_id: int, candidates: Tensor | None = None) -> None:
        self.model, self.pad_id, self.candidates = plain_model(folder).eval(), pad_id, candidates
        super().__init__(rows, self.model.config.hidden_size)

    def gradient(self, members: Sequence[Example], table: Tensor) -> tuple[float, Tensor]:
        leaf = table.clone().requires_grad_()
        loss = self._losses(members, leaf).mean()
        loss.backward()
        assert leaf.grad is not None
        return float(loss.detach()), leaf.grad

    @torch.no_grad()
    def evaluate(self, members: Sequence[Example], batch: int, table: Tensor | None = None) -> Tensor:
        table = self.table() if table is None else table
        parts = [members[start : start + batch] for start in range(0, len(members), batch)]
        return torch.cat([self._losses(part, table) for part in parts])

    def weights(self) -> dict[str, list[Tensor]]:
        return _matrices(self.model)

    def _losses(self, members: Sequence[Example], table: Tensor) -> Tensor:
        slots = padded([member.slots for member in members], self.pad_id)
        mask = padded([[1] * len(member.slots) for member in members], 0)
        embeds = self.model.get_input_embeddings()(slots.clamp(min=0))
        for row, column in (slots < 0).nonzero().tolist():
            embeds[row, column] = table[-1 - int(slots[row, column])]
        logits = self.model(inputs_embeds=embeds, attention_mask=mask, use_cache=False).logits
        logits.detach().argsort(dim=-1, descending=True)
        places = torch.tensor([member.answer_position for member in members])
        at_answers = logits[torch.arange(len(members)), places]
        answers = torch.tensor([member.answer for member in members])
        if self.candidates is not None:
            at_answers = at_answers[:, self.candidates]
            answers = torch.searchsorted(self.candidates, answers)
        return nn.functional.cross_entropy(at_answers, answers, reduction="none")


class Megaptune(OnATable):
    """This project: what ``Trainer.gradient`` does, with the savings that the host's ``speed`` section names.

    ``micro_batch``: examples computed together.
    """

    def __init__(
        self, name: str, host: BackboneHost, rows: int, pad_id: int, micro_batch: int, candidates: Tensor | None
    ) -> None:
        super().__init__(rows, host.width)
        self.bank = PromptBank(host.width, PromptConfig(), TRAIN, {rows: 1}, host.device, read_environment({}), False)
        self.bank.add(Prompt("prompt", rows, 0, TRAIN.learning_rate, 100))
        self.name, self.host, self.pad_id, self.micro_batch = name, host, pad_id, micro_batch
        self.candidates, self.scorer = candidates, Scorer(host, [candidates])

    def table(self) -> Tensor:
        return self.bank.table()

    def apply(self, table: Tensor, gradient: Tensor) -> None:
        self.bank.step(gradient)

    def prepare(self, members: Sequence[Example]) -> None:
        self.host.contexts = None
        self.host.keep_contexts([member.slots for member in members], [0] * len(members), None)

    def gradient(self, members: Sequence[Example], table: Tensor) -> tuple[float, Tensor]:
        leaf, gradients, total = table.clone().requires_grad_(), [], torch.zeros(1, dtype=torch.float64)
        lengths = [len(member.slots) for member in members]
        for piece in micro_batches(lengths, range(len(members)), self.micro_batch, self.host.speed.length_buckets):
            batch = collate([Member(members[index]) for index in piece], self.host, self.pad_id, Member(members[0]))
            loss = self.scorer.losses(batch, leaf)[0].sum()
            leaf.grad = None
            (loss / len(members)).backward()
            assert leaf.grad is not None
            gradients.append(leaf.grad)
            total += loss.detach().double()
        gradient, sums = sum_exactly(gradients, len(gradients), total, True, 0.0)
        return float(sums[0]) / len(members), gradient

    @torch.no_grad()
    def evaluate(self, members: Sequence[Example], batch: int, table: Tensor | None = None) -> Tensor:
        table = self.bank.vectors() if table is None else table
        chosen = [Member(member) for member in members]
        scorers = {"vocabulary": self.scorer}
        return evaluate(self.host, chosen, table, scorers, batch, self.pad_id)["vocabulary"].loss  # type: ignore[arg-type]

    def weights(self) -> dict[str, list[Tensor]]:
        return {"blocks": block_matrices(self.host.module.body), "head": [self.scorer.rows.weight]}


class Hosts:
    """One host for each set of savings; their weights are the same mapped pages."""

    def __init__(self, folder: Path) -> None:
        self.description = describe_backbone(folder, "causal")
        self.known: dict[str, BackboneHost] = {}

    def get(self, savings: Sequence[str]) -> BackboneHost:
        """A host with ``savings`` on and everything else off."""
        key = " ".join(sorted(savings))
        if key not in self.known:
            speed = SpeedConfig(**{**EVERYTHING_OFF, **dict.fromkeys(savings, True)})
            device = torch.device("cpu")
            self.known[key] = BackboneHost(self.description, "fp32", ParallelConfig(), ProcessGrid(), device, speed)
        return self.known[key]


def _matrices(model: Any) -> dict[str, list[Tensor]]:
    return {"blocks": block_matrices(model.base_model), "head": [model.get_output_embeddings().weight]}


def block_matrices(body: nn.Module) -> list[Tensor]:
    """All matrices but the embedding's."""
    embedding = body.get_input_embeddings().weight
    return [tensor for tensor in body.parameters() if tensor.dim() == 2 and tensor is not embedding]
