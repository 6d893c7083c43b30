"""What a method splices into the input, and what it trains (Liu et al. 2021, the columns of their tables)."""

from dataclasses import dataclass
from typing import Literal

MethodName = Literal[
    "manual", "finetune", "manual+finetune", "pet", "ipet", "prompt_tuning", "ptuning", "ptuning+finetune"
]


@dataclass(frozen=True)
class Method:
    """label: in tables; prompt: the manual prompt, the P-tuning template, or that template without pseudo tokens;
    encoder: of the prompt, where it is not the configuration's; ensemble: whether models of several patterns come
    first, whose labels it learns from."""

    label: str
    prompt: Literal["manual", "template", "bare"]
    trains_prompt: bool
    tunes_lm: bool
    encoder: Literal["lstm", "mlp", "table"] | None = None
    ensemble: bool = False

    @property
    def trains(self) -> bool:
        return self.trains_prompt or self.tunes_lm


METHODS: dict[MethodName, Method] = {
    "manual": Method("manual", "manual", trains_prompt=False, tunes_lm=False),
    "finetune": Method("FT", "bare", trains_prompt=False, tunes_lm=True),
    "manual+finetune": Method("manual + FT", "manual", trains_prompt=False, tunes_lm=True),
    "pet": Method("PET", "bare", trains_prompt=False, tunes_lm=True, ensemble=True),
    "ipet": Method("iPET", "bare", trains_prompt=False, tunes_lm=True, ensemble=True),
    "prompt_tuning": Method("prompt tuning", "template", trains_prompt=True, tunes_lm=False, encoder="table"),
    "ptuning": Method("P-tuning", "template", trains_prompt=True, tunes_lm=False),
    "ptuning+finetune": Method("P-tuning + FT", "template", trains_prompt=True, tunes_lm=True),
}
"""In the order of the results table."""
