"""fairseq's dict.txt: which row of the embedding is which of GPT-2's tokens.

A line is "token count"; the token is the number that GPT-2 gives it. fairseq's id is the line's number after the four
special symbols.
"""

import re
from collections.abc import Sequence
from pathlib import Path

from megaptune.backbone.convert import bpe
from megaptune.backbone.convert.conversion import Options
from megaptune.errors import BackboneError, ConfigError

_SPECIALS = {"bos_token": "<s>", "pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>"}  # ids 0 to 3
_FILLER = re.compile(r"madeupword\d+")


def vocabulary(source: Path, options: Options, rows: int, max_tokens: int) -> tuple[list[list[int]], bpe.SaveTokenizer]:
    """The ranges of ids that no text uses, and what writes the tokenizer.

    :raises BackboneError: no dict.txt, or one that fits neither the merges nor the embedding's ``rows``.
    :raises ConfigError: neither merges nor a tokenizer were given.
    """
    words = _dictionary(source / "dict.txt")
    first = len(_SPECIALS)
    if first + len(words) > rows:
        raise BackboneError(
            f"{source / 'dict.txt'}: {len(words)} words and {first} special symbols, but the model has only {rows} rows"
        )
    fillers = [first + index for index, word in enumerate(words) if _FILLER.fullmatch(word)]
    unused = _ranges([*fillers, *range(first + len(words), rows)])
    if options.tokenizer is not None:
        tokenizer, save = bpe.copied_tokenizer(options.tokenizer)
        bpe.check_fits(tokenizer, rows, f"the tokenizer of {options.tokenizer}")
        return unused, save
    if options.bpe_merges is None:
        raise ConfigError(
            "a fairseq checkpoint names GPT-2's BPE tokens by number: give their merges with --bpe-merges "
            "(GPT-2's vocab.bpe or merges.txt), or a finished tokenizer's folder with --tokenizer"
        )
    merges = bpe.read_merges(options.bpe_merges)
    ids = _fairseq_ids(words, bpe.gpt2_tokens(merges), source / "dict.txt")
    # Neither <s> nor </s> is added: fairseq trained on unbroken text, and the released P-tuning code feeds bare tokens.
    return unused, bpe.byte_level_tokenizer(ids, merges, _SPECIALS, max_tokens).save_pretrained


def _dictionary(path: Path) -> list[str]:
    """The words of a dict.txt, by line: ``word count``."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except FileNotFoundError:
        raise BackboneError(
            f"{path} is missing: without it nobody knows which row is which token; it comes in the checkpoint's archive"
        ) from None
    except (OSError, UnicodeDecodeError) as error:
        raise BackboneError(f"{path}: cannot be read: {error}") from None
    words: dict[str, None] = {}
    for number, line in enumerate(lines, start=1):
        pieces = line.removesuffix(" #fairseq:overwrite").split(" ")
        if len(pieces) != 2 or not pieces[0] or not pieces[1].isdecimal():
            raise BackboneError(f"{path}:{number}: expected 'token count', found {line!r}")
        if pieces[0] in words:
            raise BackboneError(f"{path}:{number}: {pieces[0]} stands here for the second time")
        words[pieces[0]] = None
    return list(words)


def _fairseq_ids(words: Sequence[str], tokens: Sequence[str], path: Path) -> dict[str, int]:
    """fairseq's id of each token: four special symbols, then the lines of dict.txt.

    :raises BackboneError: a word that is no GPT-2 token, or GPT-2 tokens without a line.
    """
    ids = {token: index for index, token in enumerate(_SPECIALS.values())}
    for line, word in enumerate(words):
        if not _FILLER.fullmatch(word) and not (word.isascii() and word.isdecimal() and int(word) < len(tokens)):
            raise BackboneError(
                f"{path}:{line + 1}: {word!r} is none of the {len(tokens)} GPT-2 tokens that the merges make: "
                "another BPE? Give its finished tokenizer with --tokenizer"
            )
        ids[tokens[int(word)] if word.isdecimal() else word] = len(_SPECIALS) + line
    # fairseq's own encoder never makes the last one, the end of text.
    missing = [f"{index} ({token})" for index, token in enumerate(tokens[:-1]) if token not in ids]
    if missing:
        raise BackboneError(
            f"{path} lacks {len(missing)} of the tokens that the merges make, such as {missing[0]}; "
            "other merges? Otherwise give a finished tokenizer with --tokenizer"
        )
    return ids


def _ranges(ids: Sequence[int]) -> list[list[int]]:
    """Ascending ids as ``[start, end)`` pairs."""
    ranges: list[list[int]] = []
    for index in ids:
        if ranges and ranges[-1][1] == index:
            ranges[-1][1] += 1
        else:
            ranges.append([index, index + 1])
    return ranges
