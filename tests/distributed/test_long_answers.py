"""Answers of several tokens: the search's likelihoods against a plain computation of every answer, on every layout."""

from pathlib import Path

import pytest
import torch
from hosting import open_host
from ranks import run_ranks
from tiny import CITIES, COUNTRIES, tiny_tokenizer
from transformers import AutoModelForCausalLM, AutoModelForMaskedLM

from megaptune import long_answers
from megaptune.examples import LongExample
from megaptune.prompts.template import Template
from megaptune.prompts.tokens import TokenForms
from megaptune.prompts.verbalizer import AnswerTokens
from megaptune.run.topology import disconnect
from megaptune.tasks.records import Record

pytestmark = pytest.mark.dist

LONG = ["Peruvia", "Perugia", "Egyptia", "Quito", "Quit", "old Italy"]
"""Several share their first tokens, and "Quit" ends where "Quito" goes on."""
TEMPLATE = "[P] {subject} [P] is in [answer] ."
KIND = {"gpt2": "causal", "llama": "causal", "bert": "masked"}
FIRST_ROW = 2
"""The prompts are not the table's first."""


def examples(kind: str, words: list[str]) -> tuple[list[LongExample], AnswerTokens]:
    forms = TokenForms(tiny_tokenizer(kind))
    answers = AnswerTokens.of(words, forms)
    template = Template(TEMPLATE, KIND[kind])
    lengths = answers.lengths if KIND[kind] == "masked" else [1]
    found = []
    for city, word in zip(["old Rome", *CITIES[:4]], [*LONG[:3], *COUNTRIES], strict=False):
        record = Record({"subject": city}, word, "facts", city)
        prompts = {count: template.encode(record, forms, answer_tokens=count) for count in lengths}
        found.append(LongExample(prompts, answers.tokens_of[word], record))
    return found, answers


def table(width: int) -> torch.Tensor:
    return torch.randn(FIRST_ROW + 2, width, generator=torch.Generator().manual_seed(1))


def searched(folder: Path, kind: str, words: list[str], parallel: dict) -> long_answers.LongOutcome:
    host = open_host(folder, **parallel)
    found, answers = examples(kind, words)
    members = [long_answers.LongMember(example, answers, FIRST_ROW, 0) for example in found]
    outcome = long_answers.rank_answers(host, members, table(host.width), batch=3, pad_id=0)
    disconnect()
    return outcome


def plain(folder: Path, kind: str, words: list[str]) -> list[list[tuple[float, tuple[int, ...]]]]:
    """Every answer of every example with transformers alone, one forward an answer, the best first."""
    auto = AutoModelForCausalLM if KIND[kind] == "causal" else AutoModelForMaskedLM
    model = auto.from_pretrained(folder).eval()
    embedding = model.get_input_embeddings().weight
    rows = table(embedding.shape[1])
    found, answers = examples(kind, words)
    scored = []
    for example in found:
        scores = []
        for tokens in answers.words:
            prompt = example.prompts[len(tokens) if KIND[kind] == "masked" else 1]
            slots = prompt.slots + (list(tokens[:-1]) if KIND[kind] == "causal" else [])
            embeds = torch.stack([rows[FIRST_ROW - 1 - s] if s < 0 else embedding[s] for s in slots])
            with torch.no_grad():
                likelihood = torch.log_softmax(model(inputs_embeds=embeds[None]).logits[0], dim=1)
            places = range(prompt.answer_position, prompt.answer_position + len(tokens))
            scores.append((float(sum(likelihood[p, t] for p, t in zip(places, tokens, strict=True))), tokens))
        scored.append(sorted(scores, reverse=True))
    return scored


LAYOUTS = {"one": (1, {}), "zero3": (2, {"zero_stage": 3}), "tp2": (2, {"tensor_parallel": 2})}


@pytest.mark.parametrize(("kind", "layout"), [("gpt2", "one"), ("gpt2", "zero3"), ("llama", "tp2"), ("bert", "zero3")])
def test_the_best_answers_are_those_of_a_plain_computation(tiny, kind, layout):
    ranks, parallel = LAYOUTS[layout]
    words = [*COUNTRIES, *LONG]
    expected = plain(tiny(kind), kind, words)
    right = [example.answer for example in examples(kind, words)[0]]
    for outcome in run_ranks(ranks, searched, tiny(kind), kind, words, parallel):
        for best, scores, rank, answer in zip(outcome.best, expected, outcome.rank, right, strict=True):
            assert [tokens for _, tokens in best] == [tokens for _, tokens in scores[:10]]
            assert [score for score, _ in best] == pytest.approx([score for score, _ in scores[:10]], abs=1e-4)
            assert rank == min(10, [tokens for _, tokens in scores].index(answer))
        assert outcome.regained == [len(answer) > 1 for answer in right]


def test_what_cannot_be_among_the_best_is_not_computed(tiny, monkeypatch):
    """With the best one wanted, no input goes on behind a first token that is less likely than a whole answer."""
    asked = []
    original = long_answers.log_probabilities

    def counted(host, questions, *others):
        asked.append(len(questions))
        return original(host, questions, *others)

    monkeypatch.setattr(long_answers, "log_probabilities", counted)
    monkeypatch.setattr(long_answers, "BEST", 1)
    words = [*COUNTRIES, *LONG]
    (outcome, rounds), = run_ranks(1, lambda: (searched(tiny("gpt2"), "gpt2", words, {}), asked))  # fmt: skip
    expected = plain(tiny("gpt2"), "gpt2", words)
    assert [best[0][1] for best in outcome.best] == [scores[0][1] for scores in expected]
    starts = {tokens[:1] for tokens in examples("gpt2", words)[1].words if len(tokens) > 1}
    assert rounds[0] == len(expected)
    assert sum(rounds[1:]) < len(expected) * len(starts)


def test_the_trie_knows_every_token_once():
    answers = AnswerTokens({(1, 2): ["a b"], (1, 3): ["a c"], (1,): ["a"], (4, 5, 6): ["d"]})
    assert answers.children == {(): [1, 4], (1,): [2, 3], (4,): [5], (4, 5): [6]}
    assert answers.at_masks == {1: [[1]], 2: [[1], [2, 3]], 3: [[4], [5], [6]]}
    assert answers.tokens_of["a c"] == (1, 3)
