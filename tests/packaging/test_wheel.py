"""A built wheel, installed away from the checkout; and the two naming traps around ``kernels``."""

import os
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = sysconfig.get_path("purelib")


def python(*arguments: str, folder: Path, first_on_path: list[Path] | None = None) -> subprocess.CompletedProcess[str]:
    """This interpreter in another folder, without the checkout on its path unless ``first_on_path`` says so."""
    path = os.pathsep.join(str(entry) for entry in first_on_path or [])
    environment = {**os.environ, "PYTHONPATH": path, "PYTHONSAFEPATH": "1"}
    command = [sys.executable, *arguments]
    return subprocess.run(
        command, cwd=folder, env=environment, capture_output=True, text=True, check=False, timeout=300
    )


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """Built from a copy, so that nothing is left in the checkout."""
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"
    source.mkdir()
    for name in ("megaptune", "kernels"):
        subprocess.run(["cp", "-r", str(ROOT / name), str(source / name)], check=True)
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        subprocess.run(["cp", str(ROOT / name), str(source)], check=True)
    build = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "-w", str(folder), str(source)]
    subprocess.run(build, check=True, capture_output=True, text=True)
    (built,) = folder.glob("*.whl")
    return built


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory):
    """The wheel's contents in a folder of their own; dependencies come from this environment."""
    folder = tmp_path_factory.mktemp("installed")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder)
    return folder


def test_the_wheel_carries_the_kernels_inside_and_nothing_at_top_level(wheel):
    names = zipfile.ZipFile(wheel).namelist()
    top = {name.split("/")[0] for name in names}
    assert {name for name in top if not name.endswith(".dist-info")} == {"megaptune"}
    assert "megaptune/kernels/dispatch.py" in names
    sources = {f"megaptune/{file.relative_to(ROOT / 'megaptune')}" for file in (ROOT / "megaptune").rglob("*.py")}
    sources |= {f"megaptune/kernels/csrc/{file.name}" for file in (ROOT / "kernels" / "csrc").iterdir()}
    assert sources <= set(names)
    assert {"megaptune/report/paper.yaml", "megaptune/report/report.css"} <= set(names)
    assert {"binding.cpp", "kernels.h", "verbalizer_softmax.cu"} <= {Path(name).name for name in names}


def test_help_from_the_wheel(installed, tmp_path):
    done = python("-m", "megaptune", "--help", folder=tmp_path, first_on_path=[installed])
    assert done.returncode == 0, done.stderr
    for command in ("train", "check", "preflight", "report", "checksum", "options", "env"):
        assert command in done.stdout


def test_a_run_from_the_wheel(installed, config_file, tmp_path):
    config = config_file("llama", train={"epochs": 1})
    code = "import megaptune, sys; print(megaptune.__file__); from megaptune.cli import main; main()"
    done = python("-c", code, "train", "--config", str(config), folder=tmp_path, first_on_path=[installed])
    assert done.returncode == 0, done.stderr
    assert str(installed) in done.stdout
    assert "test P@1, per cent" in done.stdout


REAL_KERNELS = "__version__ = '0.18.5'\n"


@pytest.mark.parametrize("first", ["checkout", "other package"])
def test_models_import_beside_another_package_called_kernels(tmp_path, first):
    """transformers asks for a package of that name; our folder, on the path or not, must not answer in its place."""
    other = tmp_path / "site" / "kernels"
    other.mkdir(parents=True)
    (other / "__init__.py").write_text(REAL_KERNELS)
    order = [ROOT, tmp_path / "site"] if first == "checkout" else [tmp_path / "site", ROOT]
    code = (
        "import kernels; assert kernels.__version__ == '0.18.5', kernels\n"
        "from megaptune.kernels import dispatch\n"
        "assert dispatch.__name__ == 'megaptune.kernels.dispatch'\n"
    )
    done = python("-c", code, folder=tmp_path, first_on_path=order)
    assert done.returncode == 0, done.stderr


def test_models_import_with_the_checkout_on_the_path(tmp_path):
    """DeepSpeed's runner and ``python -m pytest`` put the working directory there."""
    code = "import megaptune; from transformers import GPT2Config, GPT2Model; GPT2Model(GPT2Config(n_layer=1))"
    done = python("-c", code, folder=tmp_path, first_on_path=[ROOT])
    assert done.returncode == 0, done.stderr
