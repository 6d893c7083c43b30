"""The configuration: its schema, how files are layered, and what a mistake looks like.

Precedence, lowest first: schema defaults, the files named by ``defaults:`` in order, the file itself, ``--set a.b=c``.
A relative input path is relative to the file that states it (with ``--set``: to the working directory); ``$NAME`` and
``~`` are expanded. The run directory is relative to the working directory.
"""

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from megaptune import config_files
from megaptune.config_base import Section
from megaptune.fact_config import LONG_ANSWERS, READINGS, CustomTask, LamaTask, Reading, TaskConfig
from megaptune.hosting_config import KernelConfig, LaunchConfig, ParallelConfig, SpeedConfig
from megaptune.methods import METHODS, PROMPT_SETS, Method, MethodName, PromptSet
from megaptune.patterns import PatternBook, TaskName, Use
from megaptune.superglue_config import PetConfig, SuperGlueTask, pattern_problems, pet_problems

EncoderName = Literal["lstm", "mlp", "table", "deep_table", "deep_mlp"]
"""Of ``prompts.encoder``."""


class RunConfig(Section):
    directory: Path = Field(Path("runs/default"), description="everything the run writes; the same one continues it")
    seeds: list[Annotated[int, Field(ge=0, lt=2**31)]] = Field(
        [0], min_length=1, description="one P-tuning run per seed; mean and deviation are reported"
    )


class BackboneConfig(Section):
    path: str = Field(description="folder with config.json, tokenizer and safetensors; or smollm2-135m (embedded)")
    architecture: Path | None = Field(
        None, description="folder with a config.json, for planning where `path` does not exist; a run ignores it"
    )
    kind: Literal["auto", "causal", "masked"] = Field("auto", description="auto: from the folder's `architectures`")
    dtype: Literal["fp32", "bf16"] = Field("fp32", description="dtype of the frozen weights; prompts are always fp32")
    verify: bool = Field(True, description="compare weight files with their recorded SHA-256, where one is recorded")
    random_weights: int | None = Field(
        None, ge=0, description="a control: draw all weights from this seed, so that the LM knows nothing"
    )


class DeepConfig(Section):
    """Deep prompts: virtual tokens in front of every input, whose keys and values are trained in every layer."""

    length: int = Field(20, ge=1, description="virtual tokens; they count towards the backbone's context")
    encoder: Literal["table", "mlp"] = Field(
        "table", description="table: keys and values themselves (P-tuning v2); mlp: made by one (prefix tuning)"
    )
    hidden_size: int = Field(512, ge=1, description="of the mlp between its two layers")
    init: Literal["words", "random"] = Field(
        "words", description="where a table starts: at the LM's own keys and values of words, or at nothing"
    )
    init_text: str | None = Field(
        None, min_length=1, description="the words, as often as length asks; default: the first training inputs"
    )
    init_std: float = Field(
        0.02, ge=0, description="of what is drawn for a table and added; the released P-tuning v2: random, and 1"
    )
    input: Literal["bare", "manual"] = Field(
        "bare",
        description="what follows the prompt: prompt.template without pseudo tokens (SuperGLUE: the patterns of "
        "task.ptuning so), or the manual prompt (those of task.manual)",
    )

    @property
    def kind(self) -> EncoderName:
        """Among all encoders."""
        return "deep_mlp" if self.encoder == "mlp" else "deep_table"


class PromptConfig(Section):
    template: str = Field(
        "[P*3] {subject} [P*3] [answer] [P*3]",
        description="P-tuning: [P] and [P*n] are pseudo tokens; a causal backbone drops what follows [answer]",
    )
    manual: str | None = Field(None, description="the manual prompt; default for LAMA: the relation's own template")
    encoder: Literal["lstm", "mlp", "table"] = Field("lstm", description="lstm: the paper's; table: plain vectors")
    dropout: float = Field(0.0, ge=0.0, lt=1.0, description="dropout between the encoder's LSTM layers")
    deep: DeepConfig = DeepConfig()


class ScoringConfig(Section):
    train_over: Literal["answers", "word_list", "vocabulary"] = Field(
        "vocabulary", description="the softmax of the training loss"
    )
    evaluate_over: list[Reading] = Field(
        ["answers", "vocabulary"],
        min_length=1,
        description="the candidate sets that test figures are given for: answers, word_list, vocabulary, one of "
        "task.word_lists, or answers_multi: answers of several tokens too, by likelihood (of frozen LMs)",
    )
    select_on: Reading = Field("vocabulary", description="the reading for early stopping and the headline figure")

    @property
    def by_token(self) -> list[Reading]:
        """The readings of test figures that compare single tokens."""
        return [name for name in self.evaluate_over if name != LONG_ANSWERS]


class TrainConfig(Section):
    epochs: int = Field(100, ge=1, description="passes over the training records, at most")
    global_batch: int = Field(8, ge=1, description="examples per optimizer step over all ranks")
    micro_batch: int = Field(8, ge=1, description="examples computed together; ranks take whole micro-batches")
    micro_tokens: int | None = Field(
        None, ge=1, description="the same in tokens, padding counted: a micro-batch closes where it would hold more"
    )
    drop_last: bool = Field(False, description="leave out an epoch's incomplete last batch")
    optimizer: Literal["adam", "sgd"] = Field("adam", description="of the prompt encoder and a tuned LM, torch's")
    learning_rate: float = Field(1e-5, gt=0, description="of the prompt encoder: the highest rate of the schedule")
    table_learning_rate: float | None = Field(
        None, gt=0, description="the same of plain vectors (prompt_tuning, encoders `table`); default: learning_rate"
    )
    lm_learning_rate: float = Field(5e-6, gt=0, description="the same of a tuned LM")
    head_learning_rate: float | None = Field(
        None, gt=0, description="of finetune's classification head (SuperGLUE); default: lm_learning_rate"
    )
    weight_decay: float = Field(5e-4, ge=0, description="L2 term in the gradient, not decoupled")
    schedule: Literal["exponential", "linear", "constant"] = Field("exponential", description="of the learning rate")
    decay_per_epoch: float = Field(0.98, gt=0, le=1, description="exponential: factor per epoch")
    warmup_steps: int = Field(0, ge=0, description="steps over which the rate grows from nothing")
    final_fraction: float = Field(0.0, ge=0, le=1, description="linear: the last step's share of learning_rate")
    max_gradient_norm: float | None = Field(
        None, gt=0, description="clip the gradient at this norm: the encoder's and a tuned LM's, each its own"
    )
    loss_position: Literal["answer", "before_answer"] = Field(
        "answer",
        description="of a causal LM: before_answer trains the output one token earlier than the one that is evaluated, "
        "as the released LAMA code does by mistake",
    )
    lm_dropout: bool = Field(
        False,
        description="the LM's own dropout works on training batches although it is frozen, as in the released code; "
        "jobs that train together then share masks, and the savings of `speed` that pack batches must be off",
    )
    patience: int = Field(20, ge=0, description="stop after so many dev passes without a gain (a tie is one); 0: never")


class JobsConfig(Section):
    """Jobs are relations x seeds x learning rates x templates; frozen P-tuning trains them on one backbone together."""

    at_once: int | None = Field(
        None, ge=1, description="jobs whose examples share a step; 1: one after the other; default: all of them"
    )
    learning_rates: list[Annotated[float, Field(gt=0)]] = Field(
        [], description="a sweep: every prompt is trained at each; empty: the rates of `train`"
    )
    templates: list[str] = Field([], description="a sweep over P-tuning templates; empty: prompt.template")
    shard_encoders: Literal["auto"] | bool = Field(
        "auto", description="ranks own encoders and their optimizer state in turn; auto: with several ranks and jobs"
    )


class EvaluationConfig(Section):
    batch: int = Field(32, ge=1, description="examples a rank evaluates at a time")
    every_epochs: int = Field(1, ge=1, description="epochs between passes over dev; patience counts passes")


class CheckpointConfig(Section):
    every_steps: int | None = Field(None, ge=1, description="besides the end of each epoch")
    keep: int = Field(2, ge=2, description="newest checkpoints kept; two, so that one can be damaged")
    save_tuned_lm: bool = Field(False, description="leave a tuned LM in the job's folder, as a Hugging Face folder")


class MonitorConfig(Section):
    log_every: int = Field(10, ge=1, description="steps between log lines")
    tensorboard: bool = Field(True, description="write curves, text and hparams to tb/ in the run directory")
    sample_predictions: int = Field(8, ge=0, description="test predictions shown in TensorBoard")


class Config(Section):
    run: RunConfig = RunConfig()
    backbone: BackboneConfig
    task: Annotated[LamaTask | CustomTask | SuperGlueTask, Field(discriminator="type")]
    patterns: PatternBook = Field({}, description="SuperGLUE: each task's patterns and verbalizers; docs/superglue.md")
    methods: list[MethodName] = Field(
        ["manual", "ptuning"],
        min_length=1,
        description="manual: zero-shot with the manual prompt; manual_lpaqa, manual_autoprompt: with the prompts that "
        "these found for LAMA (of several the best on dev); ptuning: a prompt trained against the frozen LM; "
        "prompt_tuning: the same with plain vectors for the encoder; finetune: the LM tuned on the template without "
        "pseudo tokens (SuperGLUE: under a classification head); manual+finetune, ptuning+finetune: LM tuned too; "
        "deep_ptuning: keys and values trained for every layer, against the frozen LM; "
        "pet, ipet (SuperGLUE): patterns' models label examples, of which a head learns",
    )
    prompt: PromptConfig = PromptConfig()
    pet: PetConfig = PetConfig()
    scoring: ScoringConfig = ScoringConfig()
    train: TrainConfig = TrainConfig()
    jobs: JobsConfig = JobsConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
    parallel: ParallelConfig = ParallelConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    monitor: MonitorConfig = MonitorConfig()
    speed: SpeedConfig = SpeedConfig()
    kernels: KernelConfig = KernelConfig()
    launch: LaunchConfig = LaunchConfig()

    @model_validator(mode="after")
    def _fields_fit_together(self) -> "Config":
        problems = []
        wants_word_list = {*self.scoring.evaluate_over, self.scoring.train_over} & {"word_list"}
        if wants_word_list and self.task.word_list is None:
            problems.append("scoring reads over word_list, but task.word_list names no file")
        named = list(self.task.word_lists) if isinstance(self.task, TaskConfig) else []
        problems += [f"task.word_lists.{name} has the name of another reading" for name in named if name in READINGS]
        problems += [
            f"scoring.evaluate_over: {name!r} is no reading; expected {', '.join((*READINGS, *named))}"
            for name in self.scoring.evaluate_over
            if name not in (*READINGS, *named)
        ]
        if self.scoring.select_on not in self.scoring.evaluate_over:
            problems.append(
                f"scoring.select_on is {self.scoring.select_on!r}, which scoring.evaluate_over does not list"
            )
        elif self.scoring.select_on == LONG_ANSWERS:
            problems.append(f"scoring.select_on: {LONG_ANSWERS} is reported only; select on a reading of single tokens")
        if isinstance(self.task, CustomTask):
            training = next((name for name in self.methods if METHODS[name].trains), None)
            missing = [f"task.{split}" for split in ("train", "dev") if getattr(self.task, split) is None]
            if training and missing:
                problems.append(f"method {training} needs {' and '.join(missing)}")
            manual = next((name for name in self.methods if self.reads_manual(name)), None)
            if manual and self.prompt.manual is None:
                problems.append(f"method {manual} needs prompt.manual: a custom task has no template of its own")
        if not isinstance(self.task, LamaTask):
            problems += [
                f"method {PROMPT_SETS[name]} has prompts for LAMA's relations only; write your own as prompt.manual"
                for name in self.prompt_sets
            ]
        if self.backbone.random_weights is not None and not any(METHODS[name].trains for name in self.methods):
            problems.append("backbone.random_weights is a control for what is trained; no method here trains anything")
        if isinstance(self.task, SuperGlueTask):
            problems += pattern_problems(self.task, self.patterns)
            if self.jobs.templates:
                problems.append("jobs.templates is for other tasks; of a superglue task name patterns in task.ptuning")
        problems += self._pet_problems()
        problems += self._layout_problems()
        if self.deep and not self.speed.answers_only:
            problems.append("method deep_ptuning reads packed batches, at the answers alone: set speed.answers_only")
        problems += self._dropout_problems()
        lists: dict[str, list[Any]] = {
            "run.seeds": list(self.run.seeds),
            "methods": list(self.methods),
            "scoring.evaluate_over": list(self.scoring.evaluate_over),
            "jobs.learning_rates": list(self.jobs.learning_rates),
            "jobs.templates": list(self.jobs.templates),
        }
        if isinstance(self.task, LamaTask) and self.task.relations != "all":
            lists["task.relations"] = list(self.task.relations)
        if isinstance(self.task, SuperGlueTask) and self.task.tasks != "all":
            lists["task.tasks"] = list(self.task.tasks)
        problems += [f"{key} repeats an entry: {found}" for key, found in lists.items() if len(set(found)) < len(found)]
        if self.prompt.dropout and self.prompt.encoder != "lstm":
            problems.append(f"prompt.dropout works between LSTM layers; prompt.encoder is {self.prompt.encoder!r}")
        if problems:
            raise ValueError("; ".join(problems))
        return self

    def _pet_problems(self) -> list[str]:
        method = next((name for name in self.methods if METHODS[name].ensemble), None)
        if method is None:
            return []
        if not isinstance(self.task, SuperGlueTask):
            return [f"method {method} is for superglue tasks: it needs several patterns with the same labels"]
        return pet_problems(method, self.pet, self.task, self.patterns)

    def _dropout_problems(self) -> list[str]:
        """What computes a block in another form than the family's own, or more than once, has no dropout in it."""
        if not self.train.lm_dropout:
            return []
        speed, parallel = self.speed, self.parallel
        packing = "packing", "share_leading_tokens", "cut_last_block", "context_cache", "compile_blocks"
        wrong = [f"speed.{name}: false" for name in packing if getattr(speed, name)]
        wrong += ["parallel.activation_checkpointing: false"] if parallel.activation_checkpointing else []
        wrong += ["parallel.tensor_parallel: 1"] if parallel.tensor_parallel > 1 else []
        wrong += ["a stated parallel.layout"] if parallel.layout == "auto" else []
        wrong += ["methods without deep_ptuning, whose batches are always packed"] if self.deep else []
        return [f"train.lm_dropout needs {', '.join(wrong)}"] if wrong else []

    def _layout_problems(self) -> list[str]:
        if not self.tunes_lm:
            stage = self.parallel.zero_stage
            unfit = stage in (1, 2) and self.parallel.layout == "stated"
            return [f"parallel.zero_stage is {stage}; methods that leave the LM frozen need 0 or 3"] if unfit else []
        if self.parallel.offload != "none":
            return [
                f"parallel.offload: {self.parallel.offload} is for frozen weights; methods that tune the LM need none"
            ]
        return []

    @property
    def tunes_lm(self) -> bool:
        return any(METHODS[name].tunes_lm for name in self.methods)

    @property
    def deep(self) -> bool:
        """Whether a method trains deep prompts."""
        return any(METHODS[name].deep for name in self.methods)

    def reads_manual(self, method: MethodName) -> bool:
        """Whether a method's input is the manual prompt."""
        return METHODS[method].prompt == "manual" or (METHODS[method].deep and self.prompt.deep.input == "manual")

    def encoder(self, method: Method) -> EncoderName:
        """What makes a method's prompts."""
        return self.prompt.deep.kind if method.deep else method.encoder or self.prompt.encoder

    @property
    def prompt_sets(self) -> list[PromptSet]:
        """The sets of prompts that methods read."""
        return [name for name, method in PROMPT_SETS.items() if method in self.methods]

    def learning_rates(self, method: Method) -> list[float]:
        """Of a method's prompts: the sweep, or the one rate."""
        plain = self.encoder(method) in ("table", "deep_table")
        rate = (self.train.table_learning_rate if plain else None) or self.train.learning_rate
        return self.jobs.learning_rates or [rate]

    @property
    def templates(self) -> list[str]:
        """Of P-tuning: the sweep, or the one template; of SuperGLUE as many names as the task with most patterns."""
        if isinstance(self.task, SuperGlueTask):
            return [f"pattern {number}" for number in range(1, 1 + self.task.most_patterns("ptuning", self.patterns))]
        return self.jobs.templates or [self.prompt.template]

    def jobs_wanted(self, tasks: int) -> int:
        """Prompts of so many tasks that train against the frozen LM together where memory allows."""
        frozen = [METHODS[name] for name in self.methods if METHODS[name].trains and not METHODS[name].tunes_lm]
        deep = sum(method.deep for method in frozen)  # these train together, after the others
        use: Use = "manual" if self.prompt.deep.input == "manual" else "ptuning"
        behind = self.task.most_patterns(use, self.patterns) if isinstance(self.task, SuperGlueTask) else 1
        methods = max((len(frozen) - deep) * len(self.templates), deep * behind)
        return methods * tasks * len(self.run.seeds) * max(1, len(self.jobs.learning_rates))

    def jobs_at_once(self, tasks: int) -> int:
        """How many prompts of so many tasks share a step; methods that tune the LM train one job at a time."""
        wanted = self.jobs_wanted(tasks)
        return max(1, min(wanted, self.jobs.at_once or wanted))

    @property
    def tasks(self) -> list[TaskName]:
        """SuperGLUE's tasks that are asked for."""
        if not isinstance(self.task, SuperGlueTask):
            return []
        return list(self.patterns) if self.task.tasks == "all" else self.task.tasks

    def identity(self) -> dict[str, Any]:
        """What decides the result: all but the layout, logging and retention, which a resumed run may change."""
        exempt = {"run", "parallel", "checkpoint", "monitor", "speed", "kernels", "launch", "evaluation"}
        kept = self.model_dump(mode="json", exclude=exempt)
        kept["run"] = {"seeds": self.run.seeds}
        kept["jobs"] = {"learning_rates": self.jobs.learning_rates, "templates": self.jobs.templates}
        kept["backbone"].pop("architecture")
        kept["evaluation"] = {"every_epochs": self.evaluation.every_epochs}
        return kept


INPUT_PATHS = (
    "backbone.path",
    "backbone.architecture",
    "task.root",
    "task.lpaqa_prompts",
    "task.autoprompt_prompts",
    "task.word_list",
    "task.word_lists",
    "task.train",
    "task.dev",
    "task.test",
    "pet.root",
)
"""The keys whose relative values are resolved against the file that states them."""


def load_config(
    path: Path, overrides: list[str] | None = None, is_embedded: Any = None, unset_paths: bool = False
) -> Config:
    """Read, layer and validate a configuration file.

    :param overrides: ``a.b=value`` strings; the value is read as YAML.
    :param is_embedded: says of a ``backbone.path`` whether it names an embedded backbone and so is no path.
    :param unset_paths: leave an input path as it is written where it names a variable that is not set.
    :raises ConfigError: with every problem found, and the nearest valid key for an unknown one.
    """
    keep = is_embedded or (lambda value: False)
    resolve = config_files.PathResolver(INPUT_PATHS, keep, unset_paths)
    raw = config_files.read_layers(path, resolve)
    for override in overrides or []:
        config_files.apply_override(raw, override, resolve)
    return validate(raw, source=str(path))


def validate(raw: dict[str, Any], source: str) -> Config:
    """A plain mapping as a :class:`Config`; ``source`` names it in the error."""
    return config_files.validated(Config, raw, source)
