"""A SuperGLUE task as the backbone sees it: its splits under every pattern that a method wants, or for a classifier."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from megaptune.classifier_examples import ClassifierEncoder
from megaptune.config import Config, DeepConfig, Reading
from megaptune.errors import DataError
from megaptune.examples import Variant, deep_words
from megaptune.methods import METHODS, Method, MethodName
from megaptune.option_examples import OptionExample, from_choices, from_labels
from megaptune.pattern_examples import LabelExample, PatternEncoder
from megaptune.patterns import Kind, TaskName, TaskPatterns, Use
from megaptune.prompts.template import Template, without_pseudo_tokens
from megaptune.prompts.tokens import TokenForms
from megaptune.superglue_config import SuperGlueTask
from megaptune.superglue_data import SplitName, SuperGlueData
from megaptune.tasks.superglue.metrics import score, task_score
from megaptune.tasks.superglue.records import SuperGlueRecord

UseOf = Use | Literal["classifier", "ensemble", "deep"]
USE_OF: dict[str, UseOf] = {"manual": "manual", "template": "ptuning", "bare": "classifier"}


def use_of(method: Method) -> UseOf:
    """What a method reads here, by its kind of prompt."""
    return "deep" if method.deep else USE_OF[method.prompt]


@dataclass(frozen=True)
class EncodedOptions:
    """A task's splits under one pattern, or for a classification head.

    rows: of the table, pseudo tokens or the head's weights; encoder: "head" for the latter; labels: what the options
    are, none where they are the example's own choices; candidates [C]: every token that is asked for, ascending, None
    for the whole vocabulary; deep_words: behind a deep prompt the token ids that one starts at, if any.
    """

    name: str
    template: Template
    rows: int
    encoder: str | None
    labels: tuple[str, ...]
    candidates: Tensor | None
    train: list[OptionExample]
    dev: list[OptionExample]
    test: list[OptionExample]
    unlabelled: list[OptionExample]
    encode: Callable[[SuperGlueRecord], OptionExample] = field(repr=False)
    deep_words: list[int] | None
    to_label: list[OptionExample] = field(default_factory=list)

    @property
    def reported(self) -> list[OptionExample]:
        """What is evaluated when the job is done: test, then the unlabelled examples."""
        return [*self.test, *self.unlabelled]

    def prediction(self, record: SuperGlueRecord, best: int) -> str:
        """What the highest-scored option predicts, as the metrics and submission files spell it."""
        return self.labels[best] if self.labels else record.prediction(best)

    def predictions(self, examples: Sequence[OptionExample], best: Sequence[int]) -> dict[tuple[int, ...], str]:
        """By the examples' numbers."""
        found = {}
        for example, option in zip(examples, best, strict=True):
            assert isinstance(example.record, SuperGlueRecord)
            found[example.record.idx] = self.prediction(example.record, option)
        return found


@dataclass(frozen=True)
class PreparedSuperGlue:
    """A task with all that its methods read: by use and pattern's name ("" for the classifier)."""

    data: SuperGlueData
    found: dict[tuple[UseOf, str], EncodedOptions]

    headline = "score"
    left_out: dict[MethodName, str] = field(default_factory=dict)

    @property
    def name(self) -> TaskName:
        return self.data.task

    @property
    def prompts(self) -> list[EncodedOptions]:
        return list(self.found.values())

    @property
    def ensemble(self) -> list[EncodedOptions]:
        """The task under every pattern of PET."""
        return [encoded for (use, _), encoded in self.found.items() if use == "ensemble"]

    @property
    def swept(self) -> dict[str, EncodedOptions]:
        """The patterns with pseudo tokens, by name."""
        return {name: encoded for (use, name), encoded in self.found.items() if use == "ptuning"}

    @property
    def candidates(self) -> dict[Reading, Tensor | None]:
        """For the memory plan: choices are scored over the whole vocabulary."""
        return {"vocabulary": None}

    def variants(self, method: Method, config: Config) -> list[Variant]:
        """A method's sweep over learning rates and patterns, each of which is a variant's ``template``."""
        use = use_of(method)
        train = config.train
        rates = config.learning_rates(method) if method.trains_prompt else [0.0]
        if use == "classifier":
            rates = [train.head_learning_rate or train.lm_learning_rate]
        names = [name for wanted, name in self.found if wanted == use]
        return [
            Variant(rate, name, (f"-lr{rate:g}" if len(rates) > 1 else "") + (f"-{name}" if len(names) > 1 else ""))
            for rate in rates
            for name in names
        ]

    def encoded(self, method: Method, name: str | None = None) -> EncodedOptions:
        """What ``method`` reads; ``name`` is a pattern's."""
        return self.found[use_of(method), name or ""]

    def figures(self, encoded: EncodedOptions, split: SplitName, best: Sequence[int]) -> dict[str, float]:
        """The task's metrics and their mean, ``score``, from the best option of each example of a split."""
        data = self.data.splits[split]
        predictions = data.complete(encoded.predictions(getattr(encoded, split), best))
        metrics = score(self.name, data.gold, predictions)
        return {**metrics, "score": task_score(self.name, metrics)}

    @property
    def majority(self) -> float | None:
        """The score of always answering the commonest label: of train, of dev where train has one label only, of test
        itself in a run without them; None for ReCoRD."""
        data = self.data.splits["test"]
        seen = [self.data.splits[name].labels() for name in ("train", "dev") if name in self.data.splits]
        labels = next((found for found in seen if len(found) > 1), data.labels())
        if not labels:
            return None
        ((label, _),) = labels.most_common(1)
        return task_score(self.name, score(self.name, data.gold, dict.fromkeys(data.gold, label)))

    def summary(self, vocabulary_size: int) -> str:
        """Counts, labels, what was skipped, patterns and baseline, for the console."""
        uses = ", ".join(f"{use} {name}".strip() for use, name in self.found)
        left_out = "".join(f"\n  left out {method}: {why}" for method, why in self.left_out.items())
        base = "" if self.majority is None else f"\n  always the commonest label: score {100 * self.majority:.1f}"
        files = self.data.summary().replace("\n", "\n  ")
        return f"{files}\n  reads {uses}{base}{left_out}"


def prepare_superglue(
    data: SuperGlueData, config: Config, forms: TokenForms, kind: Kind, context_tokens: int
) -> PreparedSuperGlue:
    """Encode a task for every method of the configuration.

    :raises DataError: a pattern or verbalizer that does not fit, an input that cannot be cut to its length, a training
        file with one label only where several are needed.
    """
    task, patterns = config.task, config.patterns[data.task]
    assert isinstance(task, SuperGlueTask)
    found: dict[tuple[UseOf, str], EncodedOptions] = {}
    uses: tuple[Use | Literal["classifier"], ...] = ("manual", "ptuning", "classifier")
    for use in uses:
        methods = [METHODS[name] for name in config.methods if use_of(METHODS[name]) == use]
        if not methods:
            continue
        trains = any(method.trains for method in methods)
        if use == "classifier":
            found[use, ""] = _for_classifier(data, patterns, forms, kind, context_tokens)
            continue
        for name in fitting(patterns, use, kind, task.patterns_of(use, data.task)):
            found[use, name] = _under_pattern(data, task, patterns, use, name, forms, kind, context_tokens, trains)
    if config.deep:
        found |= _behind_deep_prompts(data, config, forms, kind, context_tokens)
    ensembles = [name for name in config.methods if METHODS[name].ensemble]
    if "to_label" not in data.splits:
        why = "its examples have phrases of their own for options"
        return PreparedSuperGlue(data, found, dict.fromkeys(ensembles, why))
    for name in fitting(patterns, "manual", kind, config.pet.patterns.get(data.task, "all")):
        found["ensemble", name] = _under_pattern(
            data, task, patterns, "manual", name, forms, kind, context_tokens, trains=True, labels=True
        )
    models = config.pet.models * sum(use == "ensemble" for use, _ in found)
    if models < 2 and "ipet" in ensembles:
        raise DataError(
            f"{data.task}: ipet lets the other models label for each, and there is one model; name more patterns in "
            f"pet.patterns (for a {kind} backbone: {', '.join(fitting(patterns, 'manual', kind, 'all'))}), or raise "
            "pet.models"
        )
    return PreparedSuperGlue(data, found)


def fitting(patterns: TaskPatterns, use: Use, kind: Kind, asked: list[str] | Literal["all"]) -> list[str]:
    """The names of the patterns to use with a backbone of this kind."""
    known = getattr(patterns, use)
    if asked == "all":
        asked = [name for name, pattern in known.items() if kind in pattern.families]
    if not asked:
        first = patterns.pick(use, kind)
        asked = [name for name, pattern in known.items() if pattern is first]
    for name in asked:
        patterns.pick(use, kind, name)  # or the error that says which there are
    return asked


def _behind_deep_prompts(
    data: SuperGlueData, config: Config, forms: TokenForms, kind: Kind, context_tokens: int
) -> dict[tuple[UseOf, str], EncodedOptions]:
    """The task under the patterns that follow a deep prompt; of those with the same text the first."""
    task, patterns, deep = config.task, config.patterns[data.task], config.prompt.deep
    assert isinstance(task, SuperGlueTask)
    use: Use = "manual" if deep.input == "manual" else "ptuning"
    first: dict[str, str] = {}
    for name in fitting(patterns, use, kind, task.patterns_of(use, data.task)):
        first.setdefault(without_pseudo_tokens(patterns.pick(use, kind, name).text), name)
    settings = forms, kind, context_tokens
    return {
        ("deep", name): _under_pattern(data, task, patterns, use, name, *settings, trains=True, deep=deep)
        for name in first.values()
    }


def _under_pattern(
    data: SuperGlueData,
    task: SuperGlueTask,
    patterns: TaskPatterns,
    use: Use,
    name: str,
    forms: TokenForms,
    kind: Kind,
    context_tokens: int,
    trains: bool,
    labels: bool = False,
    deep: DeepConfig | None = None,
) -> EncodedOptions:
    """:param deep: the prompt that the pattern follows, instead of having pseudo tokens."""
    pattern, virtual_tokens = patterns.pick(use, kind, name), 0
    if deep is not None:
        text = pattern.text if use == "manual" else without_pseudo_tokens(pattern.text)
        pattern, virtual_tokens = pattern.model_copy(update={"text": text}), deep.length
    encoder = PatternEncoder(data.task, pattern, patterns, forms, kind, context_tokens, virtual_tokens)
    rows = encoder.template.num_pseudo_tokens
    if (use == "ptuning" and deep is None) != (rows > 0):
        fault = "has no pseudo token: there is nothing to train" if use == "ptuning" else "has pseudo tokens"
        raise DataError(f"{data.task}: the {use} pattern {name} ({encoder.template.text!r}) {fault}")
    words = encoder.label_words
    mean = task.choice_score == "mean"

    def encode(record: SuperGlueRecord) -> OptionExample:
        example = encoder.encode(record)
        if isinstance(example, LabelExample):
            assert words is not None
            right = () if example.label is None else (example.label,)
            return from_labels(example.slots, example.answer_position, words.tokens, right, record)
        choices = [(choice.slots, choice.positions, choice.targets) for choice in example.choices]
        return from_choices(choices, example.right, record, mean)

    training: Sequence[SuperGlueRecord] = encoder.training_records(data.splits["train"])[0] if trains else []
    if data.task == "COPA" and task.mirror_copa:
        training = [one for record in training for one in (record, record.mirrored())]
    tokens = None if words is None else sorted({token for members in words.tokens for token in members})
    train = [encode(record) for record in training]
    starts_at = None if deep is None else deep_words(deep, [example.inputs[0] for example in train], forms)
    return EncodedOptions(
        name,
        encoder.template,
        rows,
        None,
        () if words is None else words.labels,
        None if tokens is None else torch.tensor(tokens),
        train=train,
        **_evaluated(data, encode, trains, labels),
        encode=encode,
        deep_words=starts_at,
    )


def _for_classifier(
    data: SuperGlueData, patterns: TaskPatterns, forms: TokenForms, kind: Kind, context_tokens: int
) -> EncodedOptions:
    encoder = ClassifierEncoder(data.task, forms, kind, min(patterns.max_tokens, context_tokens))
    return EncodedOptions(
        "",
        encoder.template,
        encoder.rows,
        "head",
        encoder.labels,
        torch.tensor([0]),  # no token is asked for
        train=[encoder.encode(record) for record in encoder.training_records(data.splits["train"])],
        **_evaluated(data, encoder.encode, trains=True, labels=True),
        encode=encoder.encode,
        deep_words=None,
    )


def _evaluated(
    data: SuperGlueData, encode: Callable[[SuperGlueRecord], OptionExample], trains: bool, labels: bool
) -> dict[str, list[OptionExample]]:
    wanted: set[SplitName] = {"test", "unlabelled"}
    wanted |= {"dev"} if trains else set()
    wanted |= {"to_label"} if labels else set()
    return {
        split: [encode(record) for record in data.splits[split].records]
        if split in wanted and split in data.splits
        else []
        for split in ("dev", "test", "unlabelled", "to_label")
    }
