"""All eight SuperGLUE tasks in a few words each, in the official layout, and tiny backbones whose tokenizers know them.

    root = write_superglue(tmp_path / "data")            # <task>/{train,dev32,val,test}.jsonl, unlabeled too
    folder = save_backbone("llama", tmp_path / "llama")  # or "bert"
    config = write_config(tmp_path, root, folder, tasks=["RTE"], methods=["ptuning"])

Facts are drawn from fixed seeds; nobody needs to learn anything from them.
"""

import json
import random
import re
from pathlib import Path
from typing import Any, get_args

import tiny
import torch
import yaml

from megaptune.patterns import TaskName, load_patterns

ROOT = Path(__file__).resolve().parents[2]
PATTERNS = ROOT / "configs" / "patterns" / "all.yaml"
TASKS: tuple[TaskName, ...] = get_args(TaskName)
CONTEXT = 160

NAMES = ["Anna", "Tom", "Mia", "Lars", "Oslo", "Rome"]
DEEDS = ["won the race", "lost the old hat", "held the rope", "sold a boat"]


def write_superglue(root: Path, train: int = 12, dev: int = 6, val: int = 8, test: int = 3, unlabeled: int = 0) -> Path:
    """The same bytes every time. WSC's train has true examples only, as FewGLUE's."""
    rng = random.Random(11)
    counts = {"train": train, "dev32": dev, "val": val, "test": test}
    counts |= {"unlabeled": unlabeled} if unlabeled else {}
    for task in TASKS:
        number = 0
        for split, count in counts.items():
            rows = []
            for _ in range(count):
                rows.append(_row(task, number, rng, split))
                number += 1
            tiny.write_jsonl(root / task / f"{split}.jsonl", rows)
    return root


def _row(task: TaskName, n: int, rng: random.Random, split: str) -> dict[str, Any]:
    labelled = split not in ("test", "unlabeled")
    one, other = rng.sample(NAMES, 2)
    deed, another = rng.sample(DEEDS, 2)
    story = f"{one} {deed}. {other} {another}. " + " ".join(rng.choices(NAMES, k=rng.randrange(4)))
    true = n % 2 == 0
    row: dict[str, Any] = {"idx": n}
    if task == "BoolQ":
        row |= {"passage": story, "question": f"{one} {deed}", "label": true}
    elif task == "CB":
        labels = ["entailment", "contradiction", "neutral"]
        row |= {"premise": story, "hypothesis": f"{one} {deed}.", "label": labels[n % 3]}
    elif task == "COPA":
        question = ("cause", "effect")[n % 2]
        row |= {"premise": f"{one} {deed}.", "choice1": f"{other} {another}.", "choice2": f"{one} slept."}
        row |= {"question": question, "label": rng.randrange(2)}
    elif task == "MultiRC":
        answers = [{"text": name, "idx": 10 * n + k, "label": int(name == one)} for k, name in enumerate((one, other))]
        if not labelled:
            answers = [{key: value for key, value in answer.items() if key != "label"} for answer in answers]
        row["passage"] = {"text": story, "questions": [{"question": f"Who {deed}?", "idx": n, "answers": answers}]}
        return row
    elif task == "RTE":
        row |= {"premise": story, "hypothesis": f"{one} {deed}.", "label": ("entailment", "not_entailment")[n % 2]}
    elif task == "WiC":
        first, second = f"{one} held the rope.", f"The rope held {other}."
        row |= {"word": "hold", "sentence1": first, "sentence2": second, "label": true}
        for key, sentence in (("1", first), ("2", second)):
            row |= {f"start{key}": sentence.index("held"), f"end{key}": sentence.index("held") + 4}
    elif task == "WSC":
        text = f"{one} held the rope while {other} slept, and he {deed}."
        spans = {"span1_text": one, "span1_index": 0, "span2_text": "he", "span2_index": 8}
        row |= {"text": text, "target": spans, "label": True if split == "train" else true}
    else:
        passage = f"{one} {deed}. {other} {another}.\n@highlight\n{one} slept"
        entities = [{"start": passage.index(name), "end": passage.index(name) + len(name) - 1} for name in (one, other)]
        query = {"query": f"@placeholder {another} in the race", "idx": n}
        if labelled:
            query["answers"] = [{**entities[1], "text": other}]
        return {"source": "made", "idx": n, "passage": {"text": passage, "entities": entities}, "qas": [query]}
    if not labelled:
        del row["label"]
    return row


def save_backbone(kind: str, folder: Path) -> Path:
    """A tiny backbone that reads CONTEXT tokens and knows every word of the patterns and the data as one token."""
    texts = [*NAMES, *DEEDS, "slept held hold rope Who in the race he while and because so because. The"]
    texts += [json.dumps(patterns.model_dump()) for patterns in load_patterns(PATTERNS).values()]
    words = sorted({word for text in texts for word in re.findall(r"\w+|[^\w\s]", text)})
    tokenizer = tiny.tiny_tokenizer(kind, words)
    before, tiny.MAX_TOKENS = tiny.MAX_TOKENS, CONTEXT
    try:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(5)
            model = tiny._model(kind, tokenizer)
    finally:
        tiny.MAX_TOKENS = before
    model.save_pretrained(folder)
    tokenizer.model_max_length = CONTEXT
    tokenizer.save_pretrained(folder)
    return folder


def settings(root: Path, backbone: Path, run: Path, **sections: Any) -> dict[str, Any]:
    """A few steps of a run over these data; ``sections`` are laid over it, ``task`` among them."""
    found: dict[str, Any] = {
        "defaults": [str(PATTERNS)],
        "run": {"directory": str(run), "seeds": [0]},
        "backbone": {"path": str(backbone)},
        "task": {"type": "superglue", "root": str(root), "splits": {"dev": "dev32"}},
        "methods": ["manual", "ptuning"],
        "train": {"epochs": 1, "global_batch": 8, "micro_batch": 4, "learning_rate": 1e-2, "lm_learning_rate": 1e-4},
        "evaluation": {"batch": 8},
        "monitor": {"tensorboard": False},
    }
    for name, section in sections.items():
        merge = isinstance(section, dict) and isinstance(found.get(name), dict)
        found[name] = {**found[name], **section} if merge else section
    return found


def write_config(folder: Path, root: Path, backbone: Path, **sections: Any) -> Path:
    """Write ``folder/config.yaml``; the run directory is ``folder/run``."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump(settings(root, backbone, folder / "run", **sections), sort_keys=False))
    return path
