"""The command line: ``megaptune train|plan|check|preflight|report|convert|pretrain|checksum|env``."""

import gc
import os
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Literal

import typer
from pydantic import BaseModel

from megaptune import __version__
from megaptune.config import Config, load_config
from megaptune.errors import MegaptuneError, StoppedEarly

ConfigOption = Annotated[Path, typer.Option("--config", "-c", help="YAML configuration file")]
SetOption = Annotated[
    list[str] | None, typer.Option("--set", help="override one key: --set train.epochs=3 (repeatable)")
]

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="P-tuning of language models too large for one device.\n\n"
    "deepspeed --num_gpus 2 megaptune/train.py --config configs/quickstart.yaml\n\n"
    "megaptune train --config configs/quickstart.yaml --set train.epochs=3\n\n"
    "megaptune check --config configs/lama_smollm2.yaml\n\n"
    "Every key of a configuration is documented in docs/configuration.md.",
)


@app.callback()
def _root(version: Annotated[bool, typer.Option("--version", help="print the version and leave")] = False) -> None:
    if version:
        typer.echo(__version__)
        raise typer.Exit


@app.command()
def train(
    config: ConfigOption,
    overrides: SetOption = None,
    local_rank: Annotated[int, typer.Option("--local_rank", "--local-rank", hidden=True)] = 0,
    dry: Annotated[bool, typer.Option("--dry-run", help="check everything but devices and weights, and leave")] = False,
    world_size: Annotated[int | None, typer.Option(help="--dry-run: number of ranks (default: the launcher's)")] = None,
    ranks_per_node: Annotated[int | None, typer.Option(help="--dry-run: ranks of a node (default: all)")] = None,
    gpu_memory: Annotated[str | None, typer.Option(help="--dry-run: a rank's device memory, such as 80GiB")] = None,
) -> None:
    """Train and evaluate what the configuration asks for; run again to continue."""

    def work() -> None:
        if dry:
            from megaptune.planning.session import run_dry

            return run_dry(_load(config, overrides, unset_paths=True), world_size, ranks_per_node, gpu_memory)
        from megaptune.session import run_training

        run_training(_load(config, overrides))

    _exit_with(work)


@app.command()
def plan(
    config: ConfigOption,
    overrides: SetOption = None,
    nodes: Annotated[int, typer.Option(min=1, help="number of nodes")] = 1,
    gpus_per_node: Annotated[int | None, typer.Option(min=1, help="ranks of a node (default: this machine's)")] = None,
    gpu_memory: Annotated[str | None, typer.Option(help="such as 80GiB (default: this machine's)")] = None,
    host_memory: Annotated[str | None, typer.Option(help="of a node, for offload, such as 1000GiB")] = None,
    tokens: Annotated[int | None, typer.Option(min=1, help="length of the longest input (default: assumed)")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="print one JSON object instead of tables")] = False,
) -> None:
    """Bytes per rank, traffic per step and the layout to take, from shapes alone."""

    def work() -> None:
        gc.disable()  # a short command, a seventh of which would go into looking for garbage among imports
        try:
            from megaptune.planning.session import print_plan

            settings = _load(config, overrides, unset_paths=True)
            print_plan(settings, nodes, gpus_per_node, gpu_memory, host_memory, tokens, as_json)
        finally:
            gc.enable()

    _exit_with(work)


@app.command()
def check(config: ConfigOption, overrides: SetOption = None) -> None:
    """Read and encode everything but the weights, and say what a run would do."""

    def work() -> None:
        settings = _load(config, overrides)
        from megaptune.preparation import prepare_run
        from megaptune.run.monitor import Monitor

        monitor = Monitor(speaks=True)
        prepared = prepare_run(settings, monitor)
        backbone = prepared.backbone
        monitor.say(
            f"backbone {backbone.folder.name}: {backbone.family}, {backbone.kind}, {backbone.num_bytes / 2**30:.2f} GiB"
        )
        for task in prepared.tasks:
            monitor.say(task.summary(len(prepared.tokenizer)))
            for encoded in (task.manual, task.tuned, task.bare):
                if encoded is not None:
                    pieces = [
                        f"[P{-slot}]" if slot < 0 else prepared.tokenizer.convert_ids_to_tokens(slot)
                        for slot in encoded.test[0].slots
                    ]
                    monitor.say(f"  {' '.join(pieces)} -> {encoded.test[0].record.answer}")
        monitor.say("the configuration is sound")

    _exit_with(work)


@app.command()
def preflight(
    config: ConfigOption,
    overrides: SetOption = None,
    local_rank: Annotated[int, typer.Option("--local_rank", "--local-rank", hidden=True)] = 0,
) -> None:
    """Check every host before a run: start it with the launcher, hosts and ranks of the run."""

    def work() -> None:
        settings = _load(config, overrides)
        from megaptune.session import run_preflight

        run_preflight(settings)

    _exit_with(work)


@app.command()
def report(run: Annotated[Path, typer.Argument(help="run directory")]) -> None:
    """Print the table of a run, finished or not, and write results.json and results.md again."""

    def work() -> None:
        from megaptune.results.table import ResultsTable
        from megaptune.run.monitor import Monitor

        table = ResultsTable.read(run, load_config(run / "config.yaml"))
        table.write(run)
        Monitor(speaks=True).show(table.console())

    _exit_with(work)


@app.command()
def checksum(folder: Annotated[Path, typer.Argument(help="backbone folder")]) -> None:
    """Record the SHA-256 of a backbone's weight files, so that later runs notice damage."""

    def work() -> None:
        from megaptune.backbone.weight_files import check_headers, write_checksums

        check_headers(folder)
        typer.echo(f"wrote {write_checksums(folder)}")

    _exit_with(work)


@app.command()
def convert(
    source: Annotated[Path, typer.Argument(help="checkpoint folder, or .gguf file")],
    target: Annotated[Path, typer.Argument(help="folder to write; must not exist")],
    kind: Annotated[
        Literal["auto", "fairseq-megatron", "megatron-lm", "gguf"], typer.Option("--format", help="what SOURCE is")
    ] = "auto",
    dtype: Annotated[Literal["keep", "fp32", "bf16", "fp16"], typer.Option(help="of the weights")] = "keep",
    bpe_merges: Annotated[Path | None, typer.Option(help="GPT-2's vocab.bpe or merges.txt")] = None,
    tokenizer: Annotated[Path | None, typer.Option(help="tokenizer folder, or vocab.json beside --bpe-merges")] = None,
    vocab_size: Annotated[int | None, typer.Option(help="megatron-lm: rows that are no padding", min=1)] = None,
    heads: Annotated[int | None, typer.Option(help="megatron-lm: attention heads, where args are missing")] = None,
    max_shard: Annotated[str, typer.Option(help="largest weight file")] = "2GiB",
    average_copies: Annotated[bool, typer.Option(help="mean of what parts hold as copies but differ in")] = False,
) -> None:
    """Write a fairseq, Megatron-LM or GGUF checkpoint as a backbone folder, tensor by tensor."""

    def work() -> None:
        from megaptune.backbone.convert import command

        options = command.Options(
            dtype=command.DTYPES[dtype],
            bpe_merges=bpe_merges,
            tokenizer=tokenizer,
            vocab_size=vocab_size,
            heads=heads,
            max_shard_bytes=command.parse_size(max_shard),
            average_copies=average_copies,
        )
        command.convert(source, target, kind, options, typer.echo)

    _exit_with(work)


@app.command()
def pretrain(config: ConfigOption, overrides: SetOption = None) -> None:
    """Train a small GPT-2 or BERT and its tokenizer on a text file; run again to continue."""

    def work() -> None:
        from megaptune.pretraining.config import load_pretrain_config

        settings = load_pretrain_config(config, overrides)
        from megaptune.pretraining import command
        from megaptune.run.monitor import Monitor

        command.pretrain(settings, Monitor(speaks=True))

    _exit_with(work)


@app.command()
def backbone() -> None:
    """Convert the embedded backbone into the cache, if that was not done, and print its folder."""

    def work() -> None:
        from megaptune.backbone.embedded import embedded_folder

        typer.echo(embedded_folder(lambda message: typer.echo(message, err=True)))

    _exit_with(work)


@app.command()
def options(
    of: Annotated[Literal["train", "pretrain"], typer.Option(help="the command whose configuration it is")] = "train",
) -> None:
    """Every key of a configuration as a Markdown table: type, default, meaning."""
    from megaptune.config_files import options_table
    from megaptune.pretraining.config import PretrainConfig

    schema: type[BaseModel] = Config if of == "train" else PretrainConfig
    typer.echo("| key | type | default | meaning |\n| --- | --- | --- | --- |")
    for row in options_table(schema):
        typer.echo("| " + " | ".join(cell.replace("|", "\\|") for cell in (f"`{row[0]}`", *row[1:])) + " |")


@app.command()
def env() -> None:
    """Versions and machine, for a bug report."""
    from megaptune.run.directory import environment

    for name, value in environment().items():
        typer.echo(f"{name:14} {value}")


def _load(path: Path, overrides: list[str] | None, unset_paths: bool = False) -> Config:
    from megaptune.backbone.embedded import is_embedded

    return load_config(path, overrides, is_embedded, unset_paths)


def _exit_with(work: Callable[[], None]) -> None:
    """Run a command; a user's error becomes one message from one rank and the error's exit code."""
    try:
        work()
    except StoppedEarly as stop:
        _tell(str(stop))
        raise typer.Exit(stop.exit_code) from None
    except MegaptuneError as error:
        _tell(f"error: {error}", error.on_every_rank)
        raise typer.Exit(error.exit_code) from None
    except KeyboardInterrupt:
        raise typer.Exit(130) from None
    except Exception:
        traceback.print_exc()
        raise typer.Exit(1) from None


_OWN_ERROR_S, _SHARED_ERROR_S = 15.0, 5.0
"""How long ranks other than 0 wait before they leave with an error of theirs, or of every rank."""


def _tell(message: str, on_every_rank: bool = False) -> None:
    """Print on rank 0. The others wait for it to end the job: a launcher kills all ranks when one leaves with an error,
    and an error that rank 0 does not meet still gets out, with the rank's number."""
    names = ("RANK", "SLURM_PROCID", "OMPI_COMM_WORLD_RANK", "PMI_RANK")
    rank = next((int(os.environ[name]) for name in names if name in os.environ), 0)
    if rank:
        time.sleep(_SHARED_ERROR_S if on_every_rank else _OWN_ERROR_S)
        if on_every_rank:
            return
        message = f"rank {rank}: {message}"
    print(message, file=sys.stderr, flush=True)


def main() -> None:
    app()
