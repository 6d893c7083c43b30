"""Answers of any number of tokens, compared by the likelihood of all their tokens.

A causal LM reads an answer's tokens after the prompt; an answer scores the sum of their log-probabilities. The answers
of a relation are a trie, which is searched from its root: an answer scores at most what its first tokens score, so
whatever is behind the tenth best answer found so far is never computed. The ten best that it finds are those of all
answers. A masked LM has as many masks as an answer has tokens, and reads each token at its mask.

R positions that are read, D backbone width, V vocabulary.
"""

import itertools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from megaptune.backbone.host import BackboneHost
from megaptune.backbone.output_rows import OutputRows
from megaptune.backbone.tensor_parallel import UPCAST_ROWS
from megaptune.batches import rounds
from megaptune.examples import LongExample
from megaptune.prompts.verbalizer import AnswerTokens, Tokens
from megaptune.run.topology import all_reduce_sum

BEST = 10
"""How many answers of the best are found for each example."""
NODES = 16
"""How many of an example's open nodes, the likeliest first, are computed together."""


class LongMember(NamedTuple):
    """An example as one job's, with the answers that compete; ``first_row`` and ``job`` as in ``batches.Member``."""

    example: LongExample
    answers: AnswerTokens
    first_row: int = 0
    job: int = 0


class Question(NamedTuple):
    """An input, the positions that are read of it, and the tokens whose log-probability is wanted at each."""

    slots: list[int]
    positions: list[int]
    wanted: list[list[int]]
    group: int


@dataclass(frozen=True)
class LongOutcome:
    """best: of every example, up to ten answers with their scores, the best first; rank: how many score above the
    right one, ``BEST`` where it is not among them; regained: whether the right one has several tokens."""

    best: list[list[tuple[float, Tokens]]]
    rank: list[int]
    regained: list[bool]

    @classmethod
    def of(cls, members: Sequence[LongMember], best: list[list[tuple[float, Tokens]]]) -> "LongOutcome":
        ranks = []
        for member, found in zip(members, best, strict=True):
            mine = next((score for score, tokens in found if tokens == member.example.answer), None)
            ranks.append(BEST if mine is None else sum(score > mine for score, _ in found))
        return cls(best, ranks, [len(member.example.answer) > 1 for member in members])

    def among(self, flags: Iterable[bool]) -> "LongOutcome":
        """That of the examples with a flag."""
        kept = [index for index, flag in enumerate(flags) if flag]
        rank, regained = [self.rank[index] for index in kept], [self.regained[index] for index in kept]
        return LongOutcome([self.best[index] for index in kept], rank, regained)

    @property
    def figures(self) -> dict[str, float]:
        """P@1, P@5, P@10 and the count; empty without examples."""
        count = len(self.rank)
        shares = {f"p_at_{k}": sum(rank < k for rank in self.rank) / count for k in (1, 5, 10)} if count else {}
        return {**shares, "count": count} if count else {}


@torch.no_grad()
def rank_answers(
    host: BackboneHost, members: Sequence[LongMember], table: Tensor, batch: int, pad_id: int
) -> LongOutcome:
    """Every member's best answers under the prompts of ``table`` [R, D]; the same on all ranks.

    :param batch: inputs that a rank computes at a time.
    """
    # Neighbours are of similar length.
    order = sorted(range(len(members)), key=lambda index: members[index].example.length)
    ordered = [members[index] for index in order]
    search = _searched if host.kind == "causal" else _at_masks
    found = search(host, ordered, table, batch, pad_id)
    best = dict(zip(order, found, strict=True))
    return LongOutcome.of(members, [best[index] for index in range(len(members))])


@dataclass
class _Search:
    """One example's way through the trie. done: answers, and open: nodes to go on from, each with its score."""

    done: list[tuple[float, Tokens]] = field(default_factory=list)
    open: list[tuple[float, Tokens]] = field(default_factory=lambda: [(0.0, ())])

    def next(self) -> list[tuple[float, Tokens]]:
        """Take the likeliest open nodes that can still lead to one of the best answers."""
        self.done = sorted(self.done, reverse=True)[:BEST]
        bound = self.done[-1][0] if len(self.done) == BEST else float("-inf")
        self.open = sorted((node for node in self.open if node[0] > bound), reverse=True)
        taken, self.open = self.open[:NODES], self.open[NODES:]
        return taken


def _searched(
    host: BackboneHost, members: list[LongMember], table: Tensor, batch: int, pad_id: int
) -> list[list[tuple[float, Tokens]]]:
    searches = [_Search() for _ in members]
    while True:
        nodes = [(index, node) for index, search in enumerate(searches) for node in search.next()]
        if not nodes:
            return [search.done for search in searches]
        questions = []
        for index, (_, prefix) in nodes:
            member = members[index]
            slots = [*_shifted(member, 1), *prefix]
            # Of one example the whole prompt is shared, of a job what its prompts begin with.
            group = -1 - index if prefix else member.job
            questions.append(Question(slots, [len(slots) - 1], [member.answers.children[prefix]], group))
        for (index, (score, prefix)), values in zip(
            nodes, log_probabilities(host, questions, table, batch, pad_id), strict=True
        ):
            answers = members[index].answers
            for token, value in zip(answers.children[prefix], values, strict=True):
                reached = score + value, (*prefix, token)
                if reached[1] in answers.words:
                    searches[index].done.append(reached)
                if reached[1] in answers.children:
                    searches[index].open.append(reached)


def _at_masks(
    host: BackboneHost, members: list[LongMember], table: Tensor, batch: int, pad_id: int
) -> list[list[tuple[float, Tokens]]]:
    asked = [(index, count) for index, member in enumerate(members) for count in member.answers.lengths]
    questions = []
    for index, count in asked:
        member = members[index]
        first = member.example.prompts[count].answer_position
        positions = list(range(first, first + count))
        questions.append(Question(_shifted(member, count), positions, member.answers.at_masks[count], member.job))
    found: list[list[tuple[float, Tokens]]] = [[] for _ in members]
    values_of = log_probabilities(host, questions, table, batch, pad_id)
    for (index, count), question, values in zip(asked, questions, values_of, strict=True):
        rest = iter(values)
        at_place = [dict(zip(tokens, rest, strict=False)) for tokens in question.wanted]
        for answer in members[index].answers.words:
            if len(answer) == count:
                score = sum(at_place[place][token] for place, token in enumerate(answer))
                found[index].append((score, answer))
    return [sorted(scored, reverse=True)[:BEST] for scored in found]


def _shifted(member: LongMember, count: int) -> list[int]:
    """The input for an answer of ``count`` tokens, with rows of the job as rows of the table."""
    first = member.first_row
    return [slot - first if slot < 0 else slot for slot in member.example.prompts[count].slots]


def log_probabilities(
    host: BackboneHost, questions: Sequence[Question], table: Tensor, batch: int, pad_id: int
) -> list[list[float]]:
    """Of every question, those of the tokens wanted, position by position; over the whole vocabulary."""
    rows = host.output_rows()
    sizes = [sum(map(len, question.wanted)) for question in questions]
    ends = torch.tensor([0, *sizes]).cumsum(0).tolist()
    found = torch.zeros(ends[-1], dtype=torch.float64)
    pieces = [list(range(first, min(first + batch, len(sizes)))) for first in range(0, len(sizes), batch)]
    for mine in rounds(pieces, host.grid.replica, host.grid.replicas):
        asked = [questions[index] for index in mine] or [questions[0]]
        slots, positions = [q.slots for q in asked], [q.positions for q in asked]
        inputs = host.lay_out(slots, positions, [q.group for q in asked], pad_id, keeps=False)
        scores = torch.log_softmax(_logits(host, host.features(inputs, table), rows), dim=1).cpu()
        wanted = [tokens for question in asked for tokens in question.wanted]
        reads = torch.tensor([read for read, tokens in enumerate(wanted) for _ in tokens])
        values = scores[reads, torch.tensor([token for tokens in wanted for token in tokens])]
        if mine and host.grid.speaks:
            found[ends[mine[0]] : ends[mine[-1] + 1]] = values.double()
    found = all_reduce_sum(found.to(host.device)).cpu()
    return [found[start:end].tolist() for start, end in itertools.pairwise(ends)]


def _logits(host: BackboneHost, features: Tensor, rows: OutputRows) -> Tensor:
    """features [R, D] -> [R, V] fp32, put together from the parts that ranks hold."""
    wide = features.float()
    mine = torch.cat([wide @ block.float().T for block in rows.weight.split(UPCAST_ROWS)], dim=1)
    if rows.bias is not None:
        mine = mine + rows.bias.float()
    if host.grid.shards == 1:
        return mine
    whole = mine.new_zeros(len(mine), host.vocabulary_size)
    whole[:, rows.index] = mine
    torch.distributed.all_reduce(whole, group=host.grid.tensor_group)
    return whole
