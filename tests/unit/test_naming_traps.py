"""Names that would shadow others.

``deepspeed megaptune/train.py`` starts with ``megaptune/`` first on ``sys.path``, and a launcher's helper processes may
keep it there: a ``types.py`` or a ``tokenizers/`` directly in it would be imported in place of the real one. And
``kernels``, ``tests`` or ``docker`` must not be importable packages of their own: transformers probes for a package
called ``kernels``.
"""

import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
TOP_LEVEL = sorted(
    {path.stem for path in (ROOT / "megaptune").glob("*.py")}
    | {path.name for path in (ROOT / "megaptune").iterdir() if path.is_dir()}
)
IMPORTABLE = [name for name in TOP_LEVEL if not name.startswith("__")]


def requirements() -> set[str]:
    """Import names of what megaptune requires, and of what that requires, as far as it is installed."""
    import re

    setup = (ROOT / "setup.py").read_text(encoding="utf-8")
    listed = re.search(r"install_requires=\[(.*?)\]", setup, re.DOTALL)
    assert listed is not None
    waiting = [re.split(r"[<>=!~ ]", name)[0] for name in re.findall(r'"([^"]+)"', listed[1])]
    distributions: set[str] = set()
    while waiting:
        name = re.sub(r"[-_.]+", "-", waiting.pop()).lower()
        if name in distributions:
            continue
        distributions.add(name)
        try:
            needed = metadata.requires(name) or []
        except metadata.PackageNotFoundError:
            continue
        waiting += [re.match(r"[\w.-]+", line)[0] for line in needed if "extra ==" not in line]
    return {
        module
        for module, owners in metadata.packages_distributions().items()
        if any(re.sub(r"[-_.]+", "-", owner).lower() in distributions for owner in owners)
    }


def test_requirements_are_found():
    assert {"torch", "deepspeed", "transformers", "yaml", "pydantic_core", "huggingface_hub"} <= requirements()


def test_no_module_is_called_like_one_of_the_standard_library():
    assert not set(IMPORTABLE) & sys.stdlib_module_names


def test_no_module_is_called_like_a_requirement():
    assert not set(IMPORTABLE) & requirements()


@pytest.mark.parametrize("folder", ["kernels", "docker", "configs", "launchers", "tests"])
def test_folder_beside_the_package_is_no_package(folder: str):
    assert not [path.relative_to(ROOT) for path in (ROOT / folder).rglob("__init__.py")]


def test_kernels_are_mounted_inside_the_package_and_nowhere_else():
    code = (
        "import importlib.util, megaptune\n"
        "from megaptune.kernels import dispatch\n"
        "spec = importlib.util.find_spec('kernels')\n"
        "assert spec is None or spec.origin is None, spec\n"
        "print(dispatch.__name__)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout.strip()) == (0, "megaptune.kernels.dispatch"), done.stderr


def test_package_list_of_the_installation_names_every_folder():
    """setup.py lists packages by hand; a new sub-package that is forgotten there is missing from the wheel."""
    text = (ROOT / "setup.py").read_text(encoding="utf-8")
    folders = {path.parent.name for path in (ROOT / "megaptune").glob("*/__init__.py")}
    assert not [name for name in folders if f'"megaptune.{name}"' not in text]
