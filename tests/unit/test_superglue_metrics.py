"""SuperGLUE's metrics against examples worked by hand, scikit-learn, and plain counting on random answers."""

import random

import pytest
from sklearn.metrics import f1_score, precision_recall_fscore_support

from megaptune.errors import DataError
from megaptune.patterns import LABELS, TaskName
from megaptune.tasks.superglue.metrics import METRICS, normalised, score, task_score, token_f1


def one(labels: str) -> dict[tuple[int, ...], tuple[str, ...]]:
    return {(n,): (label,) for n, label in enumerate(labels.split())}


def said(labels: str) -> dict[tuple[int, ...], str]:
    return {(n,): label for n, label in enumerate(labels.split())}


def test_accuracy_by_hand():
    assert score("BoolQ", one("true true false true"), said("true false false true")) == {"accuracy": 0.75}


def test_cb_by_hand():
    """entailment: 1 of the 2 said, 1 of 1 found; contradiction: 1 of 2, 1 of 2; neutral: never. F1 2/3, 1/2, 0."""
    gold = one("entailment contradiction contradiction neutral")
    found = score("CB", gold, said("entailment contradiction entailment contradiction"))
    assert found["accuracy"] == 0.5
    assert found["f1"] == pytest.approx((2 / 3 + 1 / 2 + 0) / 3)


def test_a_class_that_does_not_occur_is_no_part_of_the_macro_f1():
    assert score("CB", one("entailment contradiction"), said("entailment contradiction"))["f1"] == 1.0


def test_multirc_by_hand():
    """Three questions. Of 4 answers said to be right 3 are, of the 5 right ones: F1a 6/9. All right: the middle one."""
    gold = {(0, 0, 0): "1", (0, 0, 1): "1", (0, 1, 2): "0", (0, 1, 3): "1"}
    gold |= {(1, 0, 4): "1", (1, 0, 5): "0", (1, 0, 6): "1"}
    answers = {**gold, (0, 0, 1): "0", (1, 0, 5): "1", (1, 0, 6): "0"}
    found = score("MultiRC", {idx: (label,) for idx, label in gold.items()}, answers)
    assert found == {"f1a": pytest.approx(6 / 9), "em": pytest.approx(1 / 3)}


def test_multirc_without_a_right_answer_said_scores_nothing():
    gold = {(0, 0, 0): ("1",), (0, 1, 1): ("0",)}
    assert score("MultiRC", gold, dict.fromkeys(gold, "0")) == {"f1a": 0.0, "em": 0.5}


def test_record_by_hand():
    """The best of a query's right answers counts: exact; one word of two (F1 2/3); nothing."""
    gold = {(0,): ("the U.S.", "America"), (1,): ("Anna Berg",), (2,): ("Oslo",)}
    found = score("ReCoRD", gold, {(0,): "US", (1,): "Berg", (2,): "Lima"})
    assert found == {"f1": pytest.approx((1 + 2 / 3 + 0) / 3), "em": pytest.approx(1 / 3)}


@pytest.mark.parametrize(
    ("text", "plain"),
    [("The U.S.", "us"), ("a  Tale\tof an Ant", "tale of ant"), ("Theo's", "theos"), ("the-a", "thea"), ("", "")],
)
def test_record_compares_texts_without_case_punctuation_and_articles(text: str, plain: str):
    assert normalised(text) == plain


def test_repeated_words_count_as_often_as_they_stand_in_both():
    assert token_f1("New New York", "New York New York") == pytest.approx(2 * 3 / 7)
    assert token_f1("", "") == 0.0


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("task", ["CB", "MultiRC"])
def test_f1_agrees_with_scikit_learn_and_with_counting(task: TaskName, seed: int):
    rng = random.Random(seed)
    labels = LABELS[task]
    right = {(n // 9, n // 3, n): (rng.choice(labels),) for n in range(90)}
    answers = {idx: rng.choice((gold[0], rng.choice(labels))) for idx, gold in right.items()}
    true, guessed = [gold[0] for gold in right.values()], list(answers.values())

    def counted(label: str) -> float:
        both = sum(t == g == label for t, g in zip(true, guessed, strict=True))
        return 2 * both / (true.count(label) + guessed.count(label))

    found = score(task, right, answers)
    if task == "CB":
        assert found["f1"] == pytest.approx(sum(map(counted, labels)) / 3)
        assert found["f1"] == pytest.approx(f1_score(true, guessed, average="macro"))
        assert found["accuracy"] == pytest.approx(sum(t == g for t, g in zip(true, guessed, strict=True)) / 90)
    else:
        assert found["f1a"] == pytest.approx(counted("1"))
        assert found["f1a"] == pytest.approx(
            precision_recall_fscore_support(true, guessed, average="binary", pos_label="1")[2]
        )
        groups = [all(true[n + k] == guessed[n + k] for k in range(3)) for n in range(0, 90, 3)]
        assert found["em"] == pytest.approx(sum(groups) / 30)


def test_a_tasks_score_is_the_mean_of_its_metrics():
    assert task_score("CB", {"accuracy": 0.8, "f1": 0.6}) == pytest.approx(0.7)
    assert {task: len(names) for task, names in METRICS.items() if len(names) > 1} == {
        "CB": 2,
        "MultiRC": 2,
        "ReCoRD": 2,
    }


def test_what_cannot_be_scored_is_told():
    with pytest.raises(DataError, match=r"BoolQ: 2 of 3 examples have no prediction \(first: 1\)"):
        score("BoolQ", one("true true false"), said("true"))
    with pytest.raises(DataError, match="nothing to score: the examples have no labels"):
        score("BoolQ", {}, {})
