"""Tests of JSON files of records: lists and lines, whole and in pieces of any length."""

import json
import random
from typing import Any

import pytest

from pipelines.data.records import MAX_DEPTH, UnparsedRecord, find_rejection
from pipelines.data.sources.json_records import iterate_json

TEXT = {"id": "t", "conversations": [{"from": "human", "value": "sure?"}, {"from": "gpt", "value": "yes, sure"}]}


def text_record(human: str, gpt: str = "a") -> dict[str, Any]:
    return {"conversations": [{"from": "human", "value": human}, {"from": "gpt", "value": gpt}]}


def parse_records(text: bytes, name: str) -> list[Any]:
    """Parse the records of a file in LLaVA's form."""
    return [record for _, record in iterate_json([text], name, frozenset({"conversations"}))]


def get_texts(records: list[Any]) -> list[Any]:
    """Return the records, and the texts of those that are not JSON."""
    return [record.text if isinstance(record, UnparsedRecord) else record for record in records]


DEEP = "[" * 5000 + "]" * 5000
LINES = [json.dumps({**TEXT, "id": number}) for number in range(3)]
LISTED = [json.loads(line) for line in LINES]


@pytest.mark.parametrize(
    ("text", "records"),
    [
        (json.dumps(LISTED).encode(), LISTED),
        ("\n".join(LINES).encode(), LISTED),
        ("\r\n\r\n".join([*LINES, ""]).encode(), LISTED),
        (b"\xef\xbb\xbf" + json.dumps(LISTED).encode(), LISTED),
        (json.dumps(LISTED).encode("utf-16"), LISTED),
        ("\n".join(LINES).encode("utf-16-le"), LISTED),
        (LINES[0].encode(), LISTED[:1]),
        (json.dumps(LISTED[0], indent=1).encode(), LISTED[:1]),
        ("\n".join(['{"cut', *LINES]).encode(), ['{"cut', *LISTED]),
        ("\n".join([LINES[0], DEEP, "9" * 5000]).encode(), [LISTED[0], DEEP, "9" * 5000]),
        (f"[{LINES[0]}, {DEEP},\n{LINES[1]} , {'9' * 5000}, \"],[\", null]".encode(),
         [LISTED[0], DEEP, LISTED[1], "9" * 5000, "],[", None]),
        (f'[{LINES[0]}, {{"id": {DEEP}}}]'.encode(), [LISTED[0], f'{{"id": {DEEP}}}']),
    ],
    ids=range(12),
)  # fmt: skip
def test_records_are_read_from_a_list_and_from_lines(text: bytes, records: list) -> None:
    assert get_texts(parse_records(text, "x.json")) == records
    rng = random.Random(0)
    for _ in range(20):
        cuts = sorted(2 * rng.randrange(2, len(text) // 2) for _ in range(rng.choice([1, 2, 30])))
        chunks = [text[start:stop] for start, stop in zip([0, *cuts], [*cuts, len(text)], strict=True)]
        read = iterate_json(filter(None, chunks), "x.json", frozenset({"conversations"}))
        assert get_texts([record for _, record in read]) == records


def test_one_records_bytes_or_depth_are_that_records_matter() -> None:
    latin = json.dumps(text_record("Café?"), ensure_ascii=False).encode("latin-1")
    cut = (
        json.dumps(text_record("What?", "Great 😀"), ensure_ascii=False)
        .encode()
        .replace("😀".encode(), "😀".encode()[:2])
    )
    deep = {**TEXT, "more": json.loads("[" * MAX_DEPTH + "]" * MAX_DEPTH)}
    for one in (latin, cut, json.dumps(deep).encode()):
        records = parse_records(b"[" + one + b"," + LINES[0].encode() + b"]", "x.json")
        faults = [find_rejection(record, None) for record in records]
        assert faults[1] is None
        assert faults[0] is not None
        assert faults[0].reason in ("broken text", "not JSON")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (b"{", "x.json: not JSON: "),
        (b"\xff", "x.json: not JSON: "),
        (b"", "x.json: an empty file"),
        (b" \n", "x.json: an empty file"),
        (b"[]", "x.json: no records"),
        (b'"a"', "x.json: got str"),
        (b'{"data": []}', "x.json: got one object with data"),
        (b'[{"id": 1}, {"i', "x.json: not JSON: "),
    ],
)
def test_a_file_without_records_is_named_with_what_is_allowed(text: bytes, said: str) -> None:
    with pytest.raises(ValueError, match=said + r".*allowed: a list of records as JSON, or JSON lines, one record a"):
        parse_records(text, "x.json")


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        ('{"id": 1', "Expecting ',' delimiter: character 8"),
        (DEEP, "nested too deep"),
        ("9" * 5000, "a number with too many digits"),
        (json.dumps({"more": json.loads("[" * MAX_DEPTH + "]" * MAX_DEPTH)}), f"nested deeper than {MAX_DEPTH}"),
    ],
    ids=["cut", "deep", "digits", "nested"],
)
def test_a_line_that_is_not_json_has_a_reason_of_its_own(line: str, problem: str) -> None:
    records = parse_records("\n".join([LINES[0], line, '{"id": 1}']).encode(), "x.json")
    damaged, other = find_rejection(records[1], None), find_rejection(records[2], None)
    assert damaged is not None
    assert (damaged.reason, damaged.field, damaged.detail) == ("not JSON", "", problem)
    assert other is not None
    assert (other.reason, other.field) == ("wrong fields", "conversations")
