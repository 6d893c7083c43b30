"""The ``task:`` section where answers are words: LAMA, and facts of one's own; and what answers compete with."""

from pathlib import Path
from typing import Literal

from pydantic import Field

from megaptune.config_base import Limits

Reading = str
"""The candidates that an answer is compared with: one of READINGS, or the name of one of task.word_lists."""
READINGS = ("answers", "word_list", "vocabulary", "answers_multi")
LONG_ANSWERS = "answers_multi"
"""The reading that keeps answers of several tokens: it is of whole answers, not of single tokens."""


class TaskConfig(Limits):
    """What tasks have in common whose answers are words."""

    multi_token_answers: Literal["error", "drop"] = Field(
        "error", description="an answer that is not one token of the backbone: stop, or drop the record and count it"
    )
    word_list: Path | None = Field(None, description="words answers may be: .txt (one a line) or LAMA's .json lists")
    word_lists: dict[str, Path] = Field(
        {}, description="more readings, name: file; each compares the records whose answer it lists over its words"
    )


class LamaTask(TaskConfig):
    """LAMA T-REx in the official layout (AutoPrompt's splits)."""

    type: Literal["lama"] = Field(description="LAMA T-REx in the official layout")
    root: Path = Field(description="folder with relations.jsonl and fact-retrieval/original/P*/")
    relations: list[str] | Literal["all"] = Field("all", description="relation ids such as P17, or all that are there")
    lpaqa_prompts: Path | None = Field(
        None,
        description="rows of relation and template, for manual_lpaqa; default: prompts/LPAQA_relations.jsonl in root",
    )
    autoprompt_prompts: Path | None = Field(
        None, description="the same for manual_autoprompt; default: prompts/AutoPrompt_relations.jsonl in root"
    )
    multi_token_answers: Literal["error", "drop"] = Field(
        "drop", description="an answer that is not one token of the backbone: drop the record and count it, or stop"
    )


class CustomTask(TaskConfig):
    """Your own facts: JSONL or CSV files whose columns are the template's {fields}."""

    type: Literal["custom"] = Field(description="your own facts, JSONL or CSV")
    name: str = Field("custom", pattern=r"^\w[\w.-]*$", description="how the table and the run directory call it")
    train: Path | None = Field(None, description="file of training records; ptuning needs it")
    dev: Path | None = Field(None, description="file of records to choose the epoch on; ptuning needs it")
    test: Path = Field(description="file of records to report on")
    answer: str = Field(description="the field that holds the answer")
    subject: str | None = Field(None, description="the field searched for copied answers; default: all other fields")
