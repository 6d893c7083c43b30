"""A text file as lines, lines as token ids, ids as batches of rows of similar length.

A row is one line: a prompt is later read from position 0 with nothing before it, and so are sentences here.
"""

import gzip
import hashlib
import zlib
from dataclasses import dataclass
from typing import Any

import numpy as np

from megaptune.errors import DataError, first_line
from megaptune.pretraining.config import CorpusSection

_POOL_BATCHES = 64  # lines of so many batches are sorted by length together
_CALL_LINES = 10_000  # of one call of the tokenizer


@dataclass(frozen=True)
class Lines:
    train: list[str]
    held_out: list[str]
    left_out: int  # lines longer than max_words
    sha256: str  # of the file's bytes


def read_lines(corpus: CorpusSection, seed: int) -> Lines:
    """The lines that are not blank, in file order, divided by ``seed``.

    :raises DataError: a file that is missing, damaged, not UTF-8, or too short.
    """
    try:
        raw = corpus.path.read_bytes()
        text = (gzip.decompress(raw) if corpus.path.suffix == ".gz" else raw).decode("utf-8")
    except FileNotFoundError:
        raise DataError(f"corpus.path: file not found: {corpus.path}") from None
    except UnicodeDecodeError as error:
        raise DataError(f"{corpus.path}: not UTF-8 text (byte {error.start})") from None
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"{corpus.path}: cannot be read: {first_line(error)}") from None
    lines = [line.strip() for line in text.split("\n") if line.strip()]
    kept = [line for line in lines if corpus.max_words is None or len(line.split()) <= corpus.max_words]
    order = np.random.default_rng(seed).permutation(len(kept))[: corpus.limit_lines]
    if len(order) <= corpus.held_out_lines:
        raise DataError(
            f"{corpus.path}: {len(order)} usable lines of {len(lines)}; corpus.held_out_lines takes "
            f"{corpus.held_out_lines} and leaves none to train on"
        )
    held_out, train = np.sort(order[: corpus.held_out_lines]), np.sort(order[corpus.held_out_lines :])
    return Lines(
        [kept[index] for index in train],
        [kept[index] for index in held_out],
        len(lines) - len(kept),
        hashlib.sha256(raw).hexdigest(),
    )


def encode(lines: list[str], tokenizer: Any, max_tokens: int) -> list[np.ndarray]:
    """Token ids of each line, int32 [T]: between [CLS] and [SEP], or before the end-of-text token; T <= max_tokens."""
    before = [] if tokenizer.cls_token_id is None else [tokenizer.cls_token_id]
    after = [tokenizer.eos_token_id if tokenizer.sep_token_id is None else tokenizer.sep_token_id]
    room = max_tokens - len(before) - len(after)
    rows = []
    for start in range(0, len(lines), _CALL_LINES):
        ids = tokenizer(lines[start : start + _CALL_LINES], add_special_tokens=False, verbose=False)["input_ids"]
        rows += [np.array([*before, *line[:room], *after], dtype=np.int32) for line in ids]
    return rows


def batches(rows: list[np.ndarray], batch_tokens: int, generator: np.random.Generator | None) -> list[np.ndarray]:
    """Indices of rows, batch by batch: each row once, at most ``batch_tokens`` with padding (or a single row).

    ``generator`` shuffles rows and batches; without one, all rows are sorted by length.
    """
    lengths = np.array([len(row) for row in rows])
    order = np.arange(len(rows)) if generator is None else generator.permutation(len(rows))
    pool_rows = len(rows) if generator is None else max(1, int(_POOL_BATCHES * batch_tokens / lengths.mean()))
    found = []
    for start in range(0, len(order), pool_rows):
        pool = order[start : start + pool_rows]
        pool = pool[np.argsort(-lengths[pool], kind="stable")]
        while len(pool):
            count = max(1, batch_tokens // int(lengths[pool[0]]))
            found.append(pool[:count])
            pool = pool[count:]
    if generator is not None:
        generator.shuffle(found)
    return found
