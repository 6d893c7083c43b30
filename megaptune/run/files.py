"""Files that are either whole or not there."""

import json
import os
from pathlib import Path
from typing import Any


def write_whole(path: Path, text: str) -> None:
    """Write beside the target, flush to disk, rename over it."""
    write_bytes(path, text.encode())


def write_bytes(path: Path, content: bytes) -> None:
    """:func:`write_whole` of what is no text."""
    part = path.with_name(f".{path.name}.part")
    with part.open("wb") as handle:
        handle.write(content)
        handle.flush()
        os.fsync(handle.fileno())
    part.replace(path)


def write_json(path: Path, value: Any) -> None:
    write_whole(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def read_json(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


def flush(path: Path) -> None:
    """Bring a written file, or the renames inside a folder, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
