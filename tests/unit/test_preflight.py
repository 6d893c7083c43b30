"""The judgement of hosts from the facts that their ranks collected."""

import os
import shutil
import tempfile
from dataclasses import replace
from pathlib import Path

import pytest

from megaptune.config import Config, validate
from megaptune.errors import BackboneError, DataError, SetupError
from megaptune.run.preflight import GIB, Check, Facts, collect, judge, require
from megaptune.run.topology import Topology

SETTINGS = {
    "backbone": {"path": "/models/gpt2"},
    "task": {"type": "custom", "test": "/data/test.jsonl", "answer": "country"},
    "methods": ["manual"],
    "prompt": {"manual": "{city} [answer]"},
    "run": {"directory": "/runs/a"},
}
OFFLOAD = {"parallel": {"zero_stage": 3, "offload": "nvme", "offload_folder": "/nvme"}}

RANK = Facts(
    host="n1",
    local_rank=0,
    local_world_size=1,
    versions={"megaptune": "0.1.0", "torch": "2.13.0"},
    config="c0ffee",
    devices=0,
    backbone={"config.json": 700, "model.safetensors": 5 * GIB},
    data={"/data/test.jsonl": 90},
    free_bytes={"run.directory": 8 * GIB},
)
OTHER = replace(RANK, host="n2")


def checks(*facts: Facts, **sections: object) -> dict[str, Check]:
    found = judge(list(facts), validate({**SETTINGS, **sections}, "config.yaml"))
    assert [check.number for check in found] == list(range(1, len(found) + 1))
    return {check.name: check for check in found}


def failure(*facts: Facts, **sections: object) -> Check:
    """The one check that fails."""
    (failed,) = [check for check in checks(*facts, **sections).values() if check.failed]
    assert failed.remedy
    return failed


def test_equal_hosts_pass_and_say_what_was_found():
    found = checks(RANK, OTHER)
    assert not [check for check in found.values() if check.failed]
    assert found["versions"].finding == "megaptune 0.1.0, torch 2.13.0"
    assert found["ranks"].finding == "2 ranks: n1 x 1, n2 x 1"
    assert found["backbone"].finding == "2 files, 5.00 GiB at /models/gpt2"
    assert found["disk space"].finding == "8.0 GiB free at run.directory"


@pytest.mark.parametrize(
    ("changed", "name", "finding"),
    [
        ({"versions": {"megaptune": "0.1.0", "torch": "2.12.0"}}, "versions", "has torch 2.12.0, rank 0 has 2.13.0"),
        ({"versions": {"megaptune": "0.1.0"}}, "versions", "has torch not installed, rank 0 has 2.13.0"),
        ({"config": "other"}, "configuration", "resolved another configuration than rank 0"),
        ({"local_world_size": 2}, "ranks", "was told of 2 ranks on its host, and 1 are"),
        ({"backbone": {}, "backbone_error": "/models/gpt2 is gone"}, "backbone", ": /models/gpt2 is gone"),
        ({"backbone": {"config.json": 700}}, "backbone", "other files or sizes at /models/gpt2: model.safetensors"),
        ({"data": {"/data/test.jsonl": None}}, "data", ": /data/test.jsonl is not there"),
        ({"data": {"/data/test.jsonl": 91}}, "data", ": /data/test.jsonl differs"),
        ({"sees_run_directory": False}, "run directory", "does not see what rank 0 writes at /runs/a"),
    ],
)
def test_a_rank_that_differs_is_named_with_its_host(changed: dict, name: str, finding: str):
    failed = failure(RANK, replace(OTHER, **changed))
    assert failed.name == name
    assert failed.finding.startswith("rank 1 (n2)")
    assert finding in failed.finding


def test_the_backbones_failures_have_the_backbones_exit_code():
    assert failure(RANK, replace(OTHER, backbone={"config.json": 1})).error is BackboneError
    assert failure(RANK, replace(OTHER, config="other")).error is SetupError


def test_a_folder_that_no_rank_has_is_told_once():
    gone = {"backbone": {}, "backbone_error": "/models/gpt2: folder not found"}
    failed = failure(replace(RANK, **gone), replace(OTHER, **gone))
    assert (failed.finding, failed.error) == ("on every rank: /models/gpt2: folder not found", BackboneError)


def test_data_that_no_rank_has_is_a_mistake_in_the_data_section():
    gone = {"data": {"/data/test.jsonl": None}}
    failed = failure(replace(RANK, **gone), replace(OTHER, **gone))
    assert (failed.finding, failed.error) == ("/data/test.jsonl is not there", DataError)


def test_two_hosts_of_one_name_are_noticed():
    failed = failure(RANK, RANK)
    assert failed.finding == "n1 has local ranks 0, 0, not 0 to 1"
    assert "host names must be unique" in failed.remedy


def test_fewer_devices_than_ranks():
    failed = failure(replace(RANK, devices=8), replace(OTHER, devices=0))
    assert failed.finding == "n2 has 0 CUDA devices for 1 ranks"


def test_disk_space_counts_where_it_is_written():
    little = {"run.directory": GIB // 2}
    failed = failure(replace(RANK, free_bytes=little), OTHER)
    assert failed.finding == "rank 0 (n1): 0.50 GiB free at run.directory, wanted 1 GiB"
    assert not checks(RANK, replace(OTHER, free_bytes=little))["disk space"].failed  # rank 0 alone writes there
    both = {"run.directory": 8 * GIB, "parallel.offload_folder": GIB // 4}
    failed = failure(RANK, replace(OTHER, free_bytes=both), **OFFLOAD)
    assert failed.finding == "rank 1 (n2): 0.25 GiB free at parallel.offload_folder, wanted 1 GiB"


def test_an_offload_folder_that_cannot_be_written():
    failed = failure(RANK, replace(OTHER, offload_error="/nvme: Permission denied"), **OFFLOAD)
    assert failed.finding == "rank 1 (n2) cannot write /nvme: Permission denied"


def test_a_run_directory_that_rank_0_cannot_write():
    failed = failure(replace(RANK, sees_run_directory=False, run_directory_error="/: Read-only file system"), OTHER)
    assert failed.finding == "rank 0 cannot write /: Read-only file system"


def test_many_differing_ranks_are_counted():
    others = [replace(RANK, host=f"n{index}", config="other") for index in range(2, 12)]
    assert failure(RANK, *others).finding.endswith("rank 4 (n5) resolved another configuration than rank 0; and 6 more")


# -- this machine ----------------------------------------------------------------------------------------------------


def settings(config_file: Path) -> Config:
    from megaptune.config import load_config

    return load_config(config_file)


def test_one_rank_on_this_machine(config_file, tmp_path):
    config = settings(config_file())
    facts = collect(config, Topology())
    assert facts.backbone["model.safetensors"] > 1000
    assert all(size for size in facts.data.values())
    assert len(facts.data) == 3
    assert not [check for check in judge([facts], config) if check.failed]
    require(config, Topology())
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".megaptune")]


def test_all_failures_are_in_one_message(config_file, tmp_path):
    config = settings(config_file(launch={"min_free_disk_gib": 1e9}))
    (tmp_path / "facts").mkdir(exist_ok=True)
    broken = config.model_copy(update={"backbone": config.backbone.model_copy(update={"path": str(tmp_path / "no")})})
    with pytest.raises(BackboneError) as refusal:
        require(broken, Topology())
    lines = str(refusal.value).splitlines()
    assert lines[0].startswith(f"preflight 5, backbone: backbone.path: folder not found: {tmp_path / 'no'}; point")
    assert lines[1].startswith("preflight 8, disk space: rank 0 (")
    assert refusal.value.on_every_rank


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can read as another user: weights of others were NOT tested")
def test_weights_that_the_user_may_not_read(tiny):
    """save_pretrained makes them readable for their writer alone, and a container has another user."""
    with tempfile.TemporaryDirectory() as place:
        folder = Path(shutil.copytree(tiny("llama"), Path(place) / "llama"))
        for path in (Path(place), folder, *folder.iterdir()):
            path.chmod(0o755 if path.is_dir() else 0o644)
        (folder / "model.safetensors").chmod(0o600)
        config = validate({**SETTINGS, "backbone": {"path": str(folder)}}, "config.yaml")
        os.seteuid(65534)
        try:
            facts = collect(config, Topology())
        finally:
            os.seteuid(0)
    assert facts.backbone_error == f"{folder}: this user may not read model.safetensors"


def test_it_can_be_switched_off(config_file):
    require(settings(config_file(launch={"min_free_disk_gib": 1e9, "preflight": False})), Topology())
