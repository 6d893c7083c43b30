"""megaptune: P-tuning of language models too large for one device."""

import importlib.util
import sys
from pathlib import Path

__version__ = "0.1.0"


def _mount_kernels() -> None:
    """Make the checkout's top-level ``kernels/`` importable as ``megaptune.kernels``.

    A wheel carries the files at ``megaptune/kernels/``; a checkout and an editable install keep them beside the
    package. The folder has no ``__init__.py`` on purpose: transformers probes a top-level package called ``kernels``.
    """
    here = Path(__file__).resolve().parent
    folder = here.parent / "kernels"
    if (here / "kernels").is_dir() or not folder.is_dir():
        return
    name = f"{__name__}.kernels"
    spec = importlib.util.spec_from_loader(name, loader=None, is_package=True)
    assert spec is not None
    spec.submodule_search_locations = [str(folder)]
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    globals()["kernels"] = module


_mount_kernels()
