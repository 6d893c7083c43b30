"""A real Slurm cluster on emulated hosts: munged and slurmctld on the first, slurmd on all.

settings = start_slurm(hosts, tmp_path)            # the environment for sbatch, srun, squeue
hosts[0].run("sbatch", "--wait", "job.sbatch", **settings)

No systemd, no cgroups, no accounting; the daemons end with their hosts.
"""

import secrets
import socket
import time
from collections.abc import Callable
from pathlib import Path

from emulated_hosts import Host

NEEDED = ("munged", "slurmctld", "slurmd", "sbatch", "srun")

SETTINGS = """
ClusterName=test
SlurmctldHost={controller}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
CredType=cred/munge
AuthInfo=socket={folder}/munge.socket
MpiDefault=none
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SwitchType=switch/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SlurmdParameters=config_overrides
ReturnToService=2
KillWait=5
SchedulerParameters=sched_interval=2,batch_sched_delay=0
AccountingStorageType=accounting_storage/none
JobAcctGatherType=jobacct_gather/none
JobCompType=jobcomp/none
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd-%n.log
PartitionName=main Nodes=ALL Default=YES State=UP
"""


def start_slurm(hosts: list[Host], folder: Path, cpus: int = 2) -> dict[str, str]:
    """Start the daemons and wait until every node is idle; nodes may claim more ``cpus`` than the machine has."""
    configuration = folder / "slurm.conf"
    nodes = [f"NodeName={host.name} NodeAddr={host.address} CPUs={cpus} State=UNKNOWN\n" for host in hosts]
    controller = f"{hosts[0].name}({hosts[0].address})"
    configuration.write_text(SETTINGS.format(folder=folder, controller=controller) + "".join(nodes), encoding="utf-8")
    (folder / "state").mkdir()
    key = folder / "munge.key"
    key.touch(mode=0o400)
    key.write_bytes(secrets.token_bytes(1024))
    munge = {"key-file": key, "socket": folder / "munge.socket", "pid-file": folder / "munge.pid"}
    munge |= {"log-file": folder / "munge.log", "seed-file": folder / "munge.seed"}
    options = [f"--{name}={path}" for name, path in munge.items()]
    settings = {"SLURM_CONF": str(configuration)}
    hosts[0].start("munged", "--force", "--foreground", *options, log=folder / "munged.out")
    _wait_until(lambda: munge["socket"].exists(), folder)
    hosts[0].start("slurmctld", "-D", log=folder / "slurmctld.out", **settings)
    for host in hosts:
        (folder / f"spool-{host.name}").mkdir()
        host.start("slurmd", "-D", "-N", host.name, log=folder / f"slurmd-{host.name}.out", **settings)

    def all_idle() -> bool:
        states = hosts[0].run("sinfo", "--noheader", "--Node", "--format=%T", **settings).stdout.split()
        return states == ["idle"] * len(hosts)

    _wait_until(all_idle, folder)
    return settings


def _wait_until(done: Callable[[], bool], folder: Path) -> None:
    deadline = time.monotonic() + 40
    while not done():
        if time.monotonic() > deadline:
            logs = "\n".join(f"{log.name}:\n{log.read_text()[-2000:]}" for log in sorted(folder.glob("*.log")))
            raise RuntimeError(f"the Slurm cluster did not come up on {socket.gethostname()}\n{logs}")
        time.sleep(0.2)
