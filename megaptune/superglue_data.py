"""A SuperGLUE task's files as a run wants them: limited, and divided into what is trained, selected and reported on."""

import random
from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from megaptune.config import Config
from megaptune.errors import DataError
from megaptune.methods import METHODS
from megaptune.patterns import TaskName
from megaptune.superglue_config import PET_TASKS, PetConfig, SuperGlueTask
from megaptune.tasks.superglue.loading import FileName, load_split
from megaptune.tasks.superglue.records import SplitData, SuperGlueRecord

SplitName = Literal["train", "dev", "test", "unlabelled", "to_label"]


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
