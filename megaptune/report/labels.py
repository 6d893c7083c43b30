"""How a report names and orders methods: those of the runs, and those that the paper alone has figures of."""

from megaptune.methods import METHODS

LABELS: dict[str, str] = {
    "manual": "manual",
    "manual_lpaqa": "LPAQA",
    "manual_autoprompt": "AutoPrompt",
    "prompt_tuning": "prompt tuning",
    "ptuning": "P-tuning",
    "deep_ptuning": "deep P-tuning",
    "finetune": "FT",
    "manual+finetune": "manual + FT",
    "ptuning+finetune": "P-tuning + FT",
    "pet": "PET",
    "ipet": "iPET",
}
"""From zero-shot prompts to tuned LMs, as the paper's tables go."""
LABELS |= {name: method.label for name, method in METHODS.items()}


def method_label(method: str) -> str:
    return LABELS.get(method, method)


def ordered(methods: list[str]) -> list[str]:
    """In the order of LABELS, others behind."""
    known = list(LABELS)
    return sorted(dict.fromkeys(methods), key=lambda name: (known.index(name) if name in known else len(known), name))


def split_folder(name: str) -> tuple[str, int | None, str]:
    """A job's folder, such as ``ptuning+finetune-seed0-lr0.01``, as method, seed and variant."""
    method = max((known for known in LABELS if name == known or name.startswith(f"{known}-")), key=len, default="")
    method = method or name.partition("-")[0]
    first, _, rest = name.removeprefix(method).removeprefix("-").partition("-")
    number = first.removeprefix("seed")
    if first.startswith("seed") and number.isdecimal():
        return method, int(number), rest
    return method, None, f"{first}-{rest}" if rest else first
