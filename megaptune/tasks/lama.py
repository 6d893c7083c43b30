"""LAMA T-REx in its official layout: ``relations.jsonl`` and ``fact-retrieval/original/P*/{train,dev,test}.jsonl``.

Rows need ``sub_label`` and ``obj_label`` only. Duplicates stay: published scores count them. Source: Petroni et al.
2019; splits of Shin et al. 2020 (AutoPrompt), as the released P-tuning code reads them.
"""

import json
from pathlib import Path

from megaptune.config import LamaTask
from megaptune.errors import DataError
from megaptune.tasks.records import SPLITS, Record, TaskData, read_rows, take


def load_lama(config: LamaTask, word_list: list[str] | None) -> list[TaskData]:
    """The wanted relations, in the order asked for (``all``: by number)."""
    if not config.root.is_dir():
        raise DataError(f"task.root: folder not found: {config.root}")
    templates = _templates(config.root / "relations.jsonl")
    folders = {folder.name: folder for folder in (config.root / "fact-retrieval" / "original").glob("P*")}
    available = sorted(folders, key=lambda name: int(name[1:]) if name[1:].isdecimal() else 0)
    wanted = available if config.relations == "all" else config.relations
    unknown = [name for name in wanted if name not in folders]
    if unknown or not wanted:
        missing = ", ".join(unknown) or "any relation"
        raise DataError(f"{config.root}: no data for {missing} (there: {', '.join(available) or 'nothing'})")
    return [_load_relation(folders[name], templates, word_list) for name in wanted]


def _templates(path: Path) -> dict[str, tuple[str, str, str]]:
    """Relation id -> (manual template in megaptune's notation, label, type)."""
    found = {}
    for source, row in read_rows(path):
        template = take(row, "template", source)
        if "[X]" not in template or "[Y]" not in template:
            raise DataError(f"{source}: the template {template!r} lacks [X] or [Y]")
        notation = template.replace("[X]", "{subject}").replace("[Y]", "[answer]")
        found[take(row, "relation", source)] = notation, row.get("label", ""), row.get("type", "")
    return found


def _load_relation(folder: Path, templates: dict[str, tuple[str, str, str]], word_list: list[str] | None) -> TaskData:
    if folder.name not in templates:
        raise DataError(f"relations.jsonl has no template for {folder.name}")
    template, label, kind = templates[folder.name]
    splits = {split: [_record(row, source) for source, row in read_rows(folder / f"{split}.jsonl")] for split in SPLITS}
    return TaskData(folder.name, splits, template, word_list, label, kind).keep_listed_answers()


def _record(row: dict[str, str], source: str) -> Record:
    subject = take(row, "sub_label", source)
    return Record({**row, "subject": subject}, take(row, "obj_label", source), source, subject)


def read_word_list(path: Path) -> list[str]:
    """The words answers may be, in file order without repeats.

    ``.txt`` holds one word a line. ``.json`` is P-tuning's ``29k-vocab.json``: lists per model name, the same words
    in each, some with the byte-level mark of a leading space.
    """
    if not path.is_file():
        raise DataError(f"task.word_list: file not found: {path}")
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: not UTF-8 text (byte {error.start})") from None
    if path.suffix.lower() == ".json":
        try:
            lists = json.loads(text)
            words = next(iter(lists.values())) if isinstance(lists, dict) else lists
            words = [word.removeprefix("Ġ") for word in words]
        except (json.JSONDecodeError, StopIteration, AttributeError, TypeError):
            raise DataError(f"{path}: expected a JSON list of words, or an object of such lists") from None
    else:
        words = [line.strip() for line in text.split("\n")]
    words = list(dict.fromkeys(word for word in words if word))
    if not words:
        raise DataError(f"{path}: the word list is empty")
    return words
