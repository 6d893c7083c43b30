"""Tiny backbones, facts and configurations for tests: real Hugging Face folders, real tokenizers, random weights.

Everything is made on the spot from fixed seeds, in well under a second a piece. A backbone is 32 wide and two layers
deep. Its tokenizer knows the words below: each is one token, after a space and at the start of a text. Any other word
falls into pieces.

    folder = save_tiny("llama", tmp_path / "llama")            # or "gpt2", "bert", "roberta"
    facts = write_facts(tmp_path, 24, 8, 8)                     # {"train": Path, "dev": Path, "test": Path}
    config = write_config(tmp_path, train={"epochs": 3})        # a file for `megaptune train --config`
"""

import json
import random
import string
from pathlib import Path
from typing import Any

import torch
import yaml
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

CAPITALS = {
    "Paris": "France",
    "Lyon": "France",
    "Rome": "Italy",
    "Milan": "Italy",
    "Berlin": "Germany",
    "Munich": "Germany",
    "Madrid": "Spain",
    "Seville": "Spain",
    "Lisbon": "Portugal",
    "Porto": "Portugal",
    "Oslo": "Norway",
    "Bergen": "Norway",
    "Cairo": "Egypt",
    "Luxor": "Egypt",
    "Lima": "Peru",
    "Cusco": "Peru",
}
"""City -> country, two of each; a fact's answer is that of the first word of its subject."""

CITIES = list(CAPITALS)
COUNTRIES = sorted(set(CAPITALS.values()))
FILLERS = ["city", "lies", "capital", "old", "north", "river", "harbour", "market"]
OTHER_WORDS = ["a", "The", "the", "is", "in", "of", "near", ",", "."]
WORDS = [*CITIES, *COUNTRIES, *FILLERS, *OTHER_WORDS]
"""Every word that is one token."""

UNKNOWN_WORD = "Quetzaltenango"
"""A word of several tokens for every tokenizer here."""

KINDS = ("llama", "gpt2", "bert", "roberta")
"""llama and gpt2 are causal, bert and roberta masked. llama's tokenizer puts <s> first, gpt2's puts nothing."""

WIDTH, LAYERS, HEADS, MAX_TOKENS = 32, 2, 4, 64


def save_tiny(kind: str, folder: Path) -> Path:
    """Save config.json, model.safetensors and a fast tokenizer in ``folder``; the same bytes of weights every time."""
    from transformers.utils import logging

    tokenizer = tiny_tokenizer(kind)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(KINDS.index(kind))
        model = _model(kind, tokenizer)
    logging.disable_progress_bar()
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def write_facts(folder: Path, n_train: int = 24, n_dev: int = 8, n_test: int = 8) -> dict[str, Path]:
    """Write train.jsonl, dev.jsonl and test.jsonl: rows {"city", "country"} with different subjects of 1 to 5 words."""
    folder.mkdir(parents=True, exist_ok=True)
    rng = random.Random(7)
    seen: set[str] = set()
    paths = {}
    for split, count in (("train", n_train), ("dev", n_dev), ("test", n_test)):
        rows = []
        while len(rows) < count:
            city = CITIES[len(rows) % len(CITIES)]
            subject = " ".join([city, *rng.choices(FILLERS, k=rng.randrange(5))])
            if subject not in seen:
                seen.add(subject)
                rows.append({"city": subject, "country": CAPITALS[city]})
        paths[split] = write_jsonl(folder / f"{split}.jsonl", rows)
    return paths


def write_jsonl(path: Path, rows: list[dict[str, Any]]) -> Path:
    """One JSON object per line."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def tiny_settings(folder: Path, kind: str = "llama", **sections: Any) -> dict[str, Any]:
    """The mapping that :func:`write_config` writes."""
    settings: dict[str, Any] = {
        "run": {"directory": str(folder / "run"), "seeds": [0]},
        "backbone": {},
        "task": {"type": "custom", "name": "cities", "answer": "country", "subject": "city"},
        "prompt": {"template": "[P*2] {city} [P] [answer] .", "manual": "{city} is in [answer] ."},
        "train": {"epochs": 2, "global_batch": 8, "micro_batch": 4, "learning_rate": 1e-2},
        "monitor": {"tensorboard": False},
    }
    for name, section in sections.items():
        merge = isinstance(section, dict) and isinstance(settings.get(name), dict)
        settings[name] = {**settings[name], **section} if merge else section
    if "path" not in settings["backbone"]:
        place = folder / kind
        settings["backbone"]["path"] = str(place if place.is_dir() else save_tiny(kind, place))
    if "test" not in settings["task"] and settings["task"].get("type") == "custom":
        settings["task"].update({split: str(path) for split, path in write_facts(folder / "facts").items()})
    return settings


def write_config(folder: Path, kind: str = "llama", **sections: Any) -> Path:
    """Write ``folder/config.yaml``: a custom task on a tiny backbone, two epochs, batches of 8 in pieces of 4.

    ``sections`` are laid over it, section by section: ``write_config(folder, train={"epochs": 3})``. Unless they name
    ``backbone={"path": ...}``, a backbone of ``kind`` is saved in ``folder/kind``; unless they name
    ``task={"train": ..., "dev": ..., "test": ...}``, facts are written to ``folder/facts``. The run directory is
    ``folder/run``.
    """
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump(tiny_settings(folder, kind, **sections), sort_keys=False), encoding="utf-8")
    return path


# -- tokenizers ------------------------------------------------------------------------------------------------------


def tiny_tokenizer(kind: str, words: list[str] = WORDS) -> Any:
    """The tokenizer of a tiny backbone, or one like it that knows other ``words``."""
    from transformers import PreTrainedTokenizerFast

    if kind == "bert":
        specials = {"unk": "[UNK]", "pad": "[PAD]", "cls": "[CLS]", "sep": "[SEP]", "mask": "[MASK]"}
        trained = _wordpiece(list(specials.values()), words)
        trained.post_processor = _around(trained, "[CLS] $A [SEP]", "[CLS]", "[SEP]")
    elif kind == "roberta":
        specials = {"bos": "<s>", "pad": "<pad>", "eos": "</s>", "unk": "<unk>", "mask": "<mask>"}
        trained = _byte_level(list(specials.values()), words)
        specials.update(cls="<s>", sep="</s>")
        trained.post_processor = _around(trained, "<s> $A </s>", "<s>", "</s>")
    elif kind == "llama":
        specials = {"bos": "<s>", "eos": "</s>"}
        trained = _byte_level(list(specials.values()), words)
        trained.post_processor = _around(trained, "<s> $A", "<s>")
    else:
        specials = {"unk": "<|endoftext|>", "bos": "<|endoftext|>", "eos": "<|endoftext|>"}
        trained = _byte_level(["<|endoftext|>"], words)
    named = {f"{role}_token": token for role, token in specials.items()}
    return PreTrainedTokenizerFast(tokenizer_object=trained, model_max_length=MAX_TOKENS, **named)


def _byte_level(specials: list[str], words: list[str]) -> Tokenizer:
    """GPT-2's kind: every byte is a token, a space belongs to the word after it (``ĠParis``)."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=5000, special_tokens=specials, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator([form for word in words for form in (word, f" {word}")], trainer)
    return tokenizer


def _wordpiece(specials: list[str], words: list[str]) -> Tokenizer:
    """BERT's kind, cased: a word's later pieces start with ``##``. Written out: its trainer's ids differ run by run."""
    letters = string.ascii_letters
    pieces = [*specials, *letters, *(f"##{letter}" for letter in letters), *words]
    vocabulary = {piece: index for index, piece in enumerate(dict.fromkeys(pieces))}
    tokenizer = Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=False, strip_accents=False)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    return tokenizer


def _around(tokenizer: Tokenizer, pattern: str, *specials: str) -> processors.TemplateProcessing:
    ids = [(token, tokenizer.token_to_id(token)) for token in specials]
    return processors.TemplateProcessing(single=pattern, special_tokens=ids)


# -- models ----------------------------------------------------------------------------------------------------------


def _model(kind: str, tokenizer: Any) -> Any:
    import transformers as hf

    size = len(tokenizer)
    shape = {"hidden_size": WIDTH, "num_hidden_layers": LAYERS, "num_attention_heads": HEADS, "vocab_size": size}
    shape |= {"intermediate_size": 2 * WIDTH, "max_position_embeddings": MAX_TOKENS}
    ids = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
    pad = {"pad_token_id": tokenizer.pad_token_id}
    if kind == "llama":
        config = hf.LlamaConfig(num_key_value_heads=2, initializer_range=0.2, **shape, **ids)
        return hf.LlamaForCausalLM(config)
    if kind == "gpt2":
        sizes = {"n_embd": WIDTH, "n_layer": LAYERS, "n_head": HEADS, "n_positions": MAX_TOKENS, "vocab_size": size}
        return hf.GPT2LMHeadModel(hf.GPT2Config(initializer_range=0.2, **sizes, **ids))
    if kind == "bert":
        return hf.BertForMaskedLM(hf.BertConfig(initializer_range=0.2, **shape, **pad))
    # RoBERTa counts positions from padding_idx + 1.
    shape["max_position_embeddings"] += tokenizer.pad_token_id + 1
    return hf.RobertaForMaskedLM(hf.RobertaConfig(initializer_range=0.2, type_vocab_size=1, **shape, **pad, **ids))
