"""What a method splices into the input, and what it trains (Liu et al. 2021, the columns of their tables)."""

from dataclasses import dataclass
from typing import Literal

MethodName = Literal["manual", "finetune", "manual+finetune", "ptuning", "ptuning+finetune", "deep_ptuning"]


@dataclass(frozen=True)
class Method:
    """label: in tables; prompt: the manual prompt, the P-tuning template, or that template without pseudo tokens; deep:
    whether the trained prompt is keys and values of every layer, in front of an input without pseudo tokens."""

    label: str
    prompt: Literal["manual", "template", "bare"]
    trains_prompt: bool
    tunes_lm: bool
    deep: bool = False

    @property
    def trains(self) -> bool:
        return self.trains_prompt or self.tunes_lm


METHODS: dict[MethodName, Method] = {
    "manual": Method("manual", "manual", trains_prompt=False, tunes_lm=False),
    "finetune": Method("FT", "bare", trains_prompt=False, tunes_lm=True),
    "manual+finetune": Method("manual + FT", "manual", trains_prompt=False, tunes_lm=True),
    "ptuning": Method("P-tuning", "template", trains_prompt=True, tunes_lm=False),
    "ptuning+finetune": Method("P-tuning + FT", "template", trains_prompt=True, tunes_lm=True),
    "deep_ptuning": Method("deep P-tuning", "bare", trains_prompt=True, tunes_lm=False, deep=True),
}
"""In the order of the results table."""
