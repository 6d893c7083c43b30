"""Documentation that cannot drift: the table of keys, links, shipped configurations, the README's two commands."""

import os
import re
import subprocess
from pathlib import Path

import pytest
from typer.testing import CliRunner

from megaptune.backbone.embedded import is_embedded
from megaptune.cli import app
from megaptune.config import load_config

ROOT = Path(__file__).resolve().parents[2]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
CONFIGS = sorted((ROOT / "configs").glob("*.yaml"))
SITES = sorted((ROOT / "configs" / "site").glob("*.yaml"))
PRESETS = sorted((ROOT / "configs" / "presets").glob("ptuning_lama*.yaml"))


def test_the_table_of_keys_is_what_the_program_prints():
    printed = CliRunner().invoke(app, ["options"]).output
    assert printed in (ROOT / "docs" / "configuration.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    targets = re.findall(r"\]\(([^)#]+)\)", page.read_text(encoding="utf-8"))
    local = [target for target in targets if "://" not in target]
    assert [target for target in local if not (page.parent / target).exists()] == []


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.name)
def test_shipped_configurations_load(path, monkeypatch):
    for name in ("MEGAPTUNE_DATA", "MEGAPTUNE_BACKBONES"):
        monkeypatch.setenv(name, os.environ.get(name, "/somewhere"))
    load_config(path, is_embedded=is_embedded)


@pytest.mark.parametrize("path", [*SITES, *PRESETS], ids=lambda path: path.name)
def test_site_files_and_presets_fit_any_configuration(path, tmp_path, monkeypatch):
    monkeypatch.setenv("MEGAPTUNE_DATA", "/somewhere")
    config = tmp_path / "config.yaml"
    config.write_text(f"defaults: [{ROOT / 'configs' / 'lama_paper.yaml'}, {path}]")
    load_config(config, is_embedded=is_embedded)


def test_readme_commands_exist_and_ci_runs_the_test_command():
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    blocks = [block.strip() for block in re.findall(r"```\n(.*?)```", readme, flags=re.DOTALL)]
    makes = [block for block in blocks if block.startswith("make ")]
    assert makes == ["make quickstart", "make test"]
    for command in makes:
        done = subprocess.run([*command.split(), "--dry-run"], cwd=ROOT, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
    assert (ROOT / ".ci" / "run").read_text(encoding="utf-8").rstrip().endswith("\nmake test")


def test_the_configurations_that_the_readme_names_are_there():
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert all((ROOT / name).is_file() for name in re.findall(r"configs/\w+\.yaml", readme))


def test_shell_scripts_parse():
    for script in (ROOT / ".ci" / "run", *(ROOT / "launchers").glob("*.sh")):
        subprocess.run(["bash", "-n", str(script)], check=True)
