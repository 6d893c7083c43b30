"""GPT-2's byte-level BPE written out plainly, and a few merges to try it with."""

import itertools
from pathlib import Path

import regex

MERGES = [
    ("h", "e"),
    ("l", "l"),
    ("ll", "o"),
    ("he", "llo"),
    ("Ġ", "w"),
    ("o", "r"),
    ("Ġw", "or"),
    ("l", "d"),
    ("Ġwor", "ld"),
    ("Ã", "©"),
]
"""The last one joins the two bytes of é."""

TEXTS = ["hello world", " world hello", "  hello\nworld! Don't 42", "café é 漢字 🙂", "x" * 40, "a\tb", ""]

_PIECES = regex.compile(r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+")


def symbols() -> dict[int, str]:
    """Byte to symbol."""
    table = {}
    extra = 0
    for byte in range(256):
        if 33 <= byte <= 126 or 161 <= byte <= 172 or 174 <= byte <= 255:
            table[byte] = chr(byte)
        else:
            table[byte] = chr(256 + extra)
            extra += 1
    return table


def ids_by_token(merges: list[tuple[str, str]]) -> dict[str, int]:
    """GPT-2's numbering."""
    table = symbols()
    printable = [table[byte] for byte in range(256) if ord(table[byte]) == byte]
    others = [table[byte] for byte in range(256) if ord(table[byte]) != byte]
    tokens = [*printable, *others, *(left + right for left, right in merges), "<|endoftext|>"]
    return {token: number for number, token in enumerate(tokens)}


def encode(text: str, merges: list[tuple[str, str]]) -> list[int]:
    """GPT-2 ids of a text: the earliest merge first, within each word."""
    rank = {pair: number for number, pair in enumerate(merges)}
    numbers = ids_by_token(merges)
    table = symbols()
    ids = []
    for word in _PIECES.findall(text):
        pieces = [table[byte] for byte in word.encode()]
        while len(pieces) > 1:
            pairs = list(itertools.pairwise(pieces))
            best = min(pairs, key=lambda pair: rank.get(pair, len(rank)))
            if best not in rank:
                break
            joined = []
            index = 0
            while index < len(pieces):
                if tuple(pieces[index : index + 2]) == best:
                    joined.append(best[0] + best[1])
                    index += 2
                else:
                    joined.append(pieces[index])
                    index += 1
            pieces = joined
        ids += [numbers[piece] for piece in pieces]
    return ids


def write_merges(path: Path, merges: list[tuple[str, str]] | None = None) -> Path:
    lines = "".join(f"{left} {right}\n" for left, right in merges or MERGES)
    path.write_text("#version: 0.2\n" + lines, encoding="utf-8")
    return path


def read_merges(path: Path) -> list[tuple[str, str]]:
    lines = path.read_text(encoding="utf-8").strip().split("\n")[1:]
    return [(line.split()[0], line.split()[1]) for line in lines]
