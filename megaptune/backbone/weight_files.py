"""The safetensors of a backbone folder: which there are, whether they are whole, and what identifies them."""

import hashlib
import json
import re
from pathlib import Path

from safetensors import SafetensorError, safe_open

from megaptune.errors import BackboneError

CHECKSUMS = "SHA256SUMS"
_INDEX = "model.safetensors.index.json"
_SINGLE = "model.safetensors"


def weight_files(folder: Path) -> list[Path]:
    """The files that hold a folder's weights, as its index (or the one file) names them.

    :raises BackboneError: no such folder, no config, no weights, or a part that is missing.
    """
    if not folder.is_dir():
        raise BackboneError(f"backbone.path: folder not found: {folder}")
    if not (folder / "config.json").is_file():
        raise BackboneError(f"{folder} has no config.json: expected a Hugging Face model folder")
    if (folder / _INDEX).is_file():
        try:
            parts = sorted(set(json.loads((folder / _INDEX).read_text(encoding="utf-8"))["weight_map"].values()))
        except (json.JSONDecodeError, KeyError, AttributeError, TypeError, UnicodeDecodeError):
            raise BackboneError(f"{folder / _INDEX}: not a safetensors index") from None
        if not parts:
            raise BackboneError(f"{folder / _INDEX}: not a safetensors index")
        missing = [part for part in parts if not (folder / part).is_file()]
        if missing:
            raise BackboneError(
                f"{folder}: {len(missing)} of {len(parts)} weight files are missing: {', '.join(missing)}"
            )
        return [folder / part for part in parts]
    if (folder / _SINGLE).is_file():
        return [folder / _SINGLE]
    other = sorted(file.name for file in folder.iterdir() if file.suffix in (".bin", ".pt", ".pth", ".gguf"))
    hint = f"; {', '.join(other)} must be converted to safetensors first (save_pretrained does it)" if other else ""
    raise BackboneError(f"{folder} has no weights: expected {_SINGLE} or {_INDEX}{hint}")


def has_weights(folder: Path) -> bool:
    """Whether there are weights in a folder, whole or not."""
    return (folder / _INDEX).is_file() or (folder / _SINGLE).is_file()


def has_tokenizer(folder: Path) -> bool:
    """Whether a folder holds a tokenizer's files."""
    return any((folder / name).is_file() for name in ("tokenizer.json", "vocab.json", "vocab.txt", "tokenizer.model"))


def check_headers(folder: Path) -> int:
    """Open every weight file, which checks that its header fits its length; the number of bytes in all.

    :raises BackboneError: naming the file that is truncated or has a damaged header.
    """
    total_bytes = 0
    for file in weight_files(folder):
        try:
            with safe_open(file, framework="pt"):
                total_bytes += file.stat().st_size
        except (SafetensorError, OSError) as error:
            raise BackboneError(
                f"{file}: truncated or damaged safetensors file ({error}); copy or convert it again"
            ) from None
    return total_bytes


def verify_checksums(folder: Path) -> None:
    """Compare the weight files' SHA-256 with those on record; a file without a record is not read.

    The record is ``SHA256SUMS``, or the file name that a Hugging Face cache gives a link's target.

    :raises BackboneError: naming a file whose bytes changed.
    """
    recorded = _recorded_checksums(folder)
    for file in weight_files(folder):
        expected = recorded.get(file.name)
        if expected is None:
            continue
        found = file_checksum(file)
        if found != expected:
            raise BackboneError(
                f"{file}: its bytes changed: SHA-256 {found[:12]}..., on record {expected[:12]}...; "
                "copy or convert it again"
            )


def file_checksum(file: Path) -> str:
    with file.open("rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


def write_checksums(folder: Path) -> Path:
    """Record the weight files' sums in ``SHA256SUMS`` (the format of ``sha256sum -c``)."""
    lines = [f"{file_checksum(file)}  {file.name}\n" for file in weight_files(folder)]
    target = folder / CHECKSUMS
    target.write_text("".join(lines), encoding="utf-8")
    return target


def _recorded_checksums(folder: Path) -> dict[str, str]:
    recorded = {}
    for file in weight_files(folder):
        target = file.resolve().name
        if file.is_symlink() and re.fullmatch(r"[0-9a-f]{64}", target):
            recorded[file.name] = target
    if (folder / CHECKSUMS).is_file():
        for line in (folder / CHECKSUMS).read_text(encoding="utf-8").splitlines():
            checksum, _, name = line.strip().partition(" ")
            recorded[name.strip().removeprefix("*")] = checksum.lower()  # a star marks sha256sum's binary mode
    return recorded
