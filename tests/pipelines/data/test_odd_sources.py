"""Files as users have them: columns without names, times beyond Python, other kinds than their names, links, masks."""

import base64
import csv
import gzip
import io
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from PIL import Image
from pyarrow import feather, parquet

from pipelines.data.images import ImageFolder
from pipelines.data.options import SetSource, ShardOptions
from pipelines.data.shard_writer import admit_record, read_image
from pipelines.data.sources.layouts import find_layout
from pipelines.data.sources.opened import RecordSource
from pipelines.data.sources.rows import SourceRecord, convert_row
from tests.pipelines.data.source_files import draw_samples, write_json, write_lines

SAMPLES = draw_samples(2)
CAPTIONS = [{"image": "a.jpg", "caption": "one"}, {"image": "b.jpg", "caption": "two"}]


def read_source(path: Path, **options: Any) -> list[SourceRecord]:
    return list(RecordSource(SetSource(source=str(path), **options)))


def list_turns(records: list[SourceRecord]) -> list[list[str]]:
    return [[turn["value"] for turn in record.record["conversations"]] for record in records]


def write_table(path: Path, rows: list[list[str]], delimiter: str = ",") -> Path:
    with path.open("w", newline="") as file:
        csv.writer(file, delimiter=delimiter).writerows(rows)
    return path


def test_a_column_without_a_name_is_no_question(tmp_path: Path) -> None:
    """pandas writes the numbers of the rows so."""
    rows = [["", "image", "caption"], ["0", "a.jpg", "one"], ["1", "b.jpg", "two"]]
    assert list_turns(read_source(write_table(tmp_path / "a.csv", rows))) == [["<image>", "one"], ["<image>", "two"]]
    rows = [["", "image", "q", "a"], ["0", "a.jpg", "Which?", "one"]]
    columns: dict[Any, str] = {"question": "q", "answer": "a"}
    mapped = read_source(write_table(tmp_path / "b.csv", rows), columns=columns)
    assert list_turns(mapped) == [["<image>\nWhich?", "one"]]


@pytest.mark.parametrize("delimiter", [";", "\t", "|"])
def test_other_separators_of_columns_are_refused(delimiter: str, tmp_path: Path) -> None:
    path = write_table(tmp_path / "a.csv", [["image", "caption"], ["a.jpg", "one"]], delimiter)
    with pytest.raises(ValueError, match=r"a.csv: got one column, .*, allowed: several columns with ',' between them"):
        read_source(path)


def test_bytes_that_are_no_utf_8_are_those_of_one_row(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_bytes("image,caption\na.jpg,café\nb.jpg,two\n".encode("latin-1"))
    (tmp_path / "b.csv").write_text("image,caption\na.jpg,one\n", "utf-16")
    broken, kept = read_source(tmp_path / "a.csv")
    record, rejection, _ = admit_record(broken, ShardOptions())
    assert record is None
    assert rejection
    assert (rejection.reason, rejection.field, broken.origin) == ("broken text", "caption", "a.csv: line 2")
    assert kept.record["conversations"][1]["value"] == "two"
    with pytest.raises(ValueError, match=r"b\.csv: got the columns .*, allowed: a table in UTF-8"):
        read_source(tmp_path / "b.csv")


@pytest.mark.parametrize(
    "times",
    [
        pa.array([2**62, 1], pa.timestamp("us")),
        pa.array([1, 2], pa.timestamp("ns", "Mars/Olympus")),
        pa.array([-(2**31), 1], pa.date32()),
        pa.array([2**62, 1], pa.duration("s")),
    ],
    ids=str,
)
def test_times_that_python_does_not_have_leave_the_table_readable(times: pa.Array, tmp_path: Path) -> None:
    columns = {name: [row[name] for row in CAPTIONS] for name in CAPTIONS[0]}
    path = tmp_path / "a.feather"
    feather.write_feather(pa.table({**columns, "time": times}), path, compression="uncompressed")
    assert [turns[1] for turns in list_turns(read_source(path))] == ["one", "two"]


@pytest.mark.parametrize(
    ("row", "field", "value"),
    [
        ({"image": "a.jpg", "caption": None}, "caption", "null"),
        ({"image": "a.jpg", "caption": 1.5}, "caption", "1.5"),
        ({"image": "a.jpg", "text": b"one"}, "text", '"3 bytes"'),
        ({"image": [255, 216], "caption": "one"}, "image", "[255, 216]"),
        ({"image": [[[0, 0, 0]]], "caption": "one"}, "image", "[[[0, 0, 0]]]"),
    ],
)
def test_a_value_of_another_type_is_named(row: dict[str, Any], field: str, value: str) -> None:
    rejection = convert_row(row, {}, None, "a", may_be_record=False).rejection
    assert rejection
    assert (rejection.field, rejection.value) == (field, value)


def test_images_in_base64_without_an_address(tmp_path: Path) -> None:
    """MMBench's tables have them, also in LLaVA's form."""
    text = base64.b64encode(SAMPLES[0].image).decode()
    turns = [{"from": "human", "value": "<image>\nWhich?"}, {"from": "gpt", "value": "one"}]
    rows = [{"image": text, "question": "Which?", "answer": "one"}, {"image": text, "conversations": turns}]
    records = read_source(Path(write_lines(tmp_path / "a.jsonl", rows)))
    assert [record.image for record in records] == [SAMPLES[0].image] * 2
    assert list_turns(records) == [["<image>\nWhich?", "one"]] * 2
    # A path that begins so is a path.
    [named] = read_source(Path(write_lines(tmp_path / "b.jsonl", [{"image": "/9j/a.jpg", "caption": "one"}])))
    assert (named.record["image"], named.image) == ("/9j/a.jpg", None)


def test_a_file_of_images_without_turns_is_rejected(tmp_path: Path) -> None:
    [given] = read_source(
        Path(write_json(tmp_path / "a.json", {"images": [{"file_name": "a.jpg"}], "annotations": []}))
    )
    record, rejection, repair = admit_record(given, ShardOptions())
    assert (record, repair) == (None, "")
    assert rejection
    assert rejection.field == "images"


def test_an_address_is_not_downloaded(tmp_path: Path) -> None:
    rejection, _, _ = read_image(ImageFolder(str(tmp_path)), "https://example.org/a.jpg", None, ShardOptions())
    assert rejection
    assert "images of other addresses are not downloaded" in rejection.explanation


def write_parquet(path: Path) -> None:
    parquet.write_table(pa.Table.from_pylist(CAPTIONS), path)


@pytest.mark.parametrize(
    ("name", "write", "message"),
    [
        ("a.jsonl", lambda path: path.write_bytes(gzip.compress(b"{}")), "got gzip, .* unpack it first"),
        ("a.csv", lambda path: path.write_bytes(b"PK\3\4"), "got zip or Excel, .* export the table as CSV"),
        ("a.xlsx", lambda path: path.write_bytes(b"PK\3\4"), "got zip or Excel, .* export the table as CSV"),
        ("a.json", write_parquet, "got parquet, .* the suffix .parquet"),
        ("a.arrow", write_parquet, "got parquet, .* the suffix .parquet"),
    ],
)
def test_a_file_of_another_kind_than_its_name(
    name: str, write: Callable[[Path], object], message: str, tmp_path: Path
) -> None:
    write(tmp_path / name)
    with pytest.raises(ValueError, match=f"{name}: {message}"):
        read_source(tmp_path / name)


def test_a_compressed_part_of_the_data_is_not_left_out(tmp_path: Path) -> None:
    for kind, plain in (("tar.zst", "tar"), ("jsonl.gz", "jsonl"), ("parquet.gz", None)):
        folder = tmp_path / kind
        folder.mkdir()
        (folder / f"b.{kind}").touch()
        if plain:
            (folder / f"a.{plain}").touch()
        with pytest.raises(ValueError, match=f"b.{kind}: compressed, .* unpack it first"):
            find_layout(str(folder))
    # Archives of other kinds, and those that are unpacked, may stay.
    folder = tmp_path / "beside"
    folder.mkdir()
    for name in ("a.jsonl", "a.jsonl.gz", "images.tar.gz", "images.zip"):
        (folder / name).touch()
    assert find_layout(str(folder)).files == (str(folder / "a.jsonl"),)


def write_photo(folder: Path, name: str, sample: int = 0) -> None:
    folder.mkdir(exist_ok=True)
    (folder / f"{name}.jpg").write_bytes(SAMPLES[sample].image)
    (folder / f"{name}.txt").write_text(f"caption {sample}")


def test_hidden_files_of_macos_are_no_data(tmp_path: Path) -> None:
    write_photo(tmp_path / "a", "0")
    (tmp_path / "a" / "__MACOSX").mkdir()
    for name in ("._0.jpg", "._0.txt", "__MACOSX/._0.jpg", ".DS_Store"):
        (tmp_path / "a" / name).write_bytes(b"\0\5\26\7")
    assert [record.origin for record in read_source(tmp_path / "a")] == ["0.jpg"]
    (tmp_path / "b").mkdir()
    write_lines(tmp_path / "b" / "a.jsonl", CAPTIONS)
    (tmp_path / "b" / "._a.jsonl").write_bytes(b"\0\5\26\7")
    for source in ("b", "b/*.jsonl"):
        assert len(read_source(tmp_path / source)) == 2


def test_two_images_of_one_name_do_not_share_a_caption(tmp_path: Path) -> None:
    for number in range(2):
        write_photo(tmp_path / "a", str(number), number)
    Image.fromarray(np.zeros((2, 2), np.uint8)).save(tmp_path / "a" / "1.png")
    kept, *rejected = read_source(tmp_path / "a")
    assert kept.rejection is None
    assert [record.rejection and record.rejection[:3] for record in rejected] == [
        ("several images", "image", "1.jpg"),
        ("several images", "image", "1.png"),
    ]


def test_two_tables_of_images_are_refused(tmp_path: Path) -> None:
    write_photo(tmp_path / "a", "0")
    write_lines(tmp_path / "a" / "metadata.jsonl", [{"file_name": "0.jpg", "text": "one"}])
    (tmp_path / "a" / "metadata.csv").write_text("file_name,text\n0.jpg,two\n")
    with pytest.raises(ValueError, match=r"got metadata\.jsonl and metadata\.csv, allowed: one of them"):
        read_source(tmp_path / "a")


def write_tar(path: Path, members: dict[str, bytes | str]) -> Path:
    """Write a tar; a text is the target of a hard link."""
    with tarfile.open(path, "w") as tar:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            if isinstance(content, str):
                info.type, info.linkname = tarfile.LNKTYPE, content
                tar.addfile(info)
            else:
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))
    return path


def test_captions_of_a_sample_that_differ_are_named(tmp_path: Path) -> None:
    image = SAMPLES[0].image
    members = {
        "0.jpg": image,
        "0.txt": b"one",
        "0.caption": b"two",
        "1.jpg": image,
        "1.caption": b"one",
        "1.json": b'{"caption": "two"}',
        "2.jpg": image,
        "2.txt": b"one\n",
        "2.caption": b"one",
        "2.json": b'{"caption": "one"}',
    }
    *rejected, kept = read_source(write_tar(tmp_path / "a.tar", members))
    assert [record.rejection and record.rejection[:2] for record in rejected] == [
        ("several columns", "caption and txt"),
        ("several columns", "json[caption] and caption"),
    ]
    assert list_turns([kept]) == [["<image>", "one"]]


def test_a_link_in_a_tar_is_named(tmp_path: Path) -> None:
    """GNU tar writes the second of two hard-linked files as a link."""
    image = SAMPLES[0].image
    members = {"0.jpg": image, "0.txt": b"one", "1.jpg": "0.jpg", "1.txt": b"two", "2.txt": b"three"}
    kept, linked, missing = read_source(write_tar(tmp_path / "a.tar", members))
    assert kept.rejection is None
    assert linked.rejection
    assert linked.rejection.reason == "missing image"
    assert "1.jpg is a hard link, which WebDataset skips" in linked.rejection.explanation
    assert missing.rejection
    assert missing.rejection.detail == ""
