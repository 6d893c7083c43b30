"""The same configuration through the real launchers: DeepSpeed's, torchrun, and none."""

import json
import shutil
import sys
from pathlib import Path

import pytest
from launching import ROOT, assert_finished_with_losses_of, free_port, start
from runs import losses, metrics

pytestmark = [pytest.mark.dist, pytest.mark.slow]


@pytest.mark.parametrize("stage", [0, 3])
def test_deepspeed_with_two_ranks_gives_the_losses_of_one_process(config, one_rank, tmp_path, stage):
    run = tmp_path / "run"
    done = start(
        *("deepspeed", "--num_gpus", "2", "--master_port", free_port(), "megaptune/train.py", "--config", str(config)),
        *("--set", f"run.directory={run}", "--set", f"parallel.zero_stage={stage}"),
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert losses(run) == pytest.approx(losses(one_rank), rel=1e-5)
    assert f"2 ranks (torch) = 2 replicas x 1 tensor parallel, ZeRO {stage}" in done.stdout
    assert done.stdout.count("test P@1, per cent") == 1  # rank 0 alone speaks
    assert json.loads((run / "state.json").read_text())["status"] == "finished"


def test_torchrun(config, one_rank, tmp_path):
    run = tmp_path / "run"
    done = start(
        *("torchrun", "--nproc-per-node", "2", "--master-port", free_port(), "megaptune/train.py"),
        *("--config", str(config), "--set", f"run.directory={run}"),
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert losses(run) == pytest.approx(losses(one_rank), rel=1e-5)


def test_a_mistake_is_told_once_and_its_exit_code_reaches_the_shell(config, tmp_path):
    done = start(
        *("deepspeed", "--num_gpus", "2", "--master_port", free_port(), "megaptune/train.py", "--config", str(config)),
        *("--set", "train.learning_rat=1", "--set", f"run.directory={tmp_path / 'run'}"),
    )
    assert done.returncode == 2
    assert (done.stdout + done.stderr).count("did you mean `train.learning_rate`") == 1
    assert not (tmp_path / "run").exists()


def test_the_second_start_of_a_finished_run_only_prints_its_table(config, one_rank):
    before = metrics(one_rank)
    done = start(sys.executable, "megaptune/train.py", "--config", str(config), "--set", f"run.directory={one_rank}")
    assert done.returncode == 0, done.stderr
    assert "done before" in done.stdout
    assert "test P@1, per cent" in done.stdout
    assert metrics(one_rank) == before


def test_preflight_prints_its_numbered_checks_and_starts_nothing(config, tmp_path):
    done = start(
        *("deepspeed", "--num_gpus", "2", "--master_port", free_port(), "--no_local_rank", "--module", "megaptune"),
        *("preflight", "--config", str(config), "--set", f"run.directory={tmp_path / 'run'}"),
        *("--set", "launch.min_free_disk_gib=1e9"),
    )
    assert done.returncode == 3, done.stdout + done.stderr
    rows = [line.split() for line in done.stdout.splitlines()]
    verdicts = {row[0]: "ok" if "ok" in row else "FAILED" for row in rows if {"ok", "FAILED"} & set(row)}
    assert verdicts == {**{str(number): "ok" for number in range(1, 10)}, "8": "FAILED"}
    assert done.stderr.count("error: 1 of 9 checks failed") == 1
    assert not (tmp_path / "run").exists()


# -- launchers/ ------------------------------------------------------------------------------------------------------


def test_local_sh(config, one_rank, tmp_path):
    run = tmp_path / "run"
    done = start("launchers/local.sh", "--config", str(config), "--set", f"run.directory={run}", RANKS="2")
    assert done.returncode == 0, done.stdout + done.stderr
    assert_finished_with_losses_of(run, one_rank, done.stdout + done.stderr)
    assert "2 ranks (torch)" in done.stdout


@pytest.mark.skipif(shutil.which("mpirun") is None, reason="mpirun is not installed: Open MPI was NOT tested")
def test_mpirun_sh_finds_the_meeting_place_by_itself(config, one_rank, tmp_path):
    run = tmp_path / "run"
    done = start(
        *("launchers/mpirun.sh", "--config", str(config), "--set", f"run.directory={run}"),
        **{"RANKS": "2", "MPIRUN_ARGS": "--allow-run-as-root --oversubscribe --bind-to none"},
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert_finished_with_losses_of(run, one_rank, done.stdout + done.stderr)
    assert "2 ranks (openmpi)" in done.stdout


def test_hostfile_sh_says_what_is_missing(config, tmp_path):
    def refusal(**settings: str) -> str:
        done = start("launchers/hostfile.sh", "--config", str(config), **settings)
        assert done.returncode == 3, done.stdout + done.stderr
        return done.stderr

    hosts = tmp_path / "hosts"
    message = refusal(HOSTFILE=str(hosts), NODES="4")
    assert f"no hostfile at {hosts}: DeepSpeed cannot start more than one node without one" in message
    hosts.write_text("# nobody yet\n")
    assert f"{hosts} has no line 'NAME slots=RANKS'" in refusal(HOSTFILE=str(hosts))
    hosts.write_text("nowhere.invalid slots=2\n")
    assert f"NODES=2, but {hosts} names 1 hosts" in refusal(HOSTFILE=str(hosts), NODES="2")
    assert "LAUNCHER is 'rsh', expected pdsh or openmpi" in refusal(HOSTFILE=str(hosts), LAUNCHER="rsh")
    if shutil.which("pdsh"):
        assert "host nowhere.invalid" in refusal(HOSTFILE=str(hosts))


@pytest.mark.parametrize("script", sorted((ROOT / "launchers").glob("*.sh")), ids=lambda script: script.name)
def test_usage(script: Path):
    if script.name != "setup_env.sh":
        done = start(str(script))
        assert done.returncode == 2
        assert f"launchers/{script.name} --config" in done.stdout


def test_slurm_sbatch_refuses_to_run_outside_a_job():
    done = start("launchers/slurm.sbatch", "--config", "x.yaml", SLURM_JOB_ID="")
    assert done.returncode == 3
    assert "this is a batch script: sbatch launchers/slurm.sbatch --config" in done.stderr


@pytest.mark.skipif(shutil.which("shellcheck") is None, reason="shellcheck is not installed: scripts were NOT checked")
def test_shell_scripts_pass_shellcheck():
    scripts = [ROOT / ".ci" / "run", *(ROOT / "launchers").iterdir(), *(ROOT / "docker").glob("*.sh")]
    done = start("shellcheck", *map(str, scripts))
    assert done.returncode == 0, done.stdout
