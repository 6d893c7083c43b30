"""``megaptune pretrain``: corpus -> tokenizer -> model -> a Hugging Face folder that appears when it is whole.

Until then everything is in a folder beside the target, which the same command continues:

.NAME.part/identity.json   what decides the weights
.NAME.part/tokenizer/      learnt once
.NAME.part/checkpoint.pt   weights, optimizer, step
"""

import os
import shutil
from pathlib import Path
from typing import Any

import torch

from megaptune.backbone.weight_files import write_checksums
from megaptune.errors import ConfigError, SetupError, first_line
from megaptune.pretraining.config import PretrainConfig
from megaptune.pretraining.corpus import encode, read_lines
from megaptune.pretraining.models import build
from megaptune.pretraining.training import Training
from megaptune.pretraining.vocabulary import train_tokenizer
from megaptune.run.files import flush, read_json, write_json
from megaptune.run.monitor import Monitor
from megaptune.run.stopping import StopRequest

SUMMARY = "pretraining.json"
"""Beside the model: the held-out losses, sizes, time, and the settings that decided the weights."""


def pretrain(config: PretrainConfig, monitor: Monitor) -> None:
    """Train what ``config`` asks for, or continue it; a finished folder is left as it is.

    :raises ConfigError: run.directory or its unfinished state belongs to something else.
    :raises StoppedEarly: SIGTERM or SIGINT; the state is saved.
    """
    target = config.run.directory
    work = target.with_name(f".{target.name}.part")
    os.environ.setdefault("MKL_CBWR", "AUTO,STRICT")  # the same sums at each start
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true" if config.run.threads > 1 else "false")
    torch.set_num_threads(config.run.threads)
    _quieten_transformers()
    with StopRequest(None) as stop:
        lines = read_lines(config.corpus, config.run.seed)
        identity = {**config.identity(), "corpus.sha256": lines.sha256}
        if target.exists():
            return _leave_finished(target, identity, monitor)
        _claim(work, identity)
        monitor.say(
            f"{config.corpus.path.name}: {len(lines.train)} lines to train on, {len(lines.held_out)} held out, "
            f"{lines.left_out} left out as too long"
        )
        tokenizer = _tokenizer(config, lines.train, work)
        train, held_out = (encode(part, tokenizer, config.model.max_tokens) for part in (lines.train, lines.held_out))
        model = build(config.model, tokenizer, config.run.seed)
        training = Training(config, model, tokenizer, train, held_out)
        checkpoint = work / "checkpoint.pt"
        if checkpoint.is_file():
            training.load(checkpoint)
            monitor.say(f"continuing after step {training.step} of {training.total_steps}")
        parameters = sum(weight.numel() for weight in model.parameters())
        tokens = sum(map(len, train))
        monitor.say(f"{parameters / 1e6:.1f} M parameters, {len(tokenizer)} tokens known, {tokens} tokens an epoch")
        training.run(checkpoint, monitor, stop)
        summary = {
            "held_out_loss": training.held_out[-1]["loss"],
            "held_out": training.held_out,
            "held_out_lines": len(held_out),
            "train_lines": len(train),
            "tokens_an_epoch": tokens,
            "steps": training.step,
            "parameters": parameters,
            "vocabulary": len(tokenizer),
            "seconds": round(training.seconds, 1),
            "cpu_seconds": round(training.cpu_seconds, 1),
            "settings": identity,
        }
        _publish(model, tokenizer, summary, work, target)
    monitor.say(f"held-out loss {summary['held_out_loss']:.4f}; wrote {target}")


def _quieten_transformers() -> None:
    from transformers.utils import logging

    logging.disable_progress_bar()


def _leave_finished(target: Path, identity: dict[str, Any], monitor: Monitor) -> None:
    if not (target / SUMMARY).is_file():
        raise ConfigError(f"run.directory {target} exists and is no pretrained model; name a new directory")
    summary = read_json(target / SUMMARY)
    _compare(summary["settings"], identity, f"run.directory {target}", "name another run.directory")
    monitor.say(f"{target} is finished (held-out loss {summary['held_out_loss']:.4f}); nothing to do")


def _claim(work: Path, identity: dict[str, Any]) -> None:
    """Create the unfinished state, or check that it is this configuration's."""
    known = work / "identity.json"
    if known.is_file():
        _compare(read_json(known), identity, f"the unfinished state {work}", "remove it to start over")
        return
    try:
        shutil.rmtree(work, ignore_errors=True)
        work.mkdir(parents=True)
        write_json(known, identity)
    except OSError as error:
        raise SetupError(f"run.directory {work.parent} cannot be written: {first_line(error)}") from None


def _compare(before: dict[str, Any], now: dict[str, Any], what: str, remedy: str) -> None:
    changed = [key for key in sorted(before.keys() | now.keys()) if before.get(key) != now.get(key)]
    if changed:
        lines = [f"  - {key}: {before.get(key)!r} there, {now.get(key)!r} now" for key in changed]
        raise ConfigError(f"{what} belongs to a different configuration:\n" + "\n".join(lines) + f"\n{remedy}")


def _tokenizer(config: PretrainConfig, lines: list[str], work: Path) -> Any:
    """The tokenizer as it was saved, learnt first if it was not."""
    from transformers import AutoTokenizer

    folder = work / "tokenizer"
    if not folder.is_dir():
        model = config.model
        learnt = train_tokenizer(model.kind, lines, config.tokenizer.vocab_size, model.max_tokens)
        part = work / ".tokenizer.part"
        shutil.rmtree(part, ignore_errors=True)
        learnt.save_pretrained(part)
        part.rename(folder)
    return AutoTokenizer.from_pretrained(folder, local_files_only=True)


def _publish(model: Any, tokenizer: Any, summary: dict[str, Any], work: Path, target: Path) -> None:
    """Put the folder together inside the unfinished state, then move it to its place in one rename."""
    folder = work / "model"
    try:
        shutil.rmtree(folder, ignore_errors=True)
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        write_json(folder / SUMMARY, summary)
        write_checksums(folder)
        for file in folder.iterdir():
            flush(file)
        folder.rename(target)
        flush(target.parent)
        shutil.rmtree(work)
    except OSError as error:
        raise SetupError(f"could not write {target}: {first_line(error)}; run again to finish") from None
