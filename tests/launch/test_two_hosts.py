"""Two hosts with a network between them: the same configuration through pdsh and through Open MPI, over real ssh."""

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from emulated_hosts import Host, emulated_hosts, missing, start_sshd
from launching import assert_finished_with_losses_of, environment

LAYOUT = ("parallel.tensor_parallel=2", "parallel.zero_stage=3")
"""Two ranks on each host: a tensor-parallel group on each, ZeRO's shares across them."""

ABSENT = [
    program
    for program in ("sshd", "ssh", "pdsh", "mpirun")
    if shutil.which(program, path="/usr/sbin:" + str(environment()["PATH"])) is None
]
WHY_NOT = missing() or (f"{', '.join(ABSENT)} not installed" if ABSENT else "")

pytestmark = [
    pytest.mark.dist,
    pytest.mark.slow,
    pytest.mark.skipif(bool(WHY_NOT), reason=f"{WHY_NOT}: several hosts were NOT tested"),
]


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[list[Host], dict[str, str], Path]]:
    """The hosts, the environment for commands on them, and a hostfile."""
    folder = tmp_path_factory.mktemp("hosts")
    with emulated_hosts(2, folder) as hosts:
        settings = environment(**start_sshd(hosts, folder))
        # DeepSpeed hands these to the other hosts; a root's mpirun wants to be told that it may.
        (folder / "exported").write_text("OMP_NUM_THREADS=1\n", encoding="utf-8")
        settings |= {"DS_ENV_FILE": str(folder / "exported")}
        settings |= {"OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1"}
        hostfile = folder / "hostfile"
        hostfile.write_text("n1 slots=2\nn2 slots=2\n", encoding="utf-8")
        yield hosts, settings, hostfile


def training(config: Path, run: Path, *overrides: str) -> list[str]:
    changed = (f"run.directory={run}", *overrides)
    return ["--config", str(config), *(part for override in changed for part in ("--set", override))]


def test_pdsh(cluster, config, one_rank, tmp_path):
    hosts, settings, hostfile = cluster
    done = hosts[0].run(
        *("deepspeed", "--hostfile", str(hostfile), "--num_nodes", "2", "megaptune/train.py"),
        *training(config, tmp_path / "run", *LAYOUT),
        **settings,
    )
    output = done.stdout + done.stderr
    assert done.returncode == 0, output
    assert_finished_with_losses_of(tmp_path / "run", one_rank, output)
    assert "4 ranks (torch) = 2 replicas x 2 tensor parallel, ZeRO 3" in output


def test_openmpi_through_hostfile_sh(cluster, config, one_rank, tmp_path):
    hosts, settings, hostfile = cluster
    done = hosts[0].run(
        *("launchers/hostfile.sh", *training(config, tmp_path / "run", *LAYOUT)),
        **settings,
        HOSTFILE=str(hostfile),
        LAUNCHER="openmpi",
        LAUNCHER_ARGS="--mca oob_tcp_if_include eth0 --mca btl_tcp_if_include eth0 --bind-to none",
        EXPORT="OMP_NUM_THREADS",
    )
    output = done.stdout + done.stderr
    assert done.returncode == 0, output
    assert_finished_with_losses_of(tmp_path / "run", one_rank, output)
    assert "4 ranks (openmpi) = 2 replicas x 2 tensor parallel, ZeRO 3" in output


def test_what_a_host_does_not_see_is_named_on_one_rank_and_all_leave(cluster, config, tiny, tmp_path):
    """n2 has neither the backbone nor the file system of the run directory."""
    hosts, settings, hostfile = cluster
    backbone, runs = tiny("llama"), tmp_path / "runs"
    runs.mkdir()
    for hidden in (backbone, runs):
        hosts[1].run("mount", "-t", "tmpfs", "tmpfs", str(hidden), check=True)
    try:
        done = hosts[0].run(
            *("deepspeed", "--hostfile", str(hostfile), "--num_nodes", "2", "--num_gpus", "1", "megaptune/train.py"),
            *training(config, runs / "run", "parallel.zero_stage=3"),
            **settings,
        )
    finally:
        for hidden in (backbone, runs):
            hosts[1].run("umount", str(hidden), check=True)
    output = done.stdout + done.stderr
    assert done.returncode == 4, output
    assert output.count("preflight 5, backbone: rank 1 (n2):") == 1, output
    assert f"preflight 7, run directory: rank 1 (n2) does not see what rank 0 writes at {runs / 'run'}" in output
    assert list(runs.iterdir()) == []
