"""Building and running the image without a container engine or an image registry: buildah in a chroot.

The base image is made from Debian's own packages, with the mirror that this machine is configured for. pip gets the
configuration, folders of packages and certificates that it has here, read-only.
"""

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

NEEDED = ("buildah", "mmdebstrap")


def missing() -> str:
    """Why no image can be built here, or nothing."""
    absent = [program for program in NEEDED if shutil.which(program) is None]
    if absent:
        return f"{', '.join(absent)} not installed"
    return "" if os.geteuid() == 0 else "building in a chroot needs root: run pytest as root"


class Images:
    """Images kept in ``folder``, which :meth:`remove` empties."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        (folder / "tmp").mkdir(parents=True)
        storage = f'[storage]\ndriver = "overlay"\ngraphroot = "{folder}/graph"\nrunroot = "{folder}/run"\n'
        (folder / "storage.conf").write_text(storage, encoding="utf-8")
        (folder / "registries.conf").write_text("unqualified-search-registries = []\n", encoding="utf-8")
        self.environment = {
            **os.environ,
            "CONTAINERS_STORAGE_CONF": str(folder / "storage.conf"),
            "REGISTRIES_CONFIG_PATH": str(folder / "registries.conf"),
            "BUILDAH_ISOLATION": "chroot",
            "BUILDAH_FORMAT": "docker",  # OCI's has no SHELL
            "TMPDIR": str(folder / "tmp"),
        }

    def run(self, *command: str, timeout_s: float = 600) -> str:
        """Output of a command, which must succeed."""
        done = subprocess.run(
            command, env=self.environment, capture_output=True, text=True, timeout=timeout_s, check=False
        )
        assert done.returncode == 0, f"{' '.join(command)}\n{done.stdout[-4000:]}\n{done.stderr[-4000:]}"
        return done.stdout

    def make_base(self, name: str) -> None:
        """A Debian of this machine's release."""
        release = re.search(r"VERSION_CODENAME=(\w+)", Path("/etc/os-release").read_text(encoding="utf-8"))
        assert release is not None
        archive = self.folder / "base.tar"
        self.run("mmdebstrap", "--quiet", "--variant=minbase", "--include=ca-certificates", release[1], str(archive))
        container = self.run("buildah", "from", "scratch").strip()
        self.run("buildah", "add", "-q", container, str(archive), "/")
        self.run("buildah", "commit", "-q", "--rm", container, name)
        archive.unlink()

    def build(self, name: str, dockerfile: Path, context: Path, **arguments: str) -> None:
        mounts, pip = pip_sources()
        options = [f"--volume={path}:{path}:ro" for path in mounts]
        options += [f"--build-arg={key}={value}" for key, value in {**pip, **arguments}.items()]
        self.run("buildah", "bud", "--pull-never", "-t", name, *options, "-f", str(dockerfile), str(context))

    def start(self, name: str, *command: str, mounts: Sequence[str] = (), **environment: str) -> str:
        """What ``docker run`` would do: the image's entrypoint with ``command``. buildah leaves the entrypoint out."""
        about = json.loads(self.run("buildah", "inspect", "--type=image", name))
        entrypoint = about["Docker"]["config"]["Entrypoint"]
        container = self.run("buildah", "from", "--pull-never", name).strip()
        try:
            options = [f"--volume={mount}" for mount in mounts]
            options += [f"--env={name}={value}" for name, value in environment.items()]
            return self.run("buildah", "run", *options, container, "--", *entrypoint, *command)
        finally:
            self.run("buildah", "rm", container)

    def remove(self) -> None:
        self.run("buildah", "rm", "--all")
        self.run("buildah", "rmi", "--all", "--force")
        shutil.rmtree(self.folder, ignore_errors=True)


def pip_sources() -> tuple[list[str], dict[str, str]]:
    """Paths on this machine that pip takes settings, packages and certificates from; and its variables."""
    pip = [sys.executable, "-m", "pip", "config"]
    debug = subprocess.run([*pip, "debug"], capture_output=True, text=True, check=True).stdout
    settings = subprocess.run([*pip, "list"], capture_output=True, text=True, check=True).stdout
    paths = set(re.findall(r"^ *(/\S+), exists: True", debug, flags=re.MULTILINE))
    for scheme, path in re.findall(r"(file://|(?<![\w:/]))(/[^/\s'][^\s']*)", settings):
        # The pages of an index lead to files beside it; a certificate may be a link to one beside it.
        beside = scheme or Path(path).is_file()
        paths.add(str(Path(path).parent) if beside else path)
    variables = {name: os.environ[name] for name in DECLARED if name in os.environ}
    there = {path for path in paths if Path(path).exists()}
    outermost = sorted(path for path in there if there.isdisjoint(map(str, Path(path).parents)))
    return outermost, variables


DECLARED = ("PIP_INDEX_URL", "PIP_EXTRA_INDEX_URL", "PIP_FIND_LINKS", "PIP_CERT")
"""The build arguments of docker/Dockerfile for pip."""
