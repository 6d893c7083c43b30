"""LAMA T-REx in its official layout: ``relations.jsonl`` and ``fact-retrieval/original/P*/{train,dev,test}.jsonl``.

Rows need ``sub_label`` and ``obj_label`` only. Duplicates stay: published scores count them. Source: Petroni et al.
2019; splits of Shin et al. 2020 (AutoPrompt), as the released P-tuning code reads them.
"""

import json
import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from megaptune.config import LamaTask
from megaptune.errors import DataError
from megaptune.methods import PROMPT_SETS, PromptSet
from megaptune.tasks.records import SPLITS, Record, TaskData, read_rows, take

PROMPT_FILES: dict[PromptSet, str] = {
    "lpaqa": "prompts/LPAQA_relations.jsonl",
    "autoprompt": "prompts/AutoPrompt_relations.jsonl",
}
"""Where a set's prompts are below the data's folder, unless the configuration names another file."""


def load_lama(config: LamaTask, word_list: list[str] | None, prompt_sets: Sequence[PromptSet] = ()) -> list[TaskData]:
    """The wanted relations, in the order asked for (``all``: by number), with their prompts of ``prompt_sets``."""
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
    sets = {name: read_prompt_set(_prompt_file(config, name)) for name in prompt_sets}
    relations = [_load_relation(folders[name], templates, word_list) for name in wanted]
    return [
        replace(data, prompt_sets={name: found[data.name] for name, found in sets.items() if data.name in found})
        for data in relations
    ]


def read_prompt_set(path: Path) -> dict[str, list[str]]:
    """Relation id -> its prompts in megaptune's notation, in file order without repeats; rows of ``relation`` and
    ``template``, several of a relation or one."""
    found: dict[str, list[str]] = {}
    for source, row in read_rows(path):
        prompts = found.setdefault(take(row, "relation", source), [])
        prompt = _notation(take(row, "template", source), source)
        prompts += [prompt] if prompt not in prompts else []
    return found


def _prompt_file(config: LamaTask, name: PromptSet) -> Path:
    stated: Path | None = getattr(config, f"{name}_prompts")
    path = stated or config.root / PROMPT_FILES[name]
    if not path.is_file():
        raise DataError(f"method {PROMPT_SETS[name]}: file not found: {path}; name it in task.{name}_prompts")
    return path


def _templates(path: Path) -> dict[str, tuple[str, str, str]]:
    """Relation id -> (manual template in megaptune's notation, label, type)."""
    found = {}
    for source, row in read_rows(path):
        notation = _notation(take(row, "template", source), source)
        found[take(row, "relation", source)] = notation, row.get("label", ""), row.get("type", "")
    return found


def _notation(template: str, source: str) -> str:
    """LAMA's ``[X]`` and ``[Y]`` in megaptune's notation.

    What is glued to ``[X]`` stays glued, as the pieces of words that AutoPrompt found do; a piece that is still marked
    (``[X] ##vik``) is glued to what it goes on.
    """
    for tag in ("[X]", "[Y]"):
        if template.count(tag) != 1:
            found = "lacks" if tag not in template else f"has {template.count(tag)} times"
            raise DataError(f"{source}: the template {template!r} {found} {tag}; expected [X] and [Y] once each")
    if "{" in template or "}" in template:
        raise DataError(f"{source}: the template {template!r} has a brace, which would name a field here")
    glued = re.sub(r"\s+##(?=\w)", "", template)
    return glued.replace("[X]", "{subject}").replace("[Y]", "[answer]")


def _load_relation(folder: Path, templates: dict[str, tuple[str, str, str]], word_list: list[str] | None) -> TaskData:
    if folder.name not in templates:
        raise DataError(f"relations.jsonl has no template for {folder.name}")
    template, label, kind = templates[folder.name]
    splits = {split: [_record(row, source) for source, row in read_rows(folder / f"{split}.jsonl")] for split in SPLITS}
    return TaskData(folder.name, splits, template, word_list, label, kind).keep_listed_answers()


def _record(row: dict[str, str], source: str) -> Record:
    subject = take(row, "sub_label", source)
    return Record({**row, "subject": subject}, take(row, "obj_label", source), source, subject)


def read_word_list(path: Path, key: str = "task.word_list") -> list[str]:
    """The words answers may be, in file order without repeats.

    ``.txt`` holds one word a line. ``.json`` is P-tuning's ``29k-vocab.json``: lists per model name, the same words
    in each, some with the byte-level mark of a leading space. ``key`` names the list in an error.
    """
    if not path.is_file():
        raise DataError(f"{key}: file not found: {path}")
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
