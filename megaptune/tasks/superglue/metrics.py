"""SuperGLUE's metrics (Wang et al. 2019, section 3), all between 0 and 1.

Gold answers and predictions are keyed by the example's number; MultiRC's groups by question are read off it.
"""

import re
import string
from collections import Counter, defaultdict
from collections.abc import Mapping

from sklearn.metrics import accuracy_score, f1_score

from megaptune.errors import DataError
from megaptune.patterns import TaskName
from megaptune.tasks.superglue.records import Idx

Gold = Mapping[Idx, tuple[str, ...]]
Predictions = Mapping[Idx, str]

METRICS: dict[TaskName, tuple[str, ...]] = {
    "BoolQ": ("accuracy",),
    "CB": ("accuracy", "f1"),
    "COPA": ("accuracy",),
    "MultiRC": ("f1a", "em"),
    "RTE": ("accuracy",),
    "WiC": ("accuracy",),
    "WSC": ("accuracy",),
    "ReCoRD": ("f1", "em"),
}
"""Each task's metrics; SuperGLUE's score of a task is their mean."""


def score(task: TaskName, gold: Gold, predictions: Predictions) -> dict[str, float]:
    """The task's metrics over all gold examples.

    :raises DataError: when there is no gold example, or one has no prediction.
    """
    if not gold:
        raise DataError(f"{task}: nothing to score: the examples have no labels")
    missing = [idx for idx in gold if idx not in predictions]
    if missing:
        first = ", ".join(map(str, missing[0]))
        raise DataError(f"{task}: {len(missing)} of {len(gold)} examples have no prediction (first: {first})")
    if task == "ReCoRD":
        return _record(gold, predictions)
    right = [answers[0] for answers in gold.values()]
    said = [predictions[idx] for idx in gold]
    if task == "MultiRC":
        return {"f1a": float(f1_score(right, said, pos_label="1", zero_division=0.0)), "em": _questions(gold, said)}
    found = {"accuracy": float(accuracy_score(right, said))}
    if task == "CB":  # over the classes that occur, as SuperGLUE's own code does
        found["f1"] = float(f1_score(right, said, average="macro", zero_division=0.0))
    return found


def task_score(task: TaskName, metrics: Mapping[str, float]) -> float:
    """A task's one figure: the mean of its metrics."""
    return sum(metrics[name] for name in METRICS[task]) / len(METRICS[task])


def _questions(gold: Gold, said: list[str]) -> float:
    """The share of questions whose answers are all judged right."""
    judged: dict[Idx, bool] = defaultdict(lambda: True)
    for (idx, answers), label in zip(gold.items(), said, strict=True):
        judged[idx[:2]] &= label == answers[0]
    return sum(judged.values()) / len(judged)


def _record(gold: Gold, predictions: Predictions) -> dict[str, float]:
    """Of each query the best over its right answers, then the mean over queries."""
    f1 = [max(token_f1(predictions[idx], answer) for answer in answers) for idx, answers in gold.items()]
    em = [
        max(normalised(predictions[idx]) == normalised(answer) for answer in answers) for idx, answers in gold.items()
    ]
    return {"f1": sum(f1) / len(f1), "em": sum(em) / len(em)}


def token_f1(predicted: str, answer: str) -> float:
    """F1 of two texts as bags of normalised words."""
    one, other = normalised(predicted).split(), normalised(answer).split()
    shared = sum((Counter(one) & Counter(other)).values())
    return 2 * shared / (len(one) + len(other)) if shared else 0.0


def normalised(text: str) -> str:
    """Small letters, without punctuation and articles, single spaces: ReCoRD's comparison, taken from SQuAD's."""
    kept = "".join(letter for letter in text.lower() if letter not in string.punctuation)
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", kept).split())
