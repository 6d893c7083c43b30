"""Patterns and verbalizers as a configuration writes them; ``configs/patterns/`` holds those of SuperGLUE's tasks.

A *pattern* turns an example into a text with an answer in it; a *verbalizer* says which words stand for which label
(Schick and Schütze 2021). A pattern without a verbalizer is answered by the example's own choices, which may be of
several tokens. Patterns and verbalizers have names, so that a file can add or replace one of another file.
"""

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    TypeAdapter,
    ValidationError,
    field_validator,
    model_validator,
)

from megaptune import config_files
from megaptune.errors import ConfigError

TaskName = Literal["BoolQ", "CB", "COPA", "MultiRC", "RTE", "WiC", "WSC", "ReCoRD"]
Kind = Literal["causal", "masked"]
Use = Literal["manual", "ptuning"]
USES: tuple[Use, ...] = ("manual", "ptuning")

LABELS: dict[TaskName, tuple[str, ...]] = {
    "BoolQ": ("false", "true"),
    "CB": ("contradiction", "entailment", "neutral"),
    "COPA": ("0", "1"),
    "MultiRC": ("0", "1"),
    "RTE": ("entailment", "not_entailment"),
    "WiC": ("false", "true"),
    "WSC": ("false", "true"),
    "ReCoRD": (),
}
"""Each task's labels as the official files spell them; a ReCoRD example is answered by one of its entities."""

CHOICE_TASKS: tuple[TaskName, ...] = ("COPA", "WSC", "ReCoRD")
"""The tasks whose examples have choices of their own."""


class Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Pattern(Strict):
    text: str = Field(description="the template: words, {field}, {field:shorten}, [P*n], [sep], one [answer]")
    verbalizer: str | None = Field(None, description="whose words answer; none: the example's own choices do")
    families: list[Kind] = Field(["causal", "masked"], min_length=1, description="the backbones it is meant for")


class TaskPatterns(Strict):
    """One task's patterns, by name; the first that fits the backbone's family is used unless another is named."""

    verbalizers: dict[str, dict[str, list[str]]] = Field(
        {}, description="by name: label -> word, or words whose logits are averaged"
    )
    manual: dict[str, Pattern] = Field({}, description="patterns without pseudo tokens")
    ptuning: dict[str, Pattern] = Field({}, description="patterns with pseudo tokens and anchor words")
    max_tokens: int = Field(256, ge=8, description="the length that inputs are cut to, where the backbone allows it")
    extra_masks: int = Field(0, ge=0, description="masked backbones: masks beyond the longest choice's tokens")

    @field_validator("verbalizers", mode="before")
    @classmethod
    def _words_in_lists(cls, value: Any) -> Any:
        """A single word may stand without a list."""
        if not isinstance(value, dict):
            return value
        return {name: _in_lists(name, words) if isinstance(words, dict) else words for name, words in value.items()}

    @model_validator(mode="after")
    def _fit_together(self) -> "TaskPatterns":
        problems = []
        for name, words in self.verbalizers.items():
            problems += [f"verbalizer {name}: {problem}" for problem in _repeated(words)]
        for use in USES:
            for name, pattern in getattr(self, use).items():
                if pattern.verbalizer is not None and pattern.verbalizer not in self.verbalizers:
                    known = ", ".join(self.verbalizers) or "none"
                    problems.append(f"{use}.{name} names the verbalizer {pattern.verbalizer!r} (there: {known})")
        if problems:
            raise ValueError("; ".join(problems))
        return self

    def pick(self, use: Use, kind: Kind, name: str | None = None) -> Pattern:
        """The pattern called ``name``, or the first for this family.

        :raises ConfigError: when there is none, or it is not meant for this family.
        """
        patterns: dict[str, Pattern] = getattr(self, use)
        fitting = [other for other, pattern in patterns.items() if kind in pattern.families]
        if name is None and fitting:
            return patterns[fitting[0]]
        if name in fitting:
            return patterns[name]
        wanted = f"no {use} pattern" if name is None else f"the {use} pattern {name!r} is not"
        raise ConfigError(f"{wanted} for {kind} backbones (there: {', '.join(fitting) or 'none'})")


def _in_lists(name: str, words: dict[Any, Any]) -> dict[Any, Any]:
    for label, word in words.items():
        if not isinstance(label, str):
            raise ValueError(f'{name}: write the label {label!r} in quotes, "true" or "0": YAML reads no text here')
        if isinstance(word, bool):
            raise ValueError(f"{name}: {label}: YAML reads an unquoted yes, no, true or false as {word}: quote it")
    return {label: [word] if isinstance(word, str) else word for label, word in words.items()}


def _repeated(words: dict[str, list[str]]) -> list[str]:
    """Words that stand for two labels, or twice for one."""
    problems = []
    seen: dict[str, str] = {}
    for label, members in words.items():
        for word in members:
            if word in seen:
                problems.append(f"the word {word!r} stands for {seen[word]!r} and again for {label!r}")
            seen[word] = label
    return problems


def check_labels(task: TaskName, patterns: TaskPatterns) -> list[str]:
    """What is wrong with a task's verbalizers and patterns, as lines; nothing, if all fit its labels."""
    problems = []
    for name, words in patterns.verbalizers.items():
        missing = [label for label in LABELS[task] if not any(words.get(label, []))]
        unknown = [label for label in words if label not in LABELS[task]]
        where = f"{task}: verbalizer {name}"
        problems += [f"{where} has no word for the label {label!r}" for label in missing]
        problems += [f"{where} names {label!r}, which is no label of it ({_list(LABELS[task])})" for label in unknown]
    for use in USES:
        for name, pattern in getattr(patterns, use).items():
            if pattern.verbalizer is None and task not in CHOICE_TASKS:
                problems.append(f"{task}: {use}.{name} needs a verbalizer: the examples have no choices of their own")
    return problems


def _list(labels: tuple[str, ...]) -> str:
    return ", ".join(labels) or "it has none"


def _checked(patterns: dict[TaskName, TaskPatterns]) -> dict[TaskName, TaskPatterns]:
    problems = [problem for task, members in patterns.items() for problem in check_labels(task, members)]
    if problems:
        raise ValueError("; ".join(problems))
    return patterns


PatternBook = Annotated[dict[TaskName, TaskPatterns], AfterValidator(_checked)]
"""The ``patterns:`` section of a configuration: task -> its patterns and verbalizers."""


def load_patterns(path: Path) -> dict[TaskName, TaskPatterns]:
    """The ``patterns:`` section of one file and of those that its ``defaults:`` name.

    :raises ConfigError: naming every mistake.
    """
    raw = config_files.read_layers(path, config_files.PathResolver((), lambda value: False))
    if set(raw) != {"patterns"}:
        raise ConfigError(f"{path}: expected the one section `patterns`, found {', '.join(map(str, raw)) or 'nothing'}")
    try:
        return TypeAdapter(PatternBook).validate_python(raw["patterns"])
    except ValidationError as error:
        lines = [f"  - {_line(problem['loc'], problem['msg'])}" for problem in error.errors()]
        raise ConfigError(f"{path}: {len(lines)} problem(s) in the patterns\n" + "\n".join(lines)) from None


def _line(location: tuple[int | str, ...], message: str) -> str:
    key = ".".join(map(str, location))
    return f"`{key}`: {message.removeprefix('Value error, ')}" if key else message.removeprefix("Value error, ")
