"""What decides a run's memory and traffic besides the layout: the backbone's shapes, and the sizes of a step."""

import copy
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

from megaptune.backbone.architectures import FAMILIES, shard_plan
from megaptune.backbone.context_cache import worth_keeping
from megaptune.backbone.deep_prompts import DeepPrompts
from megaptune.backbone.description import Kind, read_config
from megaptune.backbone.loading import build_on_meta
from megaptune.config import Config, DeepConfig, Reading
from megaptune.methods import METHODS
from megaptune.planning.activations import Activations, trace
from megaptune.preparation import PreparedRun
from megaptune.prompts.encoder import build_encoder
from megaptune.prompts.template import Template, Text
from megaptune.superglue_config import SuperGlueTask
from megaptune.superglue_examples import EncodedOptions
from megaptune.tasks.records import Record

LAMA_RELATIONS = 41  # of T-REx
TRACED_BLOCKS = 2  # the first has what all share, the second stands for the others


@dataclass(frozen=True)
class Workload:
    """A step's sizes. tokens: the longest training input; candidates: rows of each reading's set, None for all of the
    vocabulary; basis: where lengths and counts are from, for the reader. jobs: prompts that
    train together, whose ``global_batch`` is that of all of them; sharded: whether ranks own them in turn, None for
    several ranks and jobs. context_tokens, longest_context: of what precedes the prompts of training and dev inputs,
    whose keys and values are kept in at most device_contexts + host_contexts bytes. deep: of deep prompts, if some are
    trained; sequences: of an example at most that read one, its choices and what they share."""

    global_batch: int
    micro_batch: int
    tokens: int
    evaluation_batch: int
    evaluation_tokens: int
    prompt_rows: int
    encoder: str
    optimizer: str
    train_over: Reading
    candidates: dict[Reading, int | None]
    tuned: bool
    basis: str
    jobs: int = 1
    sharded: bool | None = None
    context_tokens: int = 0
    longest_context: int = 0
    device_contexts: int = 0
    host_contexts: int = 0
    deep: DeepConfig | None = None
    sequences: int = 1

    @property
    def pieces(self) -> int:
        """Micro-batches of a global batch."""
        return -(-self.global_batch // self.micro_batch)

    def is_sharded(self, world_size: int) -> bool:
        """Whether ranks own the encoders in turn."""
        wanted = self.jobs > 1 if self.sharded is None else self.sharded
        return wanted and world_size > 1 and not self.tuned

    @classmethod
    def assumed(cls, config: Config, kind: Kind, tokens: int, basis: str, words: int = 0) -> "Workload":
        """Without the data: inputs of ``tokens`` tokens, ``words`` single-token words in the word list."""
        counts: dict[Reading, int | None] = {"answers": 500, "word_list": words, "vocabulary": None}
        counts |= dict.fromkeys(getattr(config.task, "word_lists", ()), words)
        if isinstance(config.task, SuperGlueTask):
            patterns = [pattern for name in config.tasks for pattern in config.patterns[name].ptuning.values()]
            texts = [pattern.text for pattern in patterns if kind in pattern.families]
        else:
            texts = config.templates
        rows = max((Template(text, kind).num_pseudo_tokens for text in texts), default=0)
        relations = getattr(config.task, "relations", [""])
        tasks = len(config.tasks) or (LAMA_RELATIONS if relations == "all" else len(relations))
        return cls._of(config, rows, tokens, tokens, counts, basis, tasks)

    @classmethod
    def prepared(cls, run: PreparedRun) -> "Workload":
        """From a run's own data, its longest inputs and largest candidate sets."""
        tasks = [encoded for prepared in run.tasks for encoded in prepared.prompts]
        train = [example.length for task in tasks for example in task.train]
        labelled = [example.length for task in tasks if isinstance(task, EncodedOptions) for example in task.to_label]
        train += labelled  # PET trains on them too
        other = labelled + [example.length for task in tasks for example in (*task.dev, *task.test)]
        counts: dict[Reading, int | None] = {"vocabulary": None}
        for prepared in run.tasks:
            for reading, ids in prepared.candidates.items():
                if ids is not None:
                    counts[reading] = max(counts.get(reading) or 0, len(ids))
        rows = max(task.rows for task in tasks)
        found = cls._of(
            run.config, rows, max(train or other), max(other), counts, "the data's longest inputs", len(run.tasks)
        )
        choices = max(len(example.inputs) for task in tasks for example in (*task.train, *task.dev, *task.test))
        found = replace(found, sequences=choices + (choices > 1))
        speed = run.config.speed
        if found.tuned or run.backbone.kind == "masked" or not speed.context_cache:
            return found
        contexts: set[tuple[int, ...]] = set()
        for number, prepared in enumerate(run.tasks):
            for task in prepared.swept.values():
                slots = [e.inputs[0] for e in (*task.train, *task.dev) if len(e.inputs) == 1]
                contexts.update(worth_keeping(slots, [number] * len(slots)))
        lengths = [len(context) for context in contexts]
        return replace(
            found,
            context_tokens=sum(lengths),
            longest_context=max(lengths, default=0),
            device_contexts=int(speed.context_device_gib * 2**30),
            host_contexts=int(speed.context_host_gib * 2**30),
        )

    @classmethod
    def _of(
        cls,
        config: Config,
        rows: int,
        tokens: int,
        evaluated: int,
        counts: dict[Reading, int | None],
        basis: str,
        tasks: int,
    ) -> "Workload":
        train = config.train
        jobs = config.jobs_at_once(tasks)
        wanted = {*config.scoring.evaluate_over, config.scoring.train_over}
        return cls(
            global_batch=train.global_batch * jobs,
            micro_batch=min(train.micro_batch, train.global_batch * jobs),
            tokens=tokens,
            evaluation_batch=config.evaluation.batch,
            evaluation_tokens=evaluated,
            prompt_rows=rows,
            encoder=largest_encoder(config),
            deep=config.prompt.deep if config.deep else None,
            optimizer=train.optimizer,
            train_over=config.scoring.train_over,
            candidates={reading: count for reading, count in counts.items() if reading in wanted},
            tuned=config.tunes_lm,
            basis=basis,
            jobs=jobs,
            sharded=None if config.jobs.shard_encoders == "auto" else config.jobs.shard_encoders,
        )


@dataclass(frozen=True)
class Tensor:
    """A parameter as one tensor-parallel rank holds it."""

    name: str
    elements: int
    itemsize: int


class Shapes:
    """A backbone's shapes, from its config.json alone. ``drawn``: its weights are not those of its files."""

    def __init__(self, folder: Path, kind: Kind, dtype: str, drawn: bool = False) -> None:
        self.folder, self.kind, self.dtype = folder, kind, dtype
        stored = str(getattr(read_config(folder), "dtype", None) or "float32").removeprefix("torch.")
        # Whether files hold what memory holds.
        self.mapped = not drawn and stored == {"fp32": "float32", "bf16": "bfloat16"}[dtype]
        self.model, self.config = build_on_meta(folder, kind, dtype)
        self.family: str = self.config.model_type
        embedding = self.model.get_input_embeddings().weight
        self.vocabulary_size, self.width = embedding.shape
        self.itemsize: int = embedding.itemsize
        self.tied = self.model.get_output_embeddings().weight is embedding
        self.num_parameters = sum(parameter.numel() for parameter in self.model.parameters())
        self.blocks = len(self._blocks(self.model)) if self.family in FAMILIES else 0
        self.deep = DeepPrompts.of(self.config) if self.family in FAMILIES else None
        self.buffer_bytes = sum(buffer.numel() * buffer.itemsize for buffer in self.model.buffers())

    @lru_cache(maxsize=64)  # noqa: B019  as long as the shapes themselves
    def tensors(self, shard: int, shards: int) -> tuple[Tensor, ...]:
        """The parameters of one tensor-parallel rank.

        :raises BackboneError: when the model cannot be divided so.
        """
        plan = shard_plan(self.model, self.config, shard, shards)
        found = []
        for name, parameter in self.model.named_parameters():
            shape = tuple(parameter.shape)
            elements = torch.Size(plan[name].shape(shape) if name in plan else shape).numel()
            found.append(Tensor(name, elements, parameter.itemsize))
        return tuple(found)

    def context_token_bytes(self, shards: int) -> int:
        """Keys and values of one token on a rank; 0 for a family whose contexts are not kept."""
        if self.deep is None:
            return 0
        return self.deep.rows * max(1, self.deep.kv_heads // shards) * self.deep.head_width * self.itemsize

    def output_rows_bytes(self, shards: int) -> int:
        """Of a rank's part of the output embedding."""
        return -(-self.vocabulary_size // shards) * self.width * self.itemsize

    def activations(
        self,
        shards: int,
        examples: int,
        tokens: int,
        checkpointing: bool = False,
        backward: bool = True,
        tuned: bool = False,
    ) -> Activations:
        """See :func:`megaptune.planning.activations.trace`. One part of the bytes is whole on every rank, the other is
        divided: two traces tell them apart, and larger groups follow."""
        kv_heads = getattr(self.config, "num_key_value_heads", None) or self.config.num_attention_heads
        settings = examples, tokens, checkpointing, backward, tuned
        if shards <= 2 or shards % 2 or kv_heads % shards:
            return self.traced(shards, *settings)
        one, two = self.traced(1, *settings), self.traced(2, *settings)
        divided = 2 * (one.saved_bytes - two.saved_bytes)
        # What lives at the peak is another set of tensors at every size, none larger than at a smaller one.
        return Activations(one.saved_bytes - divided + round(divided / shards), two.working_bytes)

    @lru_cache(maxsize=256)  # noqa: B019
    def traced(
        self,
        shards: int,
        examples: int,
        tokens: int,
        checkpointing: bool = False,
        backward: bool = True,
        tuned: bool = False,
    ) -> Activations:
        """See :func:`megaptune.planning.activations.trace`; two blocks are traced, the second stands for the rest.

        A family without a table is not taken apart, and code that looks into tensors' values (some rotary embeddings
        do) cannot be traced: blocks are then put at 40 tensors as large as the hidden states.
        """
        hidden = 40 * examples * tokens * self.width * self.itemsize
        assumed = Activations(hidden * int(getattr(self.config, "num_hidden_layers", 1)) if backward else 0, hidden)
        if self.family not in FAMILIES:
            return assumed
        memo = {id(block): nn.Identity() for block in self._blocks(self.model)[TRACED_BLOCKS:]}  # these are not copied
        model = copy.deepcopy(self.model, memo)
        del self._blocks(model)[TRACED_BLOCKS:]
        if tuned:
            model.requires_grad_(True)
        masked = self.kind == "masked"
        try:
            return trace(model, self.config, shards, examples, tokens, masked, checkpointing, backward, self.blocks)
        except RuntimeError as error:
            if "meta tensors" not in str(error):
                raise
            return assumed

    def _blocks(self, model: Any) -> Any:
        return model.get_submodule(FAMILIES[self.family].blocks)


def estimated_tokens(template: Template, record: Record) -> int:
    """An input's length without its tokenizer: three characters a token, which names of things come near."""
    parts = template.parts
    text = sum(len(part.fill(record)) for part in parts if isinstance(part, Text))
    return template.num_pseudo_tokens + -(-text // 3) + (3 if template.kind == "masked" else 1)


def largest_encoder(config: Config) -> str:
    """The kind with most parameters of those that methods train, or ``none``."""
    kinds = {
        METHODS[n].encoder or config.prompt.encoder
        for n in config.methods
        if METHODS[n].trains_prompt and not METHODS[n].deep
    }
    return next((kind for kind in ("lstm", "mlp", "table") if kind in kinds), "none")


class PromptSize(NamedTuple):
    """Parameters of a prompt's encoder; its rows in the table and their width."""

    parameters: int
    rows: int
    width: int


def prompt_size(work: Workload, shapes: Shapes) -> PromptSize:
    """Of the largest prompt."""
    parameters = encoder_elements(work.encoder, work.prompt_rows, shapes.width)
    sizes = [PromptSize(parameters, work.prompt_rows, shapes.width)]
    if work.deep is not None and shapes.deep is not None:
        rows, width = work.deep.length * shapes.deep.rows, shapes.deep.width
        sizes.append(PromptSize(encoder_elements(work.deep.kind, rows, width, work.deep), rows, width))
    return max(sizes)


def encoder_elements(name: str, rows: int, width: int, deep: DeepConfig | None = None) -> int:
    """Parameters of a prompt encoder; of ``none``, no one."""
    if name == "none":
        return 0
    with torch.device("meta"):
        return sum(parameter.numel() for parameter in build_encoder(name, rows, width, 0.0, 0, deep).parameters())


def largest_module(tensors: tuple[Tensor, ...]) -> int:
    """Elements of the module with the most parameters of its own."""
    sizes: dict[str, int] = {}
    for tensor in tensors:
        module = tensor.name.rpartition(".")[0]
        sizes[module] = sizes.get(module, 0) + tensor.elements
    return max(sizes.values())
