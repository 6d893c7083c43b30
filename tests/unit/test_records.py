"""Reading JSONL and CSV: what is kept, and that every mistake is told with its file and line."""

from pathlib import Path

import pytest

from megaptune.errors import DataError
from megaptune.tasks.records import Record, TaskData, read_rows, sample, take


def write(path: Path, text: str | bytes) -> Path:
    path.write_bytes(text.encode("utf-8") if isinstance(text, str) else text)
    return path


def refusal(path: Path) -> str:
    with pytest.raises(DataError) as caught:
        list(read_rows(path))
    return str(caught.value)


# -- JSONL -----------------------------------------------------------------------------------------------------------


def test_jsonl_rows_come_with_file_and_line(tmp_path: Path):
    path = write(tmp_path / "facts.jsonl", '{"x": "a"}\n\n{"x": "b"}\n')
    assert list(read_rows(path)) == [(f"{path}:1", {"x": "a"}), (f"{path}:3", {"x": "b"})]


def test_numbers_become_text(tmp_path: Path):
    path = write(tmp_path / "facts.jsonl", '{"year": 1987, "share": 0.5}\n')
    assert next(read_rows(path))[1] == {"year": "1987", "share": "0.5"}


def test_values_that_are_no_text_are_left_out(tmp_path: Path):
    path = write(tmp_path / "facts.jsonl", '{"x": "a", "evidences": [{"y": "b"}], "z": null, "w": {"v": 1}}\n')
    assert next(read_rows(path))[1] == {"x": "a"}


def test_escaped_and_plain_non_ascii_letters_read_the_same(tmp_path: Path):
    path = write(tmp_path / "facts.jsonl", '{"x": "M\\u00e1laga"}\n{"x": "Málaga"}\n')
    assert [row["x"] for _, row in read_rows(path)] == ["Málaga", "Málaga"]


@pytest.mark.parametrize("separator", ["\u2028", "\u2029", "\u0085"])
def test_lines_end_at_newline_only(tmp_path: Path, separator: str):
    """Texts hold such characters, and str.splitlines would cut at them."""
    path = write(tmp_path / "facts.jsonl", f'{{"x": "a{separator}b"}}\n')
    assert [row["x"] for _, row in read_rows(path)] == [f"a{separator}b"]


def test_carriage_return_ends_no_line(tmp_path: Path):
    path = write(tmp_path / "facts.jsonl", '{"x": "a",\r "y": "b"}\r\n{"x": "c"}\r\n')
    assert list(read_rows(path)) == [(f"{path}:1", {"x": "a", "y": "b"}), (f"{path}:2", {"x": "c"})]


def test_malformed_line_is_told_with_file_line_and_character(tmp_path: Path):
    path = write(tmp_path / "facts.jsonl", '{"x": "a"}\n{"x": "b"\n')
    assert refusal(path).startswith(f"{path}:2: not valid JSON: ")
    assert "at character" in refusal(path)


def test_letter_that_is_half_a_surrogate_pair_is_refused(tmp_path: Path):
    path = write(tmp_path / "facts.jsonl", '{"x": "\\ud800"}\n')
    assert refusal(path).startswith(f"{path}:1: ")


@pytest.mark.parametrize(("line", "kind"), [("[1, 2]", "list"), ('"a"', "str"), ("3", "int"), ("null", "NoneType")])
def test_line_that_is_no_object_is_refused(tmp_path: Path, line: str, kind: str):
    path = write(tmp_path / "facts.jsonl", line + "\n")
    assert refusal(path) == f"{path}:1: expected a JSON object, found {kind}"


def test_rows_before_a_malformed_line_do_not_hide_it(tmp_path: Path):
    path = write(tmp_path / "facts.jsonl", '{"x": "a"}\n' * 500 + "{\n")
    assert refusal(path).startswith(f"{path}:501: ")


# -- CSV -------------------------------------------------------------------------------------------------------------


def test_csv_rows_take_their_fields_from_the_header(tmp_path: Path):
    path = write(tmp_path / "facts.csv", 'city,country\n"Washington, D.C.",USA\nMálaga,Spain\n')
    assert list(read_rows(path)) == [
        (f"{path}:2", {"city": "Washington, D.C.", "country": "USA"}),
        (f"{path}:3", {"city": "Málaga", "country": "Spain"}),
    ]


def test_byte_order_mark_of_a_spreadsheet_is_no_part_of_the_first_field(tmp_path: Path):
    path = write(tmp_path / "facts.csv", b"\xef\xbb\xbfcity,country\nParis,France\n")
    assert next(read_rows(path))[1] == {"city": "Paris", "country": "France"}


@pytest.mark.parametrize("line", ["Paris", "Paris,France,Europe"])
def test_csv_line_with_another_number_of_columns_is_told(tmp_path: Path, line: str):
    path = write(tmp_path / "facts.csv", f"city,country\nRome,Italy\n{line}\n")
    assert refusal(path) == f"{path}:3: expected 2 columns (city, country), found another number"


def test_unclosed_quote_is_refused(tmp_path: Path):
    path = write(tmp_path / "facts.csv", 'city,country\n"Paris,France\n')
    assert "not valid CSV" in refusal(path)


# -- files -----------------------------------------------------------------------------------------------------------


def test_missing_file_is_named(tmp_path: Path):
    assert refusal(tmp_path / "facts.jsonl") == f"data file not found: {tmp_path / 'facts.jsonl'}"


def test_unknown_ending_is_told_the_known_ones(tmp_path: Path):
    path = write(tmp_path / "facts.tsv", "a\tb\n")
    assert refusal(path) == f"{path}: expected a file ending in .jsonl or .csv"


@pytest.mark.parametrize("name", ["facts.jsonl", "facts.csv"])
def test_file_that_is_not_utf8_is_named(tmp_path: Path, name: str):
    path = write(tmp_path / name, "city\nMálaga\n".encode("latin-1"))
    assert str(path) in refusal(path)


# -- fields ----------------------------------------------------------------------------------------------------------


def test_take_strips_outer_white_space():
    assert take({"x": "  Málaga \t"}, "x", "facts.jsonl:1") == "Málaga"


def test_missing_field_is_told_with_what_the_record_has():
    with pytest.raises(DataError) as caught:
        take({"city": "Paris", "year": "1"}, "country", "facts.jsonl:4")
    assert str(caught.value) == "facts.jsonl:4: the record has no text field 'country' (it has: city, year)"


@pytest.mark.parametrize("value", ["", "  \t"])
def test_empty_field_is_refused(value: str):
    with pytest.raises(DataError, match=r"facts\.jsonl:4: the field 'x' is empty"):
        take({"x": value}, "x", "facts.jsonl:4")


# -- sampling and filtering ------------------------------------------------------------------------------------------


def records(count: int) -> list[Record]:
    return [Record({"x": str(number)}, "a", f"facts.jsonl:{number}") for number in range(count)]


def test_sample_is_decided_by_its_seed_and_keeps_file_order():
    chosen = sample(records(100), 10, seed=3)
    assert chosen == sample(records(100), 10, seed=3)
    assert chosen != sample(records(100), 10, seed=4)
    assert len({r.source for r in chosen}) == 10
    assert [int(r.fields["x"]) for r in chosen] == sorted(int(r.fields["x"]) for r in chosen)


def test_sample_is_this_one_for_ever():
    """Figures made with a limit can be repeated only while the same seed chooses the same records."""
    assert [int(r.fields["x"]) for r in sample(records(20), 5, seed=0)] == [1, 8, 12, 13, 15]


@pytest.mark.parametrize("limit", [None, 5, 6])
def test_sample_of_no_more_than_there_are_is_all(limit: int | None):
    assert sample(records(5), limit, seed=0) == records(5)


def test_keep_counts_what_it_drops_by_reason_over_all_splits():
    data = TaskData("t", {"train": records(3), "dev": records(2), "test": []}, None)
    once = data.keep("short", {"train": [True, False, True], "dev": [False, True], "test": []})
    assert {split: len(members) for split, members in once.splits.items()} == {"train": 2, "dev": 1, "test": 0}
    twice = once.keep("short", {"train": [True, False], "dev": [True], "test": []})
    twice = twice.keep("long", {"train": [True], "dev": [True], "test": []})
    assert twice.dropped == {"short": 3, "long": 0}
    assert data.dropped == {}
