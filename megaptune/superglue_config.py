"""The configuration of a SuperGLUE task: which files, which splits, which patterns; and of PET, which needs them."""

from collections.abc import Mapping
from pathlib import Path
from typing import Literal

from pydantic import Field, model_validator

from megaptune.config_base import Limits, Section
from megaptune.patterns import USES, TaskName, TaskPatterns, Use


class TaskSplits(Section):
    """Where the records come from that choose the epoch, and those that are reported on."""

    dev: Literal["dev32", "held_out"] = Field(
        "held_out", description="records that choose the epoch: the file dev32, or a part of train that is held out"
    )
    test: Literal["val", "dev32"] = Field("val", description="the labelled file that is reported on, never selected on")

    @model_validator(mode="after")
    def _differ(self) -> "TaskSplits":
        if self.dev == self.test:
            raise ValueError(f"{self.dev} cannot both choose the epoch and be reported on; name another file as one")
        return self


PatternNames = list[str] | Literal["all"]


class SuperGlueTask(Limits):
    """SuperGLUE or FewGLUE in the official folders, under the patterns of the section ``patterns``."""

    type: Literal["superglue"] = Field(description="SuperGLUE and FewGLUE in the official folders")
    root: Path | list[Path] = Field(description="folder with a folder for each task; of several the first that has it")
    tasks: list[TaskName] | Literal["all"] = Field(
        "all", description="such as [RTE, COPA]; all: those of `patterns` that root has"
    )
    splits: TaskSplits = Field(TaskSplits(), description="where dev and test come from")
    splits_of: dict[TaskName, TaskSplits] = Field({}, description="the same, where a task differs")
    held_out: float = Field(0.1, gt=0, lt=1, description="share of train that dev: held_out takes; by limit_seed")
    manual: dict[TaskName, PatternNames] = Field(
        {}, description="manual patterns by task, each a job of its own; default: the first that fits the backbone"
    )
    ptuning: dict[TaskName, PatternNames] = Field({}, description="the same for patterns with pseudo tokens")
    mirror_copa: bool = Field(False, description="train COPA on each example with its choices in both orders")
    choice_score: Literal["sum", "mean"] = Field(
        "sum", description="a choice of several tokens scores the sum of their log-probabilities, or the mean"
    )
    predict_test: bool = Field(False, description="predict the unlabelled test file, as SuperGLUE's server takes it")

    @property
    def word_list(self) -> None:
        """Answers are label words and choices."""
        return None

    @property
    def roots(self) -> list[Path]:
        return self.root if isinstance(self.root, list) else [self.root]

    def splits_for(self, task: TaskName) -> TaskSplits:
        return self.splits_of.get(task, self.splits)

    def patterns_of(self, use: Use, task: TaskName) -> PatternNames:
        """The names asked for; none: the first that fits."""
        found: dict[TaskName, PatternNames] = getattr(self, use)
        return found.get(task, [])

    def most_patterns(self, use: Use, patterns: Mapping[TaskName, TaskPatterns]) -> int:
        """Under how many the task is read that has most."""
        asked = {name: self.patterns_of(use, name) for name in patterns}
        return max([1, *(len(getattr(patterns[n], use)) if a == "all" else len(a) for n, a in asked.items())])


class PetConfig(Section):
    """PET and iPET (Schick and Schütze 2021): models of several patterns label examples that a classifier learns."""

    patterns: dict[TaskName, PatternNames] = Field(
        {}, description="manual patterns of the ensemble, by task; default: all that fit the backbone"
    )
    models: int = Field(1, ge=1, description="models tuned with each pattern, every one with a seed of its own")
    file: Literal["unlabeled", "train", "test"] = Field(
        "unlabeled", description="the file of examples to label; its labels are not read, the other splits' left out"
    )
    root: Path | list[Path] | None = Field(None, description="where that file is, by task; default: task.root")
    limit: int | None = Field(None, ge=1, description="use this many of them, sampled by task.limit_seed")
    weights: Literal["accuracy", "uniform"] = Field(
        "accuracy", description="a model's weight: what its pattern scores on train before tuning, or the same for all"
    )
    temperature: float = Field(2.0, gt=0, description="of the labels, and of the classifier while it learns them")
    epochs: int | None = Field(None, ge=1, description="of the classifier, at most; default: train.epochs")
    lm_learning_rate: float | None = Field(
        None, gt=0, description="under the classifier; default: train.lm_learning_rate"
    )
    head_learning_rate: float | None = Field(
        None, gt=0, description="of the classifier's head; default: train.head_learning_rate"
    )
    generations: int = Field(3, ge=2, description="ipet: ensembles that are tuned one after the other")
    growth: float = Field(5.0, gt=1, description="ipet: the training set grows by this factor each generation")
    share: float = Field(0.25, gt=0, le=1, description="ipet: share of the other models that label for one, drawn")

    @property
    def roots(self) -> list[Path] | None:
        return [self.root] if isinstance(self.root, Path) else self.root


PET_TASKS: tuple[TaskName, ...] = ("BoolQ", "CB", "COPA", "MultiRC", "RTE", "WiC")
"""Those whose examples all have the same options; WSC's and ReCoRD's have phrases of their own text."""


def pattern_problems(task: SuperGlueTask, patterns: Mapping[TaskName, TaskPatterns]) -> list[str]:
    """What a task asks for that the section ``patterns`` does not have, as lines."""
    if not patterns:
        return ["a superglue task needs `patterns`: name configs/patterns/all.yaml in `defaults:`"]
    there = ", ".join(patterns)
    problems = [
        f"task.tasks names {name}, which `patterns` has no section for (there: {there})"
        for name in (task.tasks if task.tasks != "all" else [])
        if name not in patterns
    ]
    for use in USES:
        for name, section in patterns.items():
            known: list[str] = list(getattr(section, use))
            asked = task.patterns_of(use, name)
            problems += [
                f"task.{use}.{name} names the pattern {wanted!r} (there: {', '.join(known) or 'none'})"
                for wanted in (asked if asked != "all" else [])
                if wanted not in known
            ]
    return problems


def pet_problems(
    method: str, pet: PetConfig, task: SuperGlueTask, patterns: Mapping[TaskName, TaskPatterns]
) -> list[str]:
    """Tasks whose models have no labels to share, and patterns that are not there, as lines."""
    problems = [
        f"method {method} cannot label {name}: its examples have phrases of their own for options; leave {name} out"
        for name in (task.tasks if task.tasks != "all" else [])
        if name not in PET_TASKS
    ]
    for name, asked in pet.patterns.items():
        known = list(patterns[name].manual) if name in patterns else []
        wrong = [wanted for wanted in (asked if asked != "all" else []) if wanted not in known]
        there = ", ".join(known) or "none"
        problems += [f"pet.patterns.{name} names the pattern {wanted!r} (there: {there})" for wanted in wrong]
        if asked != "all" and len(set(asked)) < len(asked):
            problems.append(f"pet.patterns.{name} repeats an entry: {asked}")
    return problems
