"""What one job trains: a relation, a method, a template, a seed, a learning rate, and how far it is."""

import hashlib
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from megaptune.backbone.deep_prompts import DeepPrompts
from megaptune.batches import EpochPlan, Member
from megaptune.config import Config
from megaptune.examples import EncodedTask, Example, PreparedTask, Variant
from megaptune.methods import METHODS, Method, MethodName
from megaptune.option_examples import OptionExample
from megaptune.prompts.bank import Prompt
from megaptune.superglue_examples import EncodedOptions, PreparedSuperGlue


@dataclass
class Selection:
    """Early stopping on dev P@1, or a task's own score: ties replace, as in the released code, and count as a gain."""

    patience: int
    best: float = -1.0
    best_epoch: int = 0
    misses: int = 0

    def improves(self, epoch: int, score: float) -> bool:
        if score >= self.best:
            self.best, self.best_epoch, self.misses = score, epoch, 0
            return True
        self.misses += 1
        return False

    @property
    def exhausted(self) -> bool:
        return self.patience > 0 and self.misses >= self.patience


@dataclass(eq=False)
class Job:
    """A job of a run: what is trained or merely evaluated. ``number``: its own among all jobs of the run; notes: what
    its result says besides."""

    number: int
    method_name: MethodName
    task: PreparedTask | PreparedSuperGlue
    encoded: EncodedTask | EncodedOptions
    seed: int | None
    variant: Variant
    folder: Path
    notes: dict[str, Any] = field(default_factory=dict)

    @property
    def method(self) -> Method:
        return METHODS[self.method_name]

    @property
    def encoder(self) -> str | None:
        """What makes its table rows, where it is not the configuration's prompt encoder."""
        return self.encoded.encoder or self.method.encoder

    @property
    def name(self) -> str:
        return f"{self.task.name}/{self.folder.name}"

    @property
    def has_result(self) -> bool:
        return (self.folder / "result.json").is_file()


@dataclass(eq=False)
class Training:
    """A job in training: its prompt, the batches that await it, its early stopping; ``virtual_tokens`` of its deep
    prompt, 0 for none."""

    job: Job
    plan: EpochPlan
    prompt: Prompt
    selection: Selection
    total_steps: int
    digest: str = field(repr=False)
    virtual_tokens: int = 0

    @classmethod
    def begin(cls, job: Job, config: Config, deep: DeepPrompts | None = None) -> "Training":
        """:param deep: the shape of the backbone's deep prompts, for a job that trains one."""
        assert job.seed is not None, "a job that trains has a seed"
        train, examples = config.train, job.encoded.train
        plan = EpochPlan(len(examples), train.global_batch, train.drop_last, job.seed)
        per_epoch = plan.steps_per_epoch
        rows, encoder, virtual_tokens = job.encoded.rows, job.encoder, 0
        if job.method.deep:
            assert deep is not None, "preparation refuses other backbones"
            encoder, virtual_tokens = config.prompt.deep.kind, config.prompt.deep.length
            rows = virtual_tokens * deep.rows
        prompt = Prompt(job.name, rows, job.seed, job.variant.learning_rate, per_epoch, encoder)
        steps = train.epochs * per_epoch
        return cls(job, plan, prompt, Selection(train.patience), steps, digest(examples), virtual_tokens)

    @property
    def name(self) -> str:
        return self.job.name

    @property
    def step(self) -> int:
        return self.prompt.step

    @property
    def ends_epoch(self) -> bool:
        return self.step % self.plan.steps_per_epoch == 0

    @property
    def epoch(self) -> int:
        """Epochs that are complete."""
        return self.step // self.plan.steps_per_epoch

    @property
    def finished(self) -> bool:
        return self.step >= self.total_steps or self.selection.exhausted

    def members(self, examples: Sequence[Example | OptionExample], first_row: int | None = None) -> list[Member]:
        """Examples as this job's; ``first_row`` in a table that is not the bank's."""
        row = self.prompt.first_row if first_row is None else first_row
        return [Member(example, row, self.job.number, self.virtual_tokens) for example in examples]

    def batch(self) -> list[Member]:
        """The examples of the coming step."""
        train = self.job.encoded.train
        return self.members([train[index] for index in self.plan.indices(self.step)])

    def state(self) -> dict[str, Any]:
        return {"step": self.step, "selection": asdict(self.selection), "data": self.digest}


def digest(examples: Sequence[Example | OptionExample]) -> str:
    """What identifies training data as the backbone sees it."""
    text = ";".join(example.key for example in examples)
    return hashlib.sha256(text.encode()).hexdigest()
