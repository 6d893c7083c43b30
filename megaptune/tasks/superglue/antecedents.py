"""What else a pronoun could refer to: names and phrases with a determiner, found by their words alone.

Scoring a WSC span by likelihood needs something to compare it with, and the files name one span an example. Rules of
a few lines stand in for a parser: a run of capitalised words, or a determiner with what follows up to a word that ends
a phrase. Only the example's own text is read. Where a false example's true antecedent is known from another row of the
training file, it is among these phrases in nine cases of ten.
"""

import re

_DETERMINER_WORDS = "the a an this that these those my your his her its our their some any each every no"
_ENDING_WORDS = """
about above across after against all along although am among and are as asked at away be because been before began
behind being below beneath beside between beyond both but by came can could did didn't do does doesn't done don't down
during even felt for from gave get go got had hadn't has have he her here hers herself him himself his how however i if
in inside into is isn't it its itself just knew later like made may me might more most much must my near never no nor
not now of off on once one only onto or our out over put said saw she should since so soon still such than that the
their them then there these they this those though through till to told too took toward towards trying under until up
upon us very was wasn't we went were weren't what when where whether which while who whom whose why will with within
without won't would yet you your
"""
_DETERMINERS = frozenset(_DETERMINER_WORDS.split())
_ENDING = frozenset(_ENDING_WORDS.split())
_LONGEST = 4  # words after a determiner
_WORD = re.compile(r"\b(?:Mrs?|Ms|Dr|St)\.|[^\W_]+(?:['’.-][^\W_]+)*")


def other_antecedents(text: str, span: str, pronoun: tuple[int, int]) -> tuple[str, ...]:
    """Phrases of ``text`` that share no word with ``span`` and do not touch the pronoun's characters, in order."""
    taken = {word.casefold() for word in span.split()} - _DETERMINERS
    found: dict[str, str] = {}
    for start, end in _phrases(text):
        phrase = text[start:end]
        words = {word.casefold() for word in phrase.split()} - _DETERMINERS
        if words and not words & taken and (end <= pronoun[0] or start >= pronoun[1]):
            found.setdefault(_bare(phrase), phrase)
    return tuple(found.values())


def _bare(phrase: str) -> str:
    """The phrase without its determiner, to know "the pony" and "pony" as one."""
    words = phrase.casefold().split()
    return " ".join(words[1:] if words[0] in _DETERMINERS and len(words) > 1 else words)


def _phrases(text: str) -> list[tuple[int, int]]:
    """Characters [start, end) of each phrase."""
    words = list(_WORD.finditer(text))
    phrases = []
    position = 0
    while position < len(words):
        word = words[position][0]
        determined = word.casefold() in _DETERMINERS
        length = _run(text, words, position, determined)
        if length > (1 if determined else 0):
            phrases.append((words[position].start(), _without_possessive(text, words[position + length - 1])))
        position += max(1, length)
    return phrases


def _run(text: str, words: list[re.Match[str]], first: int, determined: bool) -> int:
    """How many words from ``first`` on make one phrase."""
    length = 1 if determined else 0
    for index in range(first + length, len(words)):
        word = words[index][0]
        apart = index > first and text[words[index - 1].end() : words[index].start()].strip() != ""
        ends = word.casefold() in _ENDING or word.casefold().endswith("ly") or word[0].isdigit()
        past = word.endswith("ed") and len(word) > 4 and index > first + 1
        fits = not past and length <= _LONGEST if determined else word[0].isupper()
        if apart or ends or not fits:
            break
        length += 1
        if word.endswith(("'s", "’s")) and not determined:
            break
    return length


def _without_possessive(text: str, last: re.Match[str]) -> int:
    return last.end() - (2 if last[0].endswith(("'s", "’s")) else 0)
