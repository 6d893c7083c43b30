"""docker/Dockerfile: linted always; built and used for a training where a machine can do that without an engine."""

import os
import shutil
from collections.abc import Iterator

import pytest
from containers import Images, missing
from launching import BIN, ROOT, TRAIN, assert_finished_with_losses_of, start
from tiny import write_config

WHY_NOT = missing()
USER = 10001


def test_hadolint_has_nothing_to_say():
    done = start(str(BIN / "hadolint"), "docker/Dockerfile")
    assert done.returncode == 0, done.stdout


def test_the_build_sees_what_the_dockerfile_copies_and_no_more():
    """.dockerignore leaves out everything that no COPY names."""
    kept = {line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")}
    instructions = [line.split() for line in (ROOT / "docker" / "Dockerfile").read_text().splitlines()]
    copied = {source for words in instructions if words[:1] == ["COPY"] for source in words[1:-1]}
    assert kept == copied
    assert all((ROOT / name).exists() for name in copied)


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Images]:
    made = Images(tmp_path_factory.mktemp("images"))
    try:
        made.make_base("localhost/base")
        made.build(
            "localhost/megaptune", ROOT / "docker" / "Dockerfile", ROOT, BASE_IMAGE="localhost/base", PACKAGES="pdsh"
        )
        yield made
    finally:
        made.remove()


@pytest.mark.dist
@pytest.mark.slow
@pytest.mark.skipif(bool(WHY_NOT), reason=f"{WHY_NOT}: the image was NOT built")
def test_the_image_trains_with_two_ranks_as_a_user_without_privileges(images, tiny, facts, one_rank, tmp_path):
    inputs, work = tmp_path / "inputs", tmp_path / "work"
    shutil.copytree(tiny("llama"), inputs / "llama")
    for path in facts.values():
        shutil.copy(path, inputs)
    files = {split: path.name for split, path in facts.items()}
    write_config(
        inputs, backbone={"path": "llama"}, task=files, train=TRAIN
    )  # relative to the file, so good at any place
    work.mkdir()
    os.chown(work, USER, USER)
    for path in (inputs, *inputs.rglob("*")):
        path.chmod(0o755 if path.is_dir() else 0o644)
    said = images.start(
        "localhost/megaptune",
        *("--config", "/data/config.yaml", "--set", "run.directory=run"),
        mounts=[f"{inputs}:/data:ro", f"{work}:/runs:rw"],
        RANKS="2",
    )
    assert_finished_with_losses_of(work / "run", one_rank, said)
    assert "2 ranks (torch)" in said
    assert {path.stat().st_uid for path in work.rglob("*")} == {USER}


@pytest.mark.slow
@pytest.mark.skipif(bool(WHY_NOT), reason=f"{WHY_NOT}: the image was NOT built")
def test_the_image_runs_other_commands_and_cannot_change_itself(images):
    said = images.start("localhost/megaptune", "sh", "-c", "id -u; test -w /opt/megaptune || echo read-only; pip check")
    assert said.splitlines() == [str(USER), "read-only", "No broken requirements found."]
