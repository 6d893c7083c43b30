"""Everything that can go wrong before weights are read: configuration, data, templates, tokenizer, backbone folder."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from megaptune.backbone.architectures import FAMILIES
from megaptune.backbone.description import BackboneDescription, describe_backbone, load_tokenizer
from megaptune.backbone.embedded import embedded_folder, is_embedded
from megaptune.config import Config, LamaTask, SuperGlueTask
from megaptune.errors import BackboneError
from megaptune.examples import PreparedTask, prepare_task
from megaptune.prompts.tokens import TokenForms
from megaptune.run.monitor import Monitor
from megaptune.superglue_data import SuperGlueData, absent_tasks, load_superglue
from megaptune.superglue_examples import PreparedSuperGlue, prepare_superglue
from megaptune.tasks.custom import load_custom
from megaptune.tasks.lama import load_lama, read_word_list
from megaptune.tasks.records import TaskData


@dataclass(frozen=True)
class PreparedRun:
    """A configuration with all that it names read, checked and encoded; the weights alone are missing."""

    config: Config
    backbone: BackboneDescription
    tokenizer: Any
    tasks: Sequence[PreparedTask | PreparedSuperGlue]

    @property
    def pad_id(self) -> int:
        """Any id will do: nothing that counts sees the padding."""
        candidates = (self.tokenizer.pad_token_id, self.tokenizer.eos_token_id, 0)
        return next(int(token) for token in candidates if token is not None)


def prepare_run(config: Config, monitor: Monitor) -> PreparedRun:
    """:raises MegaptuneError: with the file, record or key at fault."""
    path = config.backbone.path
    tasks = load_tasks(config)
    absent = absent_tasks(config)
    if absent:
        monitor.warn(f"task.tasks: all leaves out {', '.join(absent)}: no such folder in task.root")
    folder = embedded_folder(monitor.say) if is_embedded(path) else Path(path)
    backbone = describe_backbone(folder, config.backbone.kind, config.backbone.random_weights)
    if config.deep and backbone.family not in FAMILIES:
        raise BackboneError(
            f"{folder}: deep_ptuning puts keys and values into the attention of {', '.join(FAMILIES)}; the backbone is "
            f"{backbone.family!r}: leave the method out, or choose another backbone"
        )
    tokenizer = load_tokenizer(folder)
    return PreparedRun(config, backbone, tokenizer, encode_tasks(config, tasks, tokenizer, backbone))


def encode_tasks(
    config: Config, tasks: Sequence[TaskData | SuperGlueData], tokenizer: Any, backbone: BackboneDescription
) -> list[PreparedTask | PreparedSuperGlue]:
    """The tasks as the backbone sees them."""
    forms = TokenForms(tokenizer)
    settings = config, forms, backbone.kind, backbone.max_tokens
    return [
        prepare_task(data, *settings) if isinstance(data, TaskData) else prepare_superglue(data, *settings)
        for data in tasks
    ]


def load_tasks(config: Config) -> Sequence[TaskData | SuperGlueData]:
    """Every relation or SuperGLUE task (or the one custom task) that the configuration asks for."""
    if isinstance(config.task, SuperGlueTask):
        return load_superglue(config)
    task = config.task
    words = read_word_list(task.word_list) if task.word_list else None
    lists = {name: read_word_list(path, f"task.word_lists.{name}") for name, path in task.word_lists.items()}
    found = load_lama(task, words, config.prompt_sets) if isinstance(task, LamaTask) else [load_custom(task, words)]
    return [replace(data, word_lists=lists) for data in found]
