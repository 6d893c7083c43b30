"""Who am I among how many, from what each launcher sets."""

import base64
import json
import socket
import subprocess
import sys
from types import SimpleNamespace

import pytest

from megaptune.errors import SetupError
from megaptune.run import topology
from megaptune.run.topology import Topology, agree, all_reduce_sum, launcher_hosts, on_main, read_environment

MASTER = {"MASTER_ADDR": "10.0.0.1", "MASTER_PORT": "29500"}
# As the launchers were seen to set them, for the third of four ranks on two nodes.
DEEPSPEED = {"RANK": "2", "WORLD_SIZE": "4", "LOCAL_RANK": "0", "LOCAL_SIZE": "2", **MASTER}
TORCHRUN = {"RANK": "2", "WORLD_SIZE": "4", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "2", "GROUP_RANK": "1", **MASTER}
SLURM = {
    "SLURM_JOB_ID": "77",
    "SLURM_STEP_ID": "0",
    "SLURM_PROCID": "2",
    "SLURM_NTASKS": "4",
    "SLURM_LOCALID": "0",
    "SLURM_NTASKS_PER_NODE": "2",
    "SLURM_STEP_NODELIST": "node[1-2]",
}
OPENMPI = {
    "OMPI_COMM_WORLD_RANK": "2",
    "OMPI_COMM_WORLD_SIZE": "4",
    "OMPI_COMM_WORLD_LOCAL_RANK": "0",
    "OMPI_COMM_WORLD_LOCAL_SIZE": "2",
}
MPICH = {"PMI_RANK": "2", "PMI_SIZE": "4", "MPI_LOCALRANKID": "0", "MPI_LOCALNRANKS": "2"}


@pytest.mark.parametrize(
    ("environment", "launcher"),
    [(DEEPSPEED, "torch"), (TORCHRUN, "torch"), (SLURM, "slurm"), (OPENMPI, "openmpi"), (MPICH, "mpich")],
    ids=["deepspeed", "torchrun", "slurm", "openmpi", "mpich"],
)
def test_every_launchers_names_mean_the_same_place(environment: dict[str, str], launcher: str):
    found = read_environment(environment)
    assert found == Topology(rank=2, world_size=4, local_rank=0, local_world_size=2, launcher=launcher)
    assert not found.is_main


def test_nothing_set_is_one_process():
    found = read_environment({"HOME": "somewhere"})
    assert found == Topology(0, 1, 0, 1, "none")
    assert found.is_main


def test_shell_inside_an_allocation_is_one_process():
    """salloc and sbatch set SLURM_PROCID for the script itself; only srun starts ranks, and sets the step."""
    environment = {name: value for name, value in SLURM.items() if name != "SLURM_STEP_ID"}
    assert read_environment(environment).world_size == 1


def test_torchrun_inside_srun_counts_its_own_ranks():
    assert read_environment({**SLURM, **TORCHRUN, "RANK": "1", "WORLD_SIZE": "8"}).rank == 1


def test_slurm_tasks_per_node_may_be_repeated():
    assert read_environment({**SLURM, "SLURM_NTASKS_PER_NODE": "2(x2)"}).local_world_size == 2


@pytest.mark.parametrize(("node", "size"), [("0", 2), ("2", 2), ("3", 1)])
def test_slurm_says_how_many_tasks_each_node_has(node: str, size: int):
    """Without --ntasks-per-node this is all that srun sets."""
    environment = {name: value for name, value in SLURM.items() if name != "SLURM_NTASKS_PER_NODE"}
    steps = {"SLURM_STEP_TASKS_PER_NODE": "2(x3),1", "SLURM_NODEID": node}
    assert read_environment({**environment, **steps}).local_world_size == size


def test_mpirun_inside_a_slurm_job_counts_mpis_ranks():
    """It starts its daemons through srun, whose variables the ranks inherit."""
    daemon = {**SLURM, "SLURM_PROCID": "1", "SLURM_NTASKS": "2"}
    assert read_environment({**daemon, **OPENMPI}).launcher == "openmpi"
    assert read_environment({**daemon, **MPICH}).launcher == "mpich"


def test_srun_that_speaks_pmi_is_srun():
    assert read_environment({**SLURM, "PMI_RANK": "2", "PMI_SIZE": "4"}).launcher == "slurm"


def test_slurm_hosts_by_rank(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(topology, "_slurm_hosts", lambda environment: ["node1", "node2"])
    environment = {**SLURM, "SLURM_STEP_TASKS_PER_NODE": "2,1"}
    place = Topology(rank=0, world_size=3, launcher="slurm")
    assert launcher_hosts(place, environment) == {0: "node1", 1: "node1", 2: "node2"}
    assert launcher_hosts(place, {**environment, "SLURM_DISTRIBUTION": "cyclic"}) == {}


def test_deepspeeds_hosts_stand_in_its_launchers_arguments(tmp_path):
    """A launcher is the parent process: here one whose child asks."""
    packed = base64.urlsafe_b64encode(json.dumps({"n1": [0, 1], "n2": [0]}).encode()).decode()
    ask = "from megaptune.run.topology import _deepspeed_hosts; print(_deepspeed_hosts())"
    parent = "import subprocess, sys; subprocess.run([sys.executable, '-c', sys.argv[2]], check=True)"
    command = [sys.executable, "-c", parent, f"--world_info={packed}", ask]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[('n1', 2), ('n2', 1)]"


def test_an_address_that_others_can_reach(monkeypatch: pytest.MonkeyPatch):
    def entry(address: str) -> SimpleNamespace:
        return SimpleNamespace(family=socket.AF_INET, address=address)

    found = {"lo": [entry("127.0.0.1")], "eth0": [entry("10.0.0.5")], "ib0": [entry("192.168.0.5")]}
    monkeypatch.setattr("psutil.net_if_addrs", lambda: found)
    monkeypatch.delenv("GLOO_SOCKET_IFNAME", raising=False)
    monkeypatch.setattr(socket, "gethostbyname", lambda name: "127.0.1.1")  # Debian's /etc/hosts
    assert topology._own_address() == "10.0.0.5"
    monkeypatch.setattr(socket, "gethostbyname", lambda name: "192.168.0.5")
    assert topology._own_address() == "192.168.0.5"
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "eth0")
    assert topology._own_address() == "10.0.0.5"


def test_a_port_that_is_no_number_is_refused(monkeypatch: pytest.MonkeyPatch):
    for name, value in {**DEEPSPEED, "MASTER_PORT": "tcp"}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(SetupError, match="MASTER_PORT is 'tcp', expected a number"):
        topology._export(read_environment(DEEPSPEED))


def test_without_a_local_size_all_ranks_share_the_node():
    environment = {name: value for name, value in DEEPSPEED.items() if name != "LOCAL_SIZE"}
    assert read_environment(environment).local_world_size == 4


def test_mpi_without_a_local_rank_is_the_first_of_its_node():
    assert read_environment({"PMI_RANK": "1", "PMI_SIZE": "2"}).local_rank == 0


@pytest.mark.parametrize("name", ["RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_SIZE"])
def test_rank_that_is_no_number_is_refused(name: str):
    with pytest.raises(SetupError, match="the torch environment holds a rank that is no number"):
        read_environment({**DEEPSPEED, name: "two"})


@pytest.mark.parametrize("rank", ["4", "-1"])
def test_rank_outside_the_world_is_refused_with_both(rank: str):
    with pytest.raises(SetupError, match=rf"RANK={rank} does not lie within WORLD_SIZE=4"):
        read_environment({**DEEPSPEED, "RANK": rank})


@pytest.mark.parametrize("name", ["MASTER_ADDR", "MASTER_PORT"])
def test_torch_environment_without_a_meeting_place_is_refused(name: str):
    environment = {key: value for key, value in DEEPSPEED.items() if key != name}
    with pytest.raises(SetupError, match=f"RANK is set but {name} is not: start with deepspeed, torchrun or srun"):
        read_environment(environment)


@pytest.mark.parametrize("name", ["RANK", "WORLD_SIZE"])
def test_half_an_environment_is_refused(name: str):
    environment = {key: value for key, value in DEEPSPEED.items() if key != name}
    with pytest.raises(SetupError):
        read_environment(environment)


# -- one process -----------------------------------------------------------------------------------------------------


def test_on_main_gives_the_result_or_the_error_of_rank_0():
    def fail() -> None:
        raise SetupError("no")

    assert on_main(Topology(), lambda: 3) == 3
    with pytest.raises(SetupError, match="no"):
        on_main(Topology(), fail)


def test_alone_there_is_nothing_to_sum_or_agree_on():
    import torch

    assert all_reduce_sum(torch.tensor([1.5, 2.0])).tolist() == [1.5, 2.0]
    assert agree({"a": 1}) == {"a": 1}
