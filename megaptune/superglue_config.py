"""The configuration of a SuperGLUE task: which files, which splits, which patterns."""

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
