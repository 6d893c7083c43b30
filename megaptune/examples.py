"""A task as the backbone sees it: slots and labels for every record, and the candidate sets of every reading.

A *reading* is the set of tokens that an answer is compared with: ``answers`` (all answers of this relation's train,
dev and test records: the strict reading), ``word_list`` (the task's word list), ``vocabulary`` (every token), or one of
the task's further word lists by its name: that one counts only the records whose answer is on it.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from megaptune.baselines import baselines
from megaptune.config import LONG_ANSWERS, Config, DeepConfig, Reading, TaskConfig
from megaptune.errors import DataError
from megaptune.methods import METHODS, PROMPT_SETS, Method, MethodName, PromptSet
from megaptune.prompts.template import EncodedPrompt, Kind, Template, without_pseudo_tokens
from megaptune.prompts.tokens import TokenForms
from megaptune.prompts.verbalizer import AnswerTokens, Tokens, Verbalizer
from megaptune.tasks.records import SPLITS, Record, Split, TaskData, sample


@dataclass(frozen=True)
class Example:
    """slots: the input; answer_position: the slot whose state is read; answer: the token id to find there."""

    slots: list[int]
    answer_position: int
    answer: int
    record: Record

    @property
    def inputs(self) -> list[list[int]]:
        return [self.slots]

    @property
    def length(self) -> int:
        return len(self.slots)

    @property
    def key(self) -> str:
        """What tells it apart as the backbone sees it."""
        return f"{self.slots}{self.answer_position}{self.answer}"


@dataclass(frozen=True)
class LongExample:
    """An answer of any number of tokens. prompts: the input by the number of the answer's tokens, which a masked LM has
    as many masks for; a causal LM's is the same for all and stands under 1."""

    prompts: dict[int, EncodedPrompt]
    answer: Tokens
    record: Record

    @property
    def inputs(self) -> list[list[int]]:
        return [prompt.slots for prompt in self.prompts.values()]

    @property
    def length(self) -> int:
        return max(map(len, self.inputs))


@dataclass(frozen=True)
class EncodedTask:
    """A task's splits under one template. long: test's, with answers of any number of tokens, where that is wanted;
    deep_words: behind a deep prompt the token ids that one starts at, if any."""

    template: Template
    train: list[Example]
    dev: list[Example]
    test: list[Example]
    long: list[LongExample] = field(default_factory=list)
    deep_words: list[int] | None = None
    encoder = None  # the configuration's, or the method's

    @property
    def rows(self) -> int:
        """Table rows that training it takes."""
        return self.template.num_pseudo_tokens

    @property
    def reported(self) -> list[Example]:
        """What is evaluated when the job is done."""
        return self.test


@dataclass(frozen=True)
class Variant:
    """Where a job stands in a sweep; ``suffix`` names it in the job's folder, and is empty without a sweep."""

    learning_rate: float
    template: str
    suffix: str = ""


@dataclass(frozen=True)
class LongTask:
    """The task with answers of any number of tokens; its records are sampled as those of single tokens are."""

    data: TaskData
    answers: AnswerTokens


@dataclass(frozen=True)
class PreparedTask:
    """Records whose answers are single tokens, encoded for each method, and each reading's candidate ids [C].

    manual, tuned (the P-tuning template) and bare (the same without pseudo tokens) are None where no method wants
    them; swept holds every P-tuning template, of which tuned is the first; searched the prompts of each set, of which
    dev will choose; deep is what follows a deep prompt; candidates are None for the whole vocabulary. left_out: methods
    that this task has no prompt for, and why.
    """

    data: TaskData
    candidates: dict[Reading, Tensor | None]
    manual: EncodedTask | None
    tuned: EncodedTask | None
    bare: EncodedTask | None = None
    swept: dict[str, EncodedTask] = field(default_factory=dict)
    searched: dict[PromptSet, list[EncodedTask]] = field(default_factory=dict)
    left_out: dict[MethodName, str] = field(default_factory=dict)
    long: LongTask | None = None
    deep: EncodedTask | None = None

    headline = "p_at_1"
    """The figure that dev chooses the epoch by."""

    @property
    def name(self) -> str:
        return self.data.name

    def variants(self, method: Method, config: Config) -> list[Variant]:
        """The sweep over learning rates and templates; without one, the one variant there is. Deep prompts have no
        pseudo tokens to place, so no sweep over templates."""
        if not method.trains_prompt:
            return [Variant(0.0, "")]
        rates, templates = config.learning_rates(method), config.templates[: 1 if method.deep else None]
        return [
            Variant(
                rate,
                template,
                (f"-lr{rate:g}" if len(rates) > 1 else "") + (f"-template{place}" if len(templates) > 1 else ""),
            )
            for rate in rates
            for place, template in enumerate(templates, start=1)
        ]

    def encoded(self, method: Method, template: str | None = None) -> EncodedTask:
        """What ``method`` reads; ``template`` is one of a sweep."""
        return self.alternatives(method, template)[0]

    def alternatives(self, method: Method, template: str | None = None) -> list[EncodedTask]:
        """The prompts among which dev chooses for ``method``; mostly there is one."""
        if method.prompt in self.searched:
            return self.searched[method.prompt]
        tuned = self.tuned if template is None else self.swept.get(template, self.tuned)
        found = {"manual": self.manual, "template": tuned, "bare": self.bare}.get(method.prompt)
        found = self.deep if method.deep else found
        assert found is not None, "a method that the configuration names and the task is not left out of"
        return [found]

    @property
    def prompts(self) -> list[EncodedTask]:
        """The task under every prompt that a method wants."""
        searched = [encoded for found in self.searched.values() for encoded in found]
        others = [encoded for encoded in (self.manual, self.bare, self.deep) if encoded is not None]
        return [*self.swept.values(), *others, *searched]

    def num_candidates(self, reading: Reading, vocabulary_size: int) -> int:
        if reading == LONG_ANSWERS:
            return len(self.long.answers.words) if self.long is not None else 0
        ids = self.candidates[reading]
        return vocabulary_size if ids is None else len(ids)

    def summary(self, vocabulary_size: int) -> str:
        """Counts, losses to filters, and the baselines, for the console."""
        data, base = self.data, baselines(self.data)
        counts = ", ".join(f"{len(records)} {split}" for split, records in data.splits.items())
        dropped = "".join(f"; dropped: {count} {reason}" for reason, count in data.dropped.items() if count)
        if self.long is not None:
            tests = self.long.data.splits["test"]
            regained = sum(len(self.long.answers.tokens_of[record.answer]) > 1 for record in tests)
            counts += f"; {LONG_ANSWERS}: {len(tests)} test, {regained} with an answer of several tokens"
        left_out = "".join(f"\n  left out   {method}: {why}" for method, why in self.left_out.items())
        sizes = ", ".join(f"{reading} {self.num_candidates(reading, vocabulary_size)}" for reading in self.candidates)
        return (
            f"{data.name} {data.label}\n"
            f"  records    {counts}{dropped}\n"
            f"  candidates {sizes}\n"
            f"  of the test answers {100 * base.majority:.1f} % are train's commonest, {100 * base.unseen:.1f} % are "
            f"unseen in train, {100 * base.in_subject:.1f} % stand in the subject; {100 * base.shared_facts:.1f} % of "
            f"the facts are in train{left_out}"
        )


def prepare_task(data: TaskData, config: Config, forms: TokenForms, kind: Kind, max_tokens: int) -> PreparedTask:
    """Apply the one-token rule and the limits, collect the candidates, encode every record.

    :raises DataError: an answer that is not one token (unless the task drops them), a needed split left empty, a
        template that does not fit, an input longer than ``max_tokens``.
    """
    task = config.task
    assert isinstance(task, TaskConfig)
    records = [record for split in SPLITS for record in data.splits[split]]
    verbalizer = Verbalizer.of([record.answer for record in records], forms)
    if task.multi_token_answers == "error":
        verbalizer.require_all({record.answer: record.source for record in reversed(records)})
    flags = {
        split: [record.answer in verbalizer.token_of for record in members] for split, members in data.splits.items()
    }
    long = _long_task(data, config, forms) if LONG_ANSWERS in config.scoring.evaluate_over else None
    data = data.keep("answer of several tokens", flags)
    methods = [METHODS[name] for name in config.methods]
    sets, left_out = _readable(data, config, kind)
    chooses = any(len(texts) > 1 for texts in sets.values())
    needed: tuple[Split, ...] = (
        SPLITS if any(method.trains for method in methods) else ("dev", "test") if chooses else ("test",)
    )
    for split in needed:
        if not data.splits[split]:
            lost = (
                "; ".join(f"{count} {reason}" for reason, count in data.dropped.items() if count) or "its file is empty"
            )
            raise DataError(f"{data.name}: no {split} records are left (dropped: {lost})")
    answers = {record.answer for members in data.splits.values() for record in members}
    data = _limited(data, task)

    def encode(text: str, splits: tuple[Split, ...], virtual_tokens: int = 0) -> EncodedTask:
        template = Template(text, kind)
        given = verbalizer, forms, max_tokens, virtual_tokens
        train, dev, test = (
            _encode(data.splits[split] if split in splits else [], template, *given) for split in SPLITS
        )
        if kind == "causal" and config.train.loss_position == "before_answer":
            train = [_read_too_early(example) for example in train]
        behind = long if virtual_tokens == 0 else None  # a deep prompt's answers are single tokens
        return EncodedTask(
            template, train, dev, test, [] if behind is None else _encode_long(behind, template, forms, max_tokens)
        )

    prompts = {method.prompt for method in methods if not method.deep}
    manual = tuned = bare = deep = None
    swept: dict[str, EncodedTask] = {}
    if "manual" in prompts:
        text = config.prompt.manual or data.manual_template
        assert text is not None, "the configuration's rules ask for a manual prompt"
        trains = any(method.trains for method in methods if method.prompt == "manual")
        manual = encode(text, SPLITS if trains else ("test",))
        if manual.template.num_pseudo_tokens:
            raise DataError(f"the manual prompt {text!r} has pseudo tokens; only a P-tuning template may")
    if "template" in prompts:
        for text in config.templates:
            swept[text] = encode(text, SPLITS)
            if not swept[text].template.num_pseudo_tokens:
                raise DataError(f"template {text!r} has no pseudo token: P-tuning has nothing to train")
        tuned = swept[config.templates[0]]
    if "bare" in prompts:
        bare = encode(without_pseudo_tokens(config.prompt.template), SPLITS)
    searched = {
        name: [encode(text, ("dev", "test") if len(texts) > 1 else ("test",)) for text in texts]
        for name, texts in sets.items()
    }
    deep = None
    if config.deep:
        given = config.prompt.manual or data.manual_template if config.prompt.deep.input == "manual" else None
        text = without_pseudo_tokens(config.prompt.template) if given is None else given
        deep = encode(text, SPLITS, config.prompt.deep.length)
        if deep.template.num_pseudo_tokens:
            raise DataError(f"the manual prompt {text!r} has pseudo tokens; only a P-tuning template may")
        words = deep_words(config.prompt.deep, [example.slots for example in deep.train], forms)
        deep = replace(deep, deep_words=words)
    candidates = _candidates(answers, data, verbalizer, forms)
    _require_listed(data, candidates, config, verbalizer)
    return PreparedTask(data, candidates, manual, tuned, bare, swept, searched, left_out, long, deep)


def _limited(data: TaskData, task: TaskConfig) -> TaskData:
    limits = {"train": task.limit_train, "dev": task.limit_dev, "test": task.limit_test}
    limited = {split: sample(members, limits[split], task.limit_seed) for split, members in data.splits.items()}
    return replace(data, splits=limited)


def _long_task(data: TaskData, config: Config, forms: TokenForms) -> LongTask:
    assert isinstance(config.task, TaskConfig)
    answers = AnswerTokens.of([record.answer for split in SPLITS for record in data.splits[split]], forms)
    flags = {split: [record.answer in answers.tokens_of for record in data.splits[split]] for split in SPLITS}
    return LongTask(_limited(data.keep("answer that the tokenizer does not know", flags), config.task), answers)


def _encode_long(long: LongTask, template: Template, forms: TokenForms, max_tokens: int) -> list[LongExample]:
    lengths = long.answers.lengths if template.kind == "masked" else [1]
    behind = max(long.answers.lengths, default=1) - 1 if template.kind == "causal" else 0
    limit = max_tokens - behind if template.shortens else None
    examples = []
    for record in long.data.splits["test"]:
        prompts = {count: template.encode(record, forms, 0, limit, count) for count in lengths}
        longest = max(len(prompt.slots) for prompt in prompts.values()) + behind
        if longest > max_tokens:
            raise DataError(
                f"{record.source}: the prompt with the longest answer is {longest} tokens long, the backbone's context "
                f"holds {max_tokens}; shorten the record or the template {template.text!r}, or leave "
                f"{LONG_ANSWERS} out of scoring.evaluate_over"
            )
        examples.append(LongExample(prompts, long.answers.tokens_of[record.answer], record))
    return examples


def _readable(data: TaskData, config: Config, kind: Kind) -> tuple[dict[PromptSet, list[str]], dict[MethodName, str]]:
    """The prompts of every wanted set that the backbone can read, and the methods that are left without any.

    A causal model reads up to ``[answer]``: where the subject comes after it, nothing of the fact is left to read.
    """
    sets: dict[PromptSet, list[str]] = {}
    left_out: dict[MethodName, str] = {}
    for name in config.prompt_sets:
        there = data.prompt_sets.get(name, [])
        read = [text for text in there if kind == "masked" or text.index("{subject}") < text.index("[answer]")]
        if read:
            sets[name] = read
        elif there:
            left_out[PROMPT_SETS[name]] = "its prompt has the answer before the subject, which a causal LM cannot read"
        else:
            left_out[PROMPT_SETS[name]] = "no prompt for this relation"
    return sets, left_out


def deep_words(deep: DeepConfig, inputs: Sequence[list[int]], forms: TokenForms) -> list[int] | None:
    """As many tokens as a deep prompt has, for its table to start at: of a text, or of training ``inputs``."""
    if deep.encoder != "table" or deep.init == "random":
        return None
    if deep.init_text is None:
        words = [slot for slots in inputs[: deep.length] for slot in slots]
    else:
        text = forms.at_start(deep.init_text)
        words = [*forms.specials[0], *(text * deep.length)]
    return (words * deep.length)[: deep.length]


def _encode(
    records: list[Record],
    template: Template,
    verbalizer: Verbalizer,
    forms: TokenForms,
    max_tokens: int,
    virtual_tokens: int = 0,
) -> list[Example]:
    examples, left = [], max_tokens - virtual_tokens
    for record in records:
        prompt = template.encode(record, forms, max_tokens=left if template.shortens else None)
        if len(prompt.slots) > left:
            deep = f" and a deep prompt of {virtual_tokens} comes before it" if virtual_tokens else ""
            raise DataError(
                f"{record.source}: the prompt is {len(prompt.slots)} tokens long{deep}, the backbone's context holds "
                f"{max_tokens}; shorten the record or the template {template.text!r}"
            )
        examples.append(Example(prompt.slots, prompt.answer_position, verbalizer.token_of[record.answer], record))
    return examples


def _read_too_early(example: Example) -> Example:
    """A causal LM's example without its last token: the released code writes the label there, and the LM's loss shifts
    labels once more, so that the output before it is trained."""
    if len(example.slots) < 2:
        raise DataError(
            f"{example.record.source}: train.loss_position: before_answer needs inputs of two tokens or more"
        )
    return replace(example, slots=example.slots[:-1], answer_position=example.answer_position - 1)


def _candidates(
    answers: set[str], data: TaskData, verbalizer: Verbalizer, forms: TokenForms
) -> dict[Reading, Tensor | None]:
    own = {verbalizer.token_of[word] for word in answers}
    candidates: dict[Reading, Tensor | None] = {"answers": torch.tensor(sorted(own)), "vocabulary": None}
    if data.word_list is not None:
        listed = set(Verbalizer.of(data.word_list, forms).token_of.values())
        candidates["word_list"] = torch.tensor(sorted(listed | own))
    for name, words in data.word_lists.items():
        candidates[name] = torch.tensor(sorted(set(Verbalizer.of(words, forms).token_of.values())))
    return candidates


def _require_listed(
    data: TaskData, candidates: dict[Reading, Tensor | None], config: Config, verbalizer: Verbalizer
) -> None:
    """:raises DataError: a further word list has the answer of no record that a figure is wanted over."""
    for name in data.word_lists.keys() & set(config.scoring.evaluate_over):
        ids = candidates[name]
        listed = set() if ids is None else set(ids.tolist())
        chooses = name == config.scoring.select_on and any(METHODS[method].trains for method in config.methods)
        wanted: tuple[Split, ...] = ("dev", "test") if chooses else ("test",)
        for split in wanted:
            if not any(verbalizer.token_of[record.answer] in listed for record in data.splits[split]):
                raise DataError(
                    f"{data.name}: task.word_lists.{name} has the answer of no {split} record; leave the relation or "
                    "the list out"
                )
