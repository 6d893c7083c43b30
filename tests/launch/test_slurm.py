"""A real Slurm job on two emulated nodes, through launchers/slurm.sbatch."""

import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from emulated_hosts import Host, emulated_hosts, missing
from launching import BIN, ROOT, assert_finished_with_losses_of, environment
from slurm_cluster import NEEDED, start_slurm

PATH = f"{environment()['PATH']}{os.pathsep}/usr/sbin"
ABSENT = [program for program in NEEDED if shutil.which(program, path=PATH) is None]
WHY_NOT = missing() or (f"{', '.join(ABSENT)} not installed" if ABSENT else "")

pytestmark = [
    pytest.mark.dist,
    pytest.mark.slow,
    pytest.mark.skipif(bool(WHY_NOT), reason=f"{WHY_NOT}: Slurm was NOT tested"),
]


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Host, dict[str, str]]]:
    """The node to submit from, and the environment for Slurm's commands."""
    folder = tmp_path_factory.mktemp("slurm")
    with emulated_hosts(2, folder) as hosts:
        yield hosts[0], environment(PATH=PATH, VENV=str(BIN.parent), **start_slurm(hosts, folder))


def submit(cluster: tuple[Host, dict[str, str]], output: Path, *arguments: str, **changed: str) -> tuple[int, str]:
    """Run the batch script from the checkout to its end: exit code and what the job said."""
    host, settings = cluster
    options = ["--wait", f"--chdir={ROOT}", f"--output={output}"]
    done = host.run("sbatch", *options, *arguments, **{**settings, **changed})
    said = output.read_text(encoding="utf-8") if output.exists() else ""
    return done.returncode, done.stdout + done.stderr + said


def test_a_job_on_two_nodes_gives_the_losses_of_one_process(cluster, config, one_rank, tmp_path):
    run = tmp_path / "run"
    code, said = submit(
        cluster,
        tmp_path / "job.out",
        *("--nodes=2", "--ntasks-per-node=2", "launchers/slurm.sbatch"),
        *("--config", str(config), "--set", f"run.directory={run}"),
        *("--set", "parallel.zero_stage=3", "--set", "parallel.tensor_parallel=2"),
    )
    assert code == 0, said
    assert_finished_with_losses_of(run, one_rank, said)
    assert "4 ranks (slurm) = 2 replicas x 2 tensor parallel, ZeRO 3" in said
    assert "on n[1-2], start 0" in said


def test_a_failed_preflight_ends_the_job_with_its_code(cluster, config, tmp_path):
    """The defaults of the script: two nodes, one task each."""
    run = tmp_path / "run"
    code, said = submit(
        cluster,
        tmp_path / "job.out",
        *("launchers/slurm.sbatch", "--config", str(config), "--set", f"run.directory={run}"),
        *("--set", "launch.min_free_disk_gib=1000000000"),
    )
    assert code == 3, said
    assert said.count("preflight 8, disk space: rank 0 (n1):") == 1, said
    assert "wanted 1e+09 GiB; free some, name another folder, or lower launch.min_free_disk_gib" in said
    assert not run.exists()
