"""A run without devices and weights: its ranks, what each would hold, and which replica would compute which examples.

T tokens, V vocabulary.
"""

from dataclasses import dataclass
from typing import NamedTuple

from rich.table import Table

from megaptune.backbone.description import load_tokenizer
from megaptune.backbone.weight_files import has_tokenizer
from megaptune.batches import EpochPlan, micro_batches, rounds
from megaptune.config import Config
from megaptune.config_files import unset_variable
from megaptune.errors import BackboneError, ConfigError
from megaptune.examples import PreparedTask
from megaptune.methods import METHODS, Method
from megaptune.planning.choice import candidate
from megaptune.planning.layout import Layout, Machines, gibibytes
from megaptune.planning.memory import weight_bytes
from megaptune.planning.settle import settle
from megaptune.planning.source import Source, assumed_tokens, find_backbone
from megaptune.planning.workload import Shapes, Workload, estimated_tokens
from megaptune.preparation import PreparedRun, encode_tasks, load_tasks, prepare_run
from megaptune.prompts.template import Template
from megaptune.run.grid import check_grid
from megaptune.run.monitor import Monitor
from megaptune.superglue_config import SuperGlueTask
from megaptune.superglue_data import SuperGlueData
from megaptune.superglue_examples import PreparedSuperGlue
from megaptune.tasks.records import TaskData

SHOWN_STEPS = 2


@dataclass(frozen=True)
class Lengths:
    """A task's training inputs in tokens."""

    name: str
    train: list[int]


def dry_run(config: Config, machines: Machines, monitor: Monitor, check_memory: bool) -> None:
    """Check all that can be checked without devices and weights, and say what a run would do.

    :param check_memory: whether the memory of ``machines`` is known, and not merely assumed.
    :raises MegaptuneError: as the run itself would.
    """
    _require_data(config)
    parallel = config.parallel
    check_grid(machines.world_size, machines.ranks_per_node, parallel.tensor_parallel, parallel.across_nodes)
    source = find_backbone(config)
    shapes = source.shapes(config)
    tasks, work = _tasks(config, source, shapes, monitor)
    if not check_memory and parallel.layout == "stated":
        config = config.model_copy(update={"parallel": parallel.model_copy(update={"check_memory": False})})
    layout = Layout.stated(settle(config, shapes, work, machines, monitor), machines.world_size)
    where = "weights checked by their headers" if source.weights else f"no weights here, shapes from {source.folder}"
    weighed = candidate(shapes, work, layout, machines)
    needed = gibibytes(weighed.memory.device_bytes) if weighed.memory else "an unknown size"
    monitor.say(
        f"backbone   {source.name}: {shapes.family}, {shapes.kind}, {config.backbone.dtype}, "
        f"{shapes.num_parameters:,} parameters; {where}\n"
        f"layout     {layout} on {machines.nodes} x {machines.ranks_per_node} ranks; {needed} a rank in all"
    )
    monitor.show(shard_table(shapes, layout))
    batch = config.train
    trained = [task for task in tasks if task.train]
    plans = [EpochPlan(len(task.train), batch.global_batch, batch.drop_last, 0) for task in trained]
    steps = sum(plan.steps_per_epoch for plan in plans)
    monitor.say(
        f"tasks      {len(tasks)}, {sum(len(task.train) for task in tasks):,} training records; "
        f"{len(trained) * len(config.run.seeds)} training jobs a method, {steps:,} steps an epoch over all tasks; "
        f"lengths: {work.basis}"
    )
    if trained:
        monitor.show(batch_table(config, trained, layout))
    monitor.say("the dry run is sound: nothing was loaded, nothing was written")


def _require_data(config: Config) -> None:
    """Input paths were read leniently, so that a backbone may be absent; data may not."""
    task = ("root", "word_list", "train", "dev", "test")
    for key, value in [
        ("pet.root", config.pet.root),
        *((f"task.{key}", getattr(config.task, key, None)) for key in task),
    ]:
        unset = unset_variable(str(value)) if value is not None else None
        if unset:
            raise ConfigError(f"{key}: {str(value)!r} uses the environment variable {unset}, which is not set")


def _tasks(config: Config, source: Source, shapes: Shapes, monitor: Monitor) -> tuple[list[Lengths], Workload]:
    """The tasks' lengths and the sizes of a step: encoded where there is a tokenizer, else estimated."""
    if source.weights:
        run = prepare_run(config, monitor)
        return _encoded(run), Workload.prepared(run)
    data = load_tasks(config)
    if has_tokenizer(source.folder):
        tokenizer, description = load_tokenizer(source.folder), source.description(shapes)
        run = PreparedRun(config, description, tokenizer, encode_tasks(config, data, tokenizer, description))
        return _encoded(run), Workload.prepared(run)
    if isinstance(config.task, SuperGlueTask):
        longest = min(source.max_tokens, assumed_tokens(config))
        glue = [Lengths(d.name, [longest] * _count(d)) for d in data]
        return glue, Workload.assumed(config, source.kind, longest, "the longest allowed: no tokenizer here")
    template = Template(config.prompt.template, source.kind)
    facts = [d for d in data if isinstance(d, TaskData)]
    tasks = [Lengths(d.name, [estimated_tokens(template, record) for record in d.splits["train"]]) for d in facts]
    longest = max(estimated_tokens(template, record) for d in facts for found in d.splits.values() for record in found)
    if longest > source.max_tokens:
        raise BackboneError(f"an input of about {longest} tokens exceeds the context of {source.max_tokens}")
    words = max(len(words) for d in facts for words in (d.word_list or [], *d.word_lists.values()))
    return tasks, Workload.assumed(config, source.kind, longest, "estimated: no tokenizer here", words)


def _encoded(run: PreparedRun) -> list[Lengths]:
    training = [METHODS[name] for name in run.config.methods if METHODS[name].trains]
    return [Lengths(task.name, _lengths(task, training[0], run.config) if training else []) for task in run.tasks]


def _lengths(task: PreparedTask | PreparedSuperGlue, method: Method, config: Config) -> list[int]:
    variant = task.variants(method, config)[0]
    return [example.length for example in task.encoded(method, variant.template).train]


def _count(data: TaskData | SuperGlueData) -> int:
    """Training records."""
    if isinstance(data, TaskData):
        return len(data.splits["train"])
    return len(data.splits["train"].records) if "train" in data.splits else 0


def shard_table(shapes: Shapes, layout: Layout) -> Table:
    """What every rank of a tensor-parallel group holds, and how much of the model that is.

    :raises BackboneError: when the model cannot be divided so.
    """
    table = Table(title="shards", title_justify="left", title_style="bold")
    for column in ("place in group", "ranks", "elements", "weights", "of the model"):
        table.add_column(column, justify="right")
    size, whole = layout.tensor_parallel, shapes.num_parameters * shapes.itemsize
    rows: dict[tuple[int, int], list[int]] = {}
    for shard in range(size):
        tensors = shapes.tensors(shard, size)
        rows.setdefault((sum(t.elements for t in tensors), weight_bytes(tensors, layout)), []).append(shard)
    for (elements, held), shards in rows.items():
        places = str(shards[0]) if len(shards) == 1 else f"{shards[0]} to {shards[-1]}"
        ranks = len(shards) * layout.replicas
        table.add_row(places, str(ranks), f"{elements:,}", gibibytes(held), f"{100 * held / whole:.2f} %")
    return table


def batch_table(config: Config, tasks: list[Lengths], layout: Layout) -> Table:
    """Which replica computes which micro-batches in the first steps, of all jobs that share these steps."""
    jobs = first_jobs(config, tasks)
    (first_task, first_seed), *others = jobs
    whose = f"{len(jobs)} jobs" if others else f"{first_task.name}, seed {first_seed}"
    table = Table(title=f"first steps of {whose}", title_justify="left", title_style="bold")
    for column in ("step", "replica", "ranks", "micro-batches", "examples", "tokens"):
        table.add_column(column, justify="right" if column != "examples" else "left")
    for step in range(SHOWN_STEPS):
        members = step_members(config, jobs, step)
        idle: list[int] = []
        pieces = _pieces(config, [member.length for member in members])
        for replica in range(layout.replicas):
            mine = [[members[index] for index in piece] for piece in rounds(pieces, replica, layout.replicas) if piece]
            if not mine:
                idle.append(replica)
                continue
            first = replica * layout.tensor_parallel
            ranks = f"{first}" if layout.tensor_parallel == 1 else f"{first} to {first + layout.tensor_parallel - 1}"
            together = [member for piece in mine for member in piece]
            shown = f"{len(together)} of {len({member.job for member in together})} jobs"
            if not others:
                shown = " | ".join(", ".join(str(member.example) for member in piece) for piece in mine)
            tokens = sum(member.length for member in together)
            table.add_row(str(step + 1), str(replica), ranks, str(len(mine)), shown, str(tokens))
        if idle:
            table.add_row(str(step + 1), f"{len(idle)} more", "", "0", "none: more replicas than micro-batches", "0")
    return table


class StepMember(NamedTuple):
    """An example of a step: the job's number among those of the step, the example's in its task, its tokens."""

    job: int
    example: int
    length: int


def first_jobs(config: Config, tasks: list[Lengths]) -> list[tuple[Lengths, int]]:
    """Task and seed of the jobs that share the first step."""
    at_once = config.jobs_at_once(len(tasks))
    a_seed = max(1, config.jobs_wanted(len(tasks)) // (len(tasks) * len(config.run.seeds)))  # methods and sweeps
    return [(task, seed) for task in tasks for _ in range(a_seed) for seed in config.run.seeds][:at_once]


def step_members(config: Config, jobs: list[tuple[Lengths, int]], step: int) -> list[StepMember]:
    train = config.train
    plans = [EpochPlan(len(task.train), train.global_batch, train.drop_last, seed) for task, seed in jobs]
    return [
        StepMember(number, index, jobs[number][0].train[index])
        for number, plan in enumerate(plans)
        for index in plan.indices(step)
    ]


def _pieces(config: Config, lengths: list[int]) -> list[list[int]]:
    train = config.train
    by_length = config.speed.length_buckets
    return micro_batches(lengths, range(len(lengths)), train.micro_batch, by_length, train.micro_tokens)
