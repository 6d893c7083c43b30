"""A SuperGLUE task as the backbone sees it: its splits under every pattern that a method wants, or for a classifier."""

import random
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from megaptune.classifier_examples import ClassifierEncoder
from megaptune.config import Config, Reading
from megaptune.errors import DataError
from megaptune.examples import Variant
from megaptune.methods import METHODS, Method, MethodName
from megaptune.option_examples import OptionExample, from_choices, from_labels
from megaptune.pattern_examples import LabelExample, PatternEncoder
from megaptune.patterns import Kind, TaskName, TaskPatterns, Use
from megaptune.prompts.template import Template
from megaptune.prompts.tokens import TokenForms
from megaptune.superglue_config import PET_TASKS, PetConfig, SuperGlueTask
from megaptune.tasks.superglue.loading import FileName, load_split
from megaptune.tasks.superglue.metrics import score, task_score
from megaptune.tasks.superglue.records import SplitData, SuperGlueRecord

SplitName = Literal["train", "dev", "test", "unlabelled", "to_label"]
UseOf = Use | Literal["classifier", "ensemble"]
USE_OF: dict[str, UseOf] = {"manual": "manual", "template": "ptuning", "bare": "classifier"}
"""What a method of each kind of prompt reads here."""


@dataclass(frozen=True)
class SuperGlueData:
    """A task's files, limited and divided; ``unlabelled`` is the server's test set, if it is to be predicted, and
    ``to_label`` what an ensemble of patterns is to label."""

    task: TaskName
    splits: dict[SplitName, SplitData]

    @property
    def name(self) -> str:
        return self.task

    def summary(self) -> str:
        return "\n".join(split.summary() for split in self.splits.values())


@dataclass(frozen=True)
class EncodedOptions:
    """A task's splits under one pattern, or for a classification head.

    rows: of the table, pseudo tokens or the head's weights; encoder: "head" for the latter; labels: what the options
    are, none where they are the example's own choices; candidates [C]: every token that is asked for, ascending, None
    for the whole vocabulary.
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
        use = USE_OF[method.prompt]
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
        return self.found[USE_OF[method.prompt], name or ""]

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


def load_superglue(config: Config) -> list[SuperGlueData]:
    """The files of every task that is asked for.

    :raises DataError: with the file or line at fault.
    """
    task = config.task
    assert isinstance(task, SuperGlueTask)
    trains = any(METHODS[name].trains for name in config.methods)
    absent = absent_tasks(config)
    there = [name for name in config.tasks if name not in absent]
    if not there:
        roots = ", ".join(map(str, task.roots))
        raise DataError(f"task.root: no folder of a SuperGLUE task ({', '.join(config.tasks)}) in {roots}")
    ensemble = any(METHODS[name].ensemble for name in config.methods)
    return [_load(task, name, trains, config.pet if ensemble and name in PET_TASKS else None) for name in there]


def absent_tasks(config: Config) -> list[TaskName]:
    """What ``tasks: all`` leaves out: the tasks without a folder. A task that is named must be there."""
    task = config.task
    if not isinstance(task, SuperGlueTask) or task.tasks != "all":
        return []
    return [name for name in config.tasks if not any((root / name).is_dir() for root in task.roots)]


def _load(task: SuperGlueTask, name: TaskName, trains: bool, pet: PetConfig | None) -> SuperGlueData:
    places = task.splits_for(name)
    found: dict[SplitName, SplitData] = {}
    if trains:
        train = _file(task, name, "train")
        if places.dev == "held_out":
            train, dev = hold_out(train, task.held_out, task.limit_seed)
        else:
            dev = _file(task, name, "dev32")
        found["train"] = limited(train, task.limit_train, task.limit_seed)
        found["dev"] = limited(dev, task.limit_dev, task.limit_seed)
    found["test"] = limited(_file(task, name, places.test), task.limit_test, task.limit_seed)
    if task.predict_test:
        found["unlabelled"] = _file(task, name, "test")
    if pet is not None:
        known = [record for split in ("train", "dev", "test") for record in found[split].records]
        found["to_label"] = limited(_to_label(task, name, pet, known), pet.limit, task.limit_seed)
    return SuperGlueData(name, found)


def _to_label(task: SuperGlueTask, name: TaskName, pet: PetConfig, known: list[SuperGlueRecord]) -> SplitData:
    """The examples that an ensemble labels: without labels, and none that is trained, selected or reported on.

    :raises DataError: when none is left.
    """
    data = load_split(root_of(pet.roots or task.roots, name, pet.file), name, pet.file)
    texts = {tuple(sorted(record.fields.items())) for record in known}
    records = [
        replace(record, label=None, answers=())
        for record in data.records
        if tuple(sorted(record.fields.items())) not in texts
    ]
    if not records:
        raise DataError(
            f"{name}: every example of its {pet.file} file is also one of train, dev or test; nothing is left for an "
            "ensemble to label: name another pet.file, or as pet.root the folder of the undivided one"
        )
    return SplitData(name, f"{pet.file}, to be labelled", records)


def _file(task: SuperGlueTask, name: TaskName, file: FileName) -> SplitData:
    return load_split(root_of(task.roots, name, file), name, file)


def root_of(roots: list[Path], name: TaskName, file: FileName) -> Path:
    """The first that has the file; without one the first that has the task, for the error."""
    having = [root for root in roots if (root / name / f"{file}.jsonl").is_file()]
    return next(iter([*having, *(root for root in roots if (root / name).is_dir()), *roots]))


def hold_out(data: SplitData, share: float, seed: int) -> tuple[SplitData, SplitData]:
    """What is left of a training file, and the part that is held out: whole passages of MultiRC, else examples.

    :raises DataError: when it has too few examples for two parts.
    """
    groups = list(dict.fromkeys(record.idx[0] for record in data.records))
    count = max(1, round(share * len(groups)))
    if count >= len(groups):
        raise DataError(f"{data.task} {data.split}: {len(groups)} examples are too few to hold out {count} of them")
    chosen = set(random.Random(seed).sample(groups, count))
    parts = ([r for r in data.records if (r.idx[0] in chosen) == out] for out in (False, True))
    kept, out = parts
    return replace(data, records=kept), SplitData(data.task, f"held out of {data.split}", out)


def limited(data: SplitData, limit: int | None, seed: int) -> SplitData:
    """At most ``limit`` examples, in their file's order; of MultiRC whole questions. Skipped ones count no more."""
    if limit is None or len(data.records) <= limit:
        return data
    sizes = Counter(record.idx[:2] for record in data.records)
    groups = list(sizes)
    chosen: set[tuple[int, ...]] = set()
    for group in random.Random(seed).sample(groups, len(groups)):
        if not chosen or sum(sizes[other] for other in chosen) + sizes[group] <= limit:
            chosen.add(group)
    records = [record for record in data.records if record.idx[:2] in chosen]
    return replace(data, records=records, skipped=[])


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
        methods = [METHODS[name] for name in config.methods if USE_OF[METHODS[name].prompt] == use]
        if not methods:
            continue
        trains = any(method.trains for method in methods)
        if use == "classifier":
            found[use, ""] = _for_classifier(data, patterns, forms, kind, context_tokens)
            continue
        for name in fitting(patterns, use, kind, task.patterns_of(use, data.task)):
            found[use, name] = _under_pattern(data, task, patterns, use, name, forms, kind, context_tokens, trains)
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
) -> EncodedOptions:
    encoder = PatternEncoder(data.task, patterns.pick(use, kind, name), patterns, forms, kind, context_tokens)
    rows = encoder.template.num_pseudo_tokens
    if (use == "ptuning") != (rows > 0):
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
    return EncodedOptions(
        name,
        encoder.template,
        rows,
        None,
        () if words is None else words.labels,
        None if tokens is None else torch.tensor(tokens),
        train=[encode(record) for record in training],
        **_evaluated(data, encode, trains, labels),
        encode=encode,
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
