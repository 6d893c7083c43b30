"""Chunks of kept contexts as files: whole or not there, checked when they are opened, mapped and not read."""

import hashlib
import os
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

_CHECKSUM = "sha256"


class ContextFiles:
    """A folder of one backbone's chunks on one tensor-parallel shard."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def write(self, name: str, chunk: Tensor) -> None:
        """:raises OSError: no room, no permission; nothing is left behind."""
        target = self.folder / name
        if target.is_file():  # another rank of this host was here first
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        part = target.with_name(f".{name}.{os.getpid()}.part")
        whole = chunk.detach().cpu().contiguous()
        try:
            save_file({"chunk": whole}, part, metadata={_CHECKSUM: _checksum(whole)})
            part.replace(target)
        except SafetensorError as error:
            raise OSError(str(error)) from None
        finally:
            part.unlink(missing_ok=True)

    def map(self, name: str) -> Tensor:
        """A chunk that was just written."""
        with safe_open(self.folder / name, framework="pt") as file:
            return file.get_tensor("chunk")

    def read(self, name: str) -> Tensor | None:
        """The chunk as a map of its file; None where there is none or it is damaged, which is then removed."""
        target = self.folder / name
        if not target.is_file():
            return None
        try:
            chunk = self.map(name)
            with safe_open(target, framework="pt") as file:
                if file.metadata().get(_CHECKSUM) == _checksum(chunk):
                    return chunk
        except (OSError, SafetensorError, AttributeError):
            pass
        target.unlink(missing_ok=True)
        return None


def _checksum(chunk: Tensor) -> str:
    return hashlib.sha256(chunk.view(torch.uint8).numpy().data).hexdigest()
