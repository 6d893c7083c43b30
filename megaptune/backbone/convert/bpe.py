"""Tokenizers from GPT-2's byte-level BPE: the merges in OpenAI's ``vocab.bpe`` (or Hugging Face's ``merges.txt``)."""

import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from megaptune.backbone.description import load_tokenizer
from megaptune.errors import BackboneError, DataError, first_line

END_OF_TEXT = "<|endoftext|>"

Merge = tuple[str, str]
SaveTokenizer = Callable[[Path], None]

_TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "vocab.txt",
    "tokenizer.model",
    "sentencepiece.bpe.model",
    "spiece.model",
    "chat_template.jinja",
)


def byte_symbols() -> list[str]:
    """The 256 symbols that stand for bytes, in the order of GPT-2's ids: printable ones, then U+0100 onward."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    return [*map(chr, printable), *(chr(0x100 + extra) for extra in range(256 - len(printable)))]


def read_merges(path: Path) -> list[Merge]:
    """:raises DataError: no such file, or a line that is not a merge of two known symbols."""
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"--bpe-merges {path}: cannot be read: {first_line(error)}") from None
    known = set(byte_symbols())
    merges = []
    for number, line in enumerate(lines, start=1):
        if not line or (number == 1 and line.startswith("#version")):
            continue
        pair = line.rstrip("\r").split(" ")
        if len(pair) != 2 or not known.issuperset(pair):
            raise DataError(
                f"{path}:{number}: expected two symbols of GPT-2's byte-level BPE with a space between, found {line!r}"
            )
        merges.append((pair[0], pair[1]))
        known.add("".join(pair))
    if not merges:
        raise DataError(f"{path}: no merges: expected GPT-2's vocab.bpe or merges.txt")
    return merges


def gpt2_tokens(merges: Sequence[Merge]) -> list[str]:
    """Token by GPT-2 id: the bytes, the merges in order, the end of text. 50,257 for GPT-2's own merges."""
    return [*byte_symbols(), *map("".join, merges), END_OF_TEXT]


def read_vocabulary(path: Path, merges: Sequence[Merge]) -> dict[str, int]:
    """A ``vocab.json`` (``encoder.json``): token to id.

    :raises DataError: unreadable, or without a token that the merges make.
    """
    try:
        vocabulary = json.loads(path.read_text(encoding="utf-8"))
        good = all(isinstance(token, str) and type(index) is int for token, index in vocabulary.items())
    except (OSError, ValueError, AttributeError) as error:
        raise DataError(f"--tokenizer {path}: not a vocab.json: {first_line(error)}") from None
    missing = [token for token in gpt2_tokens(merges)[:-1] if token not in vocabulary]
    if not good or missing:
        what = f"no entry for {missing[0]!r}, which the merges make" if missing else "expected token: id"
        raise DataError(f"--tokenizer {path}: {what}")
    return vocabulary


def byte_level_tokenizer(
    vocabulary: Mapping[str, int], merges: Sequence[Merge], specials: Mapping[str, str], max_tokens: int
) -> Any:
    """A fast tokenizer that adds nothing to a text; ``specials`` by role, as ``{"eos_token": "</s>"}``."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE(vocab=dict(vocabulary), merges=list(merges)))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    tokenizer.add_special_tokens([AddedToken(token, special=True) for token in dict.fromkeys(specials.values())])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, model_max_length=max_tokens, clean_up_tokenization_spaces=False, **specials
    )


def gpt2_tokenizer(merges_file: Path, vocabulary_file: Path | None, max_tokens: int) -> Any:
    """GPT-2's own ids, or those of a ``vocab.json``.

    :raises DataError: files that are not what they should be.
    """
    merges = read_merges(merges_file)
    if vocabulary_file is None:
        vocabulary = {token: index for index, token in enumerate(gpt2_tokens(merges))}
    else:
        vocabulary = read_vocabulary(vocabulary_file, merges)
    roles = ("bos_token", "eos_token", "unk_token") if END_OF_TEXT in vocabulary else ()
    return byte_level_tokenizer(vocabulary, merges, dict.fromkeys(roles, END_OF_TEXT), max_tokens)


def copied_tokenizer(folder: Path) -> tuple[Any, SaveTokenizer]:
    """The tokenizer of a folder, and what copies its files.

    :raises BackboneError: no tokenizer there.
    """
    if not folder.is_dir():
        raise BackboneError(f"--tokenizer {folder}: expected the folder of a tokenizer")

    def save(target: Path) -> None:
        for name in _TOKENIZER_FILES:
            if (folder / name).is_file():
                shutil.copyfile(folder / name, target / name)

    return load_tokenizer(folder), save


def size(tokenizer: Any) -> int:
    """Rows that an embedding needs: the highest id and one."""
    return 1 + max(tokenizer.get_vocab().values())


def check_fits(tokenizer: Any, rows: int, what: str) -> None:
    """:raises BackboneError: when the tokenizer has ids that the embedding has no rows for."""
    if size(tokenizer) > rows:
        raise BackboneError(f"{what} has ids up to {size(tokenizer) - 1}, but the model has {rows} rows of embedding")
