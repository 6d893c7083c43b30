"""Hosts on one machine: each has its own network, host name, hosts file and process numbers, and the disk is shared.

with emulated_hosts(2, tmp_path) as hosts:
    hosts[0].run("deepspeed", ...)           # as on a node called n1 that reaches n2 over a cable

A host is an ``unshare``d process; a command enters its namespaces. When that process is killed the kernel ends every
process of the host and removes its network, so nothing can be left behind.
"""

import contextlib
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

NETWORK = "10.213.7"
NEEDED = ("ip", "unshare", "nsenter", "mount")


def missing() -> str:
    """Why hosts cannot be emulated here, or nothing."""
    absent = [program for program in NEEDED if shutil.which(program) is None]
    if absent:
        return f"{', '.join(absent)} not installed"
    if os.geteuid() != 0:
        return "network namespaces need root: run pytest as root"
    tried = subprocess.run(
        ["unshare", "--net", "--uts", "--mount", "--pid", "--fork", "ip", "link", "set", "lo", "up"],
        capture_output=True,
        text=True,
        check=False,
    )
    return f"namespaces cannot be made: {tried.stderr.strip()}" if tried.returncode else ""


@dataclass(frozen=True)
class Host:
    name: str
    address: str
    pid: int
    """The host's first process, as this machine numbers it."""

    def command(self, *command: str) -> list[str]:
        """``command`` on this host."""
        return ["nsenter", f"--target={self.pid}", "--net", "--uts", "--mount", "--pid", "--wd=.", *command]

    def run(
        self, *command: str, timeout_s: float = 240, check: bool = False, **environment: str
    ) -> subprocess.CompletedProcess[str]:
        """Run to its end and capture what it says."""
        settings = {**os.environ, **environment}
        return subprocess.run(
            self.command(*command), env=settings, capture_output=True, text=True, check=check, timeout=timeout_s
        )

    def start(self, *command: str, log: Path, **environment: str) -> subprocess.Popen[bytes]:
        """Start and leave running; it ends with the host."""
        with log.open("wb") as output:
            settings = {**os.environ, **environment}
            return subprocess.Popen(self.command(*command), env=settings, stdout=output, stderr=output)


@contextlib.contextmanager
def emulated_hosts(count: int, folder: Path) -> Iterator[list[Host]]:
    """Hosts n1, n2, ... on one bridge; ``folder`` gets their hosts file."""
    names = {f"n{index}": f"{NETWORK}.{10 + index}" for index in range(1, count + 1)}
    lines = ["127.0.0.1 localhost", *(f"{address} {name}" for name, address in names.items())]
    (folder / "hosts").write_text("\n".join(lines) + "\n", encoding="utf-8")
    processes: list[subprocess.Popen[bytes]] = []
    try:
        hosts = []
        for name, address in names.items():
            process, pid = _boot(name, folder / "hosts")
            processes.append(process)
            hosts.append(Host(name, address, pid))
        _wire(hosts)
        yield hosts
    finally:
        for process in processes:
            process.kill()  # unshare --kill-child: its host dies with it
            process.wait()


def _boot(name: str, hosts_file: Path) -> tuple[subprocess.Popen[bytes], int]:
    # /run is private, for sshd's folder; /proc shows the host's own processes.
    script = (
        'mount --bind "$1" /etc/hosts && mount -t tmpfs tmpfs /run && mkdir -p /run/sshd && hostname "$2" '
        "&& ip link set lo up && echo ready && exec sleep infinity"
    )
    namespaces = ["--net", "--uts", "--mount", "--pid", "--fork", "--kill-child", "--mount-proc"]
    process = subprocess.Popen(
        ["unshare", *namespaces, "sh", "-c", script, "sh", str(hosts_file), name], stdout=subprocess.PIPE
    )
    assert process.stdout is not None
    if process.stdout.readline().strip() != b"ready":
        process.kill()
        raise RuntimeError(f"host {name} did not start")
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text(encoding="utf-8").split()
    return process, int(children[0])


def _wire(hosts: list[Host]) -> None:
    """A bridge in the first host's network; every host's eth0 is plugged into it."""
    switch = hosts[0]
    switch.run("ip", "link", "add", "bridge", "type", "bridge", check=True)
    switch.run("ip", "link", "set", "bridge", "up", check=True)
    for index, host in enumerate(hosts):
        plug = f"plug{index}"
        peer = ("type", "veth", "peer", "name", "eth0")
        if host is switch:
            switch.run("ip", "link", "add", plug, *peer, check=True)
        else:
            # Named by process number, which is the machine's own: so from outside.
            subprocess.run(
                ["ip", "link", "add", plug, "netns", str(switch.pid), *peer, "netns", str(host.pid)], check=True
            )
        switch.run("ip", "link", "set", plug, "master", "bridge", "up", check=True)
        host.run("ip", "addr", "add", f"{host.address}/24", "dev", "eth0", check=True)
        host.run("ip", "link", "set", "eth0", "up", check=True)


def start_sshd(hosts: list[Host], folder: Path) -> dict[str, str]:
    """A real sshd on every host with keys made here; the environment whose ``ssh`` uses them."""
    for key in ("client", "server"):
        subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(folder / key)], check=True)
    (folder / "authorized_keys").write_text((folder / "client.pub").read_text(encoding="utf-8"), encoding="utf-8")
    server_key = " ".join((folder / "server.pub").read_text(encoding="utf-8").split()[:2])
    known = [f"{host.name},{host.address} {server_key}\n" for host in hosts]
    (folder / "known_hosts").write_text("".join(known), encoding="utf-8")
    (folder / "sshd_config").write_text(
        f"HostKey {folder / 'server'}\nAuthorizedKeysFile {folder / 'authorized_keys'}\nStrictModes no\n"
        "PermitRootLogin prohibit-password\nPasswordAuthentication no\nUsePAM no\nPidFile none\n",
        encoding="utf-8",
    )
    (folder / "ssh_config").write_text(
        f"IdentityFile {folder / 'client'}\nIdentitiesOnly yes\nUserKnownHostsFile {folder / 'known_hosts'}\n"
        "GlobalKnownHostsFile /dev/null\nStrictHostKeyChecking yes\nBatchMode yes\nLogLevel ERROR\n",
        encoding="utf-8",
    )
    programs = folder / "bin"
    programs.mkdir()
    wrapper = programs / "ssh"
    wrapper.write_text(f'#!/bin/sh\nexec {shutil.which("ssh")} -F {folder / "ssh_config"} "$@"\n', encoding="utf-8")
    wrapper.chmod(0o755)
    server = shutil.which("sshd") or "/usr/sbin/sshd"  # sshd wants its own full path
    for host in hosts:
        host.start(server, "-D", "-e", "-f", str(folder / "sshd_config"), log=folder / f"sshd-{host.name}.log")
    path = os.pathsep.join([str(programs), str(Path(sys.executable).parent), os.environ["PATH"]])
    environment = {"PATH": path}
    for host in hosts:
        deadline = time.monotonic() + 20
        while hosts[0].run("ssh", host.name, "true", **environment).returncode:
            if time.monotonic() > deadline:
                raise RuntimeError(f"sshd on {host.name}: {(folder / f'sshd-{host.name}.log').read_text()}")
            time.sleep(0.2)
    return environment
