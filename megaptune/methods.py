"""What a method splices into the input, and what it trains (Liu et al. 2021, the columns of their tables)."""

from dataclasses import dataclass
from typing import Literal

MethodName = Literal[
    "manual",
    "manual_lpaqa",
    "manual_autoprompt",
    "finetune",
    "manual+finetune",
    "pet",
    "ipet",
    "prompt_tuning",
    "ptuning",
    "ptuning+finetune",
    "deep_ptuning",
]
PromptSet = Literal["lpaqa", "autoprompt"]
"""Prompts that others searched for each LAMA relation: LPAQA mined and paraphrased them (Jiang et al. 2020), AutoPrompt
chose their tokens by gradient (Shin et al. 2020)."""


@dataclass(frozen=True)
class Method:
    """label: in tables; prompt: the manual prompt, one of a set, the P-tuning template, or that template without
    pseudo tokens; encoder: of the prompt, where it is not the configuration's; deep: whether the trained prompt is keys
    and values of every layer, in front of an input without pseudo tokens; ensemble: whether models of several patterns
    come first, whose labels it learns."""

    label: str
    prompt: Literal["manual", "template", "bare"] | PromptSet
    trains_prompt: bool
    tunes_lm: bool
    encoder: Literal["lstm", "mlp", "table"] | None = None
    deep: bool = False
    ensemble: bool = False

    @property
    def trains(self) -> bool:
        return self.trains_prompt or self.tunes_lm


METHODS: dict[MethodName, Method] = {
    "manual": Method("manual", "manual", trains_prompt=False, tunes_lm=False),
    "manual_lpaqa": Method("LPAQA", "lpaqa", trains_prompt=False, tunes_lm=False),
    "manual_autoprompt": Method("AutoPrompt", "autoprompt", trains_prompt=False, tunes_lm=False),
    "finetune": Method("FT", "bare", trains_prompt=False, tunes_lm=True),
    "manual+finetune": Method("manual + FT", "manual", trains_prompt=False, tunes_lm=True),
    "pet": Method("PET", "bare", trains_prompt=False, tunes_lm=True, ensemble=True),
    "ipet": Method("iPET", "bare", trains_prompt=False, tunes_lm=True, ensemble=True),
    "prompt_tuning": Method("prompt tuning", "template", trains_prompt=True, tunes_lm=False, encoder="table"),
    "ptuning": Method("P-tuning", "template", trains_prompt=True, tunes_lm=False),
    "ptuning+finetune": Method("P-tuning + FT", "template", trains_prompt=True, tunes_lm=True),
    "deep_ptuning": Method("deep P-tuning", "bare", trains_prompt=True, tunes_lm=False, deep=True),
}
"""In the order of the results table."""

PROMPT_SETS: dict[PromptSet, MethodName] = {"lpaqa": "manual_lpaqa", "autoprompt": "manual_autoprompt"}
"""The method that reads each set."""
