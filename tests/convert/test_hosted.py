"""A converted megatron_11b in small, hosted over tensor-parallel ranks: what fairseq computes, and a trained prompt."""

import json
import os
from pathlib import Path

import bpe_reference
import pytest
import torch
from fairseq_source import ROWS, plain_logits, random_state, write, write_dictionary
from hosting import open_host
from ranks import run_ranks, train
from runs import losses, result
from tiny import write_config

from megaptune.backbone.convert.command import Options, convert
from megaptune.backbone.inputs import Padded
from megaptune.run.topology import disconnect
from megaptune.scoring import Scorer

pytestmark = pytest.mark.dist


def _scores(folder: Path, ids: torch.Tensor, stage: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Loss of each token of the vocabulary as the answer after ``ids`` [T], and the predictions."""
    host = open_host(folder, tensor_parallel=2, zero_stage=stage)
    places = torch.full((ROWS,), len(ids) - 1)
    features = host.features(Padded(ids.expand(ROWS, -1), None, places), torch.zeros(0, host.width))
    loss, _, prediction = Scorer(host, None)(features, torch.arange(ROWS))
    disconnect()
    return loss.detach(), prediction


@pytest.mark.parametrize("final_norm", [False, True])
@pytest.mark.parametrize("stage", [0, 3])
def test_hosted_scores_are_those_of_the_source_without_its_filler_rows(tmp_path, final_norm, stage):
    state = random_state(final_norm)
    write(tmp_path / "source", state, parts=8)
    merges = bpe_reference.write_merges(tmp_path / "vocab.bpe")
    convert(tmp_path / "source", tmp_path / "model", "auto", Options(bpe_merges=merges), lambda line: None)
    ranges = json.loads((tmp_path / "model/config.json").read_text())["unused_token_ids"]
    unused = torch.cat([torch.arange(start, stop) for start, stop in ranges])
    assert len(unused) > 0
    ids = torch.randint(4, ROWS, (7,), generator=torch.Generator().manual_seed(1))
    scores = plain_logits(state, ids[None])[0, -1]
    scores[unused] = -torch.inf
    expected = -scores.log_softmax(0)
    used = torch.isfinite(expected)
    assert int(used.sum()) == ROWS - len(unused)
    for loss, prediction in run_ranks(2, _scores, tmp_path / "model", ids, stage):
        torch.testing.assert_close(loss[used], expected[used], rtol=1e-5, atol=1e-5)
        assert set(prediction.tolist()) == {int(scores.argmax())}


@pytest.mark.data
def test_one_lama_relation_is_p_tuned_through_two_tensor_parallel_ranks(tmp_path):
    """Eight parts, GPT-2's real merges, P17's real records; the model is random, so only its training is looked at."""
    if "MEGAPTUNE_DATA" not in os.environ:
        pytest.skip("MEGAPTUNE_DATA is not set: a converted megatron_11b was NOT trained on real LAMA records")
    data = Path(os.environ["MEGAPTUNE_DATA"])
    bpe = data / "gpt2-bpe" / "vocab.bpe"
    lines = bpe.read_text(encoding="utf-8").split("\n")
    merges = [tuple(line.split()) for line in lines if line and not line.startswith("#version")]
    write(tmp_path / "source", random_state(rows=51200, layers=2), parts=8, decoder_layers=2)
    write_dictionary(tmp_path / "source" / "dict.txt", merges, fillers=939)
    convert(tmp_path / "source", tmp_path / "model", "auto", Options(bpe_merges=bpe), lambda line: None)
    config = write_config(tmp_path, backbone={"path": str(tmp_path / "model")}, methods=["manual", "ptuning"])
    text = config.read_text(encoding="utf-8")
    task = {"type": "lama", "root": str(data / "LAMA"), "relations": ["P17"], "limit_train": 32, "limit_dev": 8}
    import yaml

    settings = yaml.safe_load(text)
    settings["task"] = {**task, "limit_test": 16}
    settings["prompt"] = {"template": "[P*3] {subject} [P*3] [answer]"}
    settings["train"] |= {"epochs": 4, "learning_rate": 0.01}
    config.write_text(yaml.safe_dump(settings), encoding="utf-8")
    run_ranks(4, train, config, "parallel.tensor_parallel=2", "parallel.zero_stage=3")
    found = losses(tmp_path / "run")
    assert len(found) == 16
    assert sum(found[-4:]) < sum(found[:4])
    assert result(tmp_path / "run", "P17/ptuning-seed0")["test"]["vocabulary"]["count"] == 16
