"""Patterns and verbalizers as files: what is refused, and how it is told."""

from pathlib import Path

import pytest

from megaptune.errors import ConfigError
from megaptune.patterns import TaskPatterns, load_patterns

GOOD = """
patterns:
  WiC:
    verbalizers:
      yes_no: {"false": "No", "true": ["Yes", "Right"]}
    manual:
      one: {text: "{word} [answer]", verbalizer: yes_no, families: [masked]}
      two: {text: "{word}? [answer]", verbalizer: yes_no}
"""


def load(tmp_path: Path, text: str) -> TaskPatterns:
    path = tmp_path / "patterns.yaml"
    path.write_text(text, encoding="utf-8")
    (patterns,) = load_patterns(path).values()
    return patterns


def told(tmp_path: Path, text: str) -> str:
    with pytest.raises(ConfigError) as caught:
        load(tmp_path, text)
    return str(caught.value)


def test_a_word_or_several_stand_for_a_label(tmp_path: Path):
    assert load(tmp_path, GOOD).verbalizers["yes_no"] == {"false": ["No"], "true": ["Yes", "Right"]}


def test_the_first_pattern_for_the_family_is_picked(tmp_path: Path):
    patterns = load(tmp_path, GOOD)
    assert patterns.pick("manual", "masked").text == "{word} [answer]"
    assert patterns.pick("manual", "causal").text == "{word}? [answer]"
    assert patterns.pick("manual", "masked", "two").text == "{word}? [answer]"


def test_a_pattern_of_another_family_or_none_is_told(tmp_path: Path):
    patterns = load(tmp_path, GOOD)
    with pytest.raises(ConfigError, match=r"the manual pattern 'one' is not for causal backbones \(there: two\)"):
        patterns.pick("manual", "causal", "one")
    with pytest.raises(ConfigError, match=r"no ptuning pattern for causal backbones \(there: none\)"):
        patterns.pick("ptuning", "causal")


def test_a_file_adds_to_those_it_names(tmp_path: Path):
    (tmp_path / "base.yaml").write_text(GOOD, encoding="utf-8")
    added = "defaults: [base.yaml]\npatterns: {WiC: {manual: {two: {text: '[answer] {word}', families: [masked]}}}}"
    patterns = load(tmp_path, added)
    assert [pattern.text for pattern in patterns.manual.values()] == ["{word} [answer]", "[answer] {word}"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (('"true": ["Yes", "Right"]', ""), "WiC: verbalizer yes_no has no word for the label 'true'"),
        (
            ('"false": "No",', '"false": "No", "maybe": "Maybe",'),
            "'maybe', which is no label of it (false, true)",
        ),
        (('"Right"', '"No"'), "the word 'No' stands for 'false' and again for 'true'"),
        (('"Right"', '"Yes"'), "the word 'Yes' stands for 'true' and again for 'true'"),
        (('"false": "No"', "false: 'No'"), 'yes_no: write the label False in quotes, "true" or "0"'),
        (('"false": "No"', '"false": No'), "yes_no: false: YAML reads an unquoted yes, no, true or false as False"),
        (('"false": "No"', '"false": []'), "WiC: verbalizer yes_no has no word for the label 'false'"),
        (("verbalizer: yes_no, ", "verbalizer: other, "), "manual.one names the verbalizer 'other' (there: yes_no)"),
        (
            (", verbalizer: yes_no}", "}"),
            "WiC: manual.two needs a verbalizer: the examples have no choices",
        ),
        (("families: [masked]", "family: masked"), "`WiC.manual.one.family`: Extra inputs are not permitted"),
        (("  WiC:", "  WIC:"), "`WIC.[key]`: Input should be 'BoolQ', 'CB'"),
    ],
)
def test_mistakes_are_told(tmp_path: Path, change: tuple[str, str], message: str):
    assert change[0] in GOOD
    assert message in told(tmp_path, GOOD.replace(*change))


def test_a_file_of_something_else_is_refused(tmp_path: Path):
    assert "expected the one section `patterns`, found run" in told(tmp_path, "run: {seeds: [0]}")
