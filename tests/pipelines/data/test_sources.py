"""Tests of sources: the same samples in every form give the same batches, and what is not read is refused in a line."""

import csv
import io
import json
import random
import re
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import webdataset
from pyarrow import parquet

from pipelines.core import storage
from pipelines.data import shard_writer
from pipelines.data.ingest import Reader, make_conversation_encoder
from pipelines.data.options import SetSource, ShardOptions
from pipelines.data.order import Order
from pipelines.data.quarantine import QuarantineError, RejectionSummary
from pipelines.data.records import find_rejection
from pipelines.data.shard_index import QUARANTINE_FILE, Shards
from pipelines.data.shard_writer import make_shards
from pipelines.data.sources.json_records import iterate_json
from pipelines.data.sources.layouts import find_layout
from pipelines.data.sources.opened import RecordSource
from pipelines.data.sources.rows import SourceRecord, convert_row
from pipelines.data.sources.tables import read_csv
from redux.conversation import TEMPLATES, train_word_tokenizer
from tests.pipelines.data import source_files
from tests.pipelines.data.source_files import CAPTION_WRITERS, CONVERSATION_WRITERS, PROMPT, SEVERAL_IMAGE_WRITERS
from tests.pipelines.odd_records import odd_record

SAMPLES = source_files.draw_samples()
CONVERSATIONS = source_files.make_conversations(SAMPLES)


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("source")
    source_files.write_photos(folder, SAMPLES)
    return folder


@pytest.fixture(scope="module")
def words(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a tokenizer of the samples' words."""
    folder = tmp_path_factory.mktemp("words")
    texts = [turn["value"] for record in CONVERSATIONS for turn in record["conversations"]]
    train_word_tokenizer([*texts, "USER: ASSISTANT:"], max_length=96).save_pretrained(folder)
    return folder


def read_batch(folder: str, words: Path) -> dict[str, Any]:
    """Read all samples of a set in their order as one batch, as training does."""
    shards = Shards(folder)
    reader = Reader(
        sources={"all": shards},
        order=Order(samples=(len(shards),), global_batch_size=len(shards), seed=0, shuffle="none"),
        micro_batch_size=len(shards),
        image_size=12,
        tokenizer=words,
        encode=make_conversation_encoder(TEMPLATES["vicuna_bare"], image_tokens=3),
    )
    return reader(0)


def make_set(settings: dict[str, Any], out: Path, **options: Any) -> dict[str, Any]:
    source = RecordSource(SetSource(**settings))
    return make_shards(source, source.images, str(out), ShardOptions(samples_per_shard=4, **options))


def check_equal(batch: dict[str, Any], expected: dict[str, Any]) -> None:
    assert batch["replaced"] == expected["replaced"] == "[]"
    for name in ("pixel_values", "input_ids", "labels", "attention_mask"):
        assert batch[name].dtype == expected[name].dtype
        assert np.array_equal(batch[name], expected[name]), name


@pytest.fixture(scope="module")
def read_records(
    in_process: Callable[[], AbstractContextManager[None]],
    photos: Path,
    words: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> Callable[[Any], dict[str, Any]]:
    """Reads the batch of records in LLaVA's form."""

    def read(records: Any) -> dict[str, Any]:
        out = str(tmp_path_factory.mktemp("expected"))
        with in_process():
            make_shards(records, str(photos), out, ShardOptions())
        return read_batch(out, words)

    return read


@pytest.fixture(scope="module")
def conversations(read_records: Callable[[Any], dict[str, Any]]) -> dict[str, Any]:
    """The batch of the conversations in LLaVA's form."""
    return read_records(CONVERSATIONS)


@pytest.fixture(scope="module")
def captions(read_records: Callable[[Any], dict[str, Any]]) -> dict[str, Any]:
    """The batch of the captions in LLaVA's form."""
    return read_records(source_files.make_llava(SAMPLES))


def test_the_expected_batches_have_images_labels_and_a_system_message(
    conversations: dict[str, Any], captions: dict[str, Any]
) -> None:
    assert (len(conversations["pixel_values"]), len(captions["pixel_values"])) == (9, 10)
    assert conversations["input_ids"].shape[0] == captions["input_ids"].shape[0] == 10
    assert (conversations["labels"] >= 0).any(axis=1).all()
    assert len(np.unique(captions["pixel_values"], axis=0)) == 10
    # The system message is not learned.
    learned = [(batch["labels"][1] >= 0).sum() for batch in (conversations, captions)]
    assert learned[0] == learned[1]
    assert conversations["attention_mask"][1].sum() > captions["attention_mask"][1].sum()


@pytest.mark.usefixtures("local_ray_data")
@pytest.mark.parametrize("form", CONVERSATION_WRITERS)
def test_conversations_in_every_form_give_the_same_batch(
    form: str, tmp_path: Path, words: Path, conversations: dict[str, Any]
) -> None:
    source_files.write_photos(tmp_path, SAMPLES)
    settings = CONVERSATION_WRITERS[form](tmp_path, SAMPLES, CONVERSATIONS)
    summary = make_set(settings, tmp_path / "out")
    assert (summary["samples"], summary["quarantined"]) == (10, {})
    check_equal(read_batch(str(tmp_path / "out"), words), conversations)
    # A second start reads the source, and leaves the set unchanged.
    times = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").iterdir()}
    assert make_set(settings, tmp_path / "out") == json.loads((tmp_path / "out" / "summary.json").read_text())
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "out").iterdir()} == times


@pytest.mark.usefixtures("local_ray_data")
@pytest.mark.parametrize("form", CAPTION_WRITERS)
def test_captions_in_every_form_give_the_same_batch(
    form: str, tmp_path: Path, words: Path, captions: dict[str, Any]
) -> None:
    settings = CAPTION_WRITERS[form](tmp_path, SAMPLES)
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    summary = make_set({"prompt": PROMPT, **settings}, tmp_path / "out")
    assert (summary["samples"], summary["quarantined"]) == (10, {})
    check_equal(read_batch(str(tmp_path / "out"), words), captions)
    # Nothing is written beside the source or the shards.
    after = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*") if "out" not in path.parts}
    assert after == before
    assert {path.suffix for path in (tmp_path / "out").iterdir()} == {".tar", ".arrow", ".json", ".jsonl"}


@pytest.mark.usefixtures("local_ray_data")
def test_a_source_is_read_one_shard_ahead_and_once(
    photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    records = source_files.make_llava(SAMPLES)
    source_files.write_lines(photos / "once.jsonl", records)
    source = RecordSource(SetSource(source=str(photos / "once.jsonl")))
    read: list[str] = []
    written: list[tuple[int, int]] = []
    iterate, write = RecordSource.__iter__, shard_writer._write_shard

    def read_and_count(self: RecordSource) -> Iterator[SourceRecord]:
        for record in iterate(self):
            read.append(record.origin)
            yield record

    def write_and_note(task: dict[str, Any], *arguments: Any) -> int:
        written.append((task["shard"], len(read)))
        return write(task, *arguments)

    monkeypatch.setattr(RecordSource, "__iter__", read_and_count)
    monkeypatch.setattr(shard_writer, "_write_shard", write_and_note)
    make_shards(source, source.images, str(tmp_path), ShardOptions(samples_per_shard=4))
    assert read == [f"once.jsonl: line {number}" for number in range(1, 11)]
    assert written == [(0, 4), (1, 8), (2, 10)], "a shard is written when its records are read"


@pytest.mark.usefixtures("local_ray_data")
def test_an_interrupted_run_continues_and_refuses_other_records(photos: Path, tmp_path: Path) -> None:
    records = source_files.make_llava(SAMPLES)
    path = photos / "resumed.jsonl"
    text = source_files.write_lines(path, records) and path.read_text()
    settings = {"source": str(path)}
    path.write_text(text.replace(records[9]["image"], "none.jpg"))
    with pytest.raises(QuarantineError, match="1 missing image"):
        make_set(settings, tmp_path)
    assert sorted(file.name for file in (tmp_path / "unfinished").iterdir()) == ["000000.arrow", "000001.arrow"]
    # The shards that are there are of the same records.
    path.write_text(text.replace("number 1.", "number one."))
    with pytest.raises(ValueError, match="contains shards of other records or settings"):
        make_set(settings, tmp_path)
    path.write_text(text)
    times = {name: (tmp_path / name).stat().st_mtime_ns for name in ("000000.tar", "000001.tar")}
    assert make_set(settings, tmp_path)["samples"] == 10
    assert {name: (tmp_path / name).stat().st_mtime_ns for name in times} == times


@pytest.mark.usefixtures("local_ray_data")
def test_a_finished_set_refuses_a_changed_source(tmp_path: Path) -> None:
    settings = source_files.write_energon_captions(tmp_path, SAMPLES)
    make_set(settings, tmp_path / "out")
    for changed in ({"prompt": "Q"}, {"columns": {"text": "json[about][other]"}}):
        with pytest.raises(ValueError, match="contains shards of other records or settings"):
            make_set({**settings, **changed}, tmp_path / "out")
    split = tmp_path / "energon" / ".nv-meta" / "split.yaml"
    split.write_text(split.read_text().replace("other0", "other1"))
    with pytest.raises(ValueError, match="contains shards of other records or settings"):
        make_set(settings, tmp_path / "out")


@pytest.mark.usefixtures("local_ray_data")
def test_equal_words_about_other_images_are_no_duplicates(tmp_path: Path) -> None:
    rows = [{"image": {"bytes": sample.image}, "caption": "a picture."} for sample in [*SAMPLES, SAMPLES[2]]]
    parquet.write_table(pa.Table.from_pylist(rows), tmp_path / "a.parquet")
    summary = make_set({"source": str(tmp_path / "a.parquet")}, tmp_path / "out", max_bad_fraction=0.1)
    assert (summary["samples"], summary["quarantined"]) == (10, {"duplicate": 1})


@pytest.mark.usefixtures("local_ray_data")
@pytest.mark.parametrize("form", SEVERAL_IMAGE_WRITERS)
def test_a_record_with_several_images_is_listed_and_never_read_as_one(form: str, tmp_path: Path) -> None:
    source_files.write_photos(tmp_path, SAMPLES)
    write, field = SEVERAL_IMAGE_WRITERS[form]
    settings = write(tmp_path, SAMPLES)
    with pytest.raises(QuarantineError, match="1 of 2 records cannot be used"):
        make_set(settings, tmp_path / "out")
    assert make_set(settings, tmp_path / "out", max_bad_fraction=0.5)["samples"] == 1
    [entry] = [json.loads(line) for line in (tmp_path / "out" / QUARANTINE_FILE).read_text().splitlines()]
    assert (entry["number"], entry["field"]) == (0, field)
    assert entry["reason"] in ("unsupported image", "several images", "several columns")
    # File, record, value and the way out.
    reason, example, advice = RejectionSummary([entry]).explain()
    assert "image" in reason
    assert example.strip().startswith(f"record 0 ({entry['origin']})")
    assert re.match(
        r"(\w+\.(jsonl|parquet|tar)|data-.*\.arrow|metadata.jsonl): (line 1|row 0|sample 0)$", entry["origin"]
    )
    assert f"{field + ': ' if field else ''}got {entry['value']}" in example
    assert advice.strip().startswith("what to do: ")


@pytest.mark.usefixtures("local_ray_data")
def test_the_image_that_the_user_names_is_read_beside_others(tmp_path: Path) -> None:
    source_files.write_photos(tmp_path, SAMPLES)
    for number, (form, column) in enumerate(
        {
            "LLaVA, numbered fields": "image",
            "parquet, two columns": "screenshot",
            "WebDataset, a numbered member": "jpg",
        }.items()
    ):
        folder = tmp_path / f"{number}"
        source_files.write_photos(folder, SAMPLES)
        settings = SEVERAL_IMAGE_WRITERS[form][0](folder, SAMPLES)
        summary = make_set({**settings, "columns": {"image": column}}, folder / "out", max_bad_fraction=1)
        assert summary["samples"] == (1 if column == "screenshot" else 2), form


def row_of(**columns: Any) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": "Q"}, {"role": "assistant", "content": "A"}], **columns}


PART = {"type": "text", "text": "Q"}


@pytest.mark.parametrize(
    ("row", "reason", "field", "value"),
    [
        (row_of(images=["a", "b"]), "unsupported image", "images[0]", "2 images: images[0], images[1]"),
        (row_of(image=7), "unsupported image", "image", "7"),
        (row_of(image="data:text,hello"), "unsupported image", "image", "data:text,hello"),
        (row_of(image="data:image/png;base64,???"), "broken image", "image", "???"),
        (row_of(videos=["a.mp4"]), "video", "videos", '["a.mp4"]'),
        ({"messages": [{"role": "user", "content": 3}]}, "wrong fields", "messages[0].content", "3"),
        ({"messages": [{"role": "user"}]}, "wrong fields", "messages[0].content", "(missing)"),
        ({"messages": [{"role": "user", "content": [{"type": "video"}]}]}, "video", "messages[0].content[0]",
         '{"type": "video"}'),
        ({"messages": [{"role": "user", "content": [PART, 3]}]}, "wrong fields", "messages[0].content[1]", "3"),
        ({"messages": "text"}, "wrong fields", "messages", "text"),
        ({"messages": ["text"]}, "wrong fields", "messages[0]", "text"),
        ({"messages": []}, "wrong fields", "messages", "[]"),
        ({"question": "Q", "answer": None}, "wrong fields", "answer", "(missing)"),
        ({"caption": "A", "jpg": None}, "missing image", "image", "(missing)"),
        ({"a": 1, "messages": None}, "wrong fields", "messages", "null"),
    ],
    ids=ascii,
)  # fmt: skip
def test_a_row_that_cannot_be_converted_names_field_and_value(
    row: dict[str, Any], reason: str, field: str, value: str
) -> None:
    converted = convert_row(row, {}, None, "a.jsonl: line 1")
    assert converted.rejection
    assert converted.rejection[:3] == (reason, field, value)
    assert converted.record == row


@pytest.mark.parametrize(
    ("row", "field"),
    [
        ({"messages": [{"role": "user", "content": "Q"}, {"role": "tool", "content": "A"}]}, "messages[1].role"),
        (
            {"messages": [{"role": "user", "content": "Q"}, {"role": "assistant", "content": " "}]},
            "messages[1].content",
        ),
        ({"texts": [{"user": "Q", "assistant": ""}]}, "texts[0].assistant"),
        ({"instruction": "Q", "output": ""}, "output"),
        ({"jpg": b"a", "txt": " "}, "txt"),
    ],
)
def test_a_rejected_record_names_the_field_of_its_row(row: dict[str, Any], field: str) -> None:
    converted = convert_row(row, {}, None, "a.jsonl: line 1", may_be_record=False)
    rejection = find_rejection(converted.record, None)
    assert rejection
    assert converted.name_field(rejection).field == field


@pytest.mark.parametrize(
    ("row", "field"),
    [
        ({"caption": "a", "text": "b", "image": "x"}, "caption and text"),
        ({"caption": "a", "image": "x", "jpg": b"x"}, "image and jpg"),
    ],
)
def test_columns_that_could_both_be_meant_are_named(row: dict[str, Any], field: str) -> None:
    rejection = convert_row(row, {}, None, "a").rejection
    assert rejection
    assert (rejection.reason, rejection.field) == ("several columns", field)
    assert convert_row(row, {"text": "caption", "image": "image"}, None, "a").record["conversations"][1]["value"] == "a"


def test_no_odd_row_ends_the_conversion() -> None:
    rng = random.Random(0)
    reasons: set[str] = set()
    kept = 0
    for _ in range(2000):
        text = odd_record(rng)
        for old, new in (("conversations", "messages"), ("from", "role"), ("value", "content"), ("human", "user")):
            text = text.replace(f'"{old}"', f'"{new}"') if rng.random() < 0.8 else text
        data = f"[{text}]".encode("utf-8", "surrogatepass")
        [(_, record)] = iterate_json([data], "x.json", frozenset({"conversations"}))
        converted = convert_row(record, {}, "P", "a", may_be_record=rng.random() < 0.5)
        rejection = converted.rejection or find_rejection(converted.record, None)
        reasons |= {rejection.reason} if rejection else set()
        kept += rejection is None
    assert kept > 200
    assert len(reasons) > 8


def test_sources_that_are_not_read_are_refused_in_a_line(tmp_path: Path) -> None:
    for name in (
        "splits/train-00000-of-00001.parquet",
        "splits/test-00000-of-00001.parquet",
        "kinds/a.jsonl",
        "kinds/b.csv",
        "other/a.docx",
        "a.json.gz",
        "b.pkl",
        "disk/dataset_dict.json",
        "disk/train/x",
    ):
        (tmp_path / name).parent.mkdir(exist_ok=True, parents=True)
        (tmp_path / name).write_text("{}")
    (tmp_path / "energon" / ".nv-meta").mkdir(parents=True)
    for source, message in {
        "missing": "does not exist, allowed: a JSON, JSON Lines, parquet",
        "splits": r"got the splits test, train, allowed: one of them; give a pattern such as .*/train-\*",
        "kinds": "got csv and json, allowed: files of one kind",
        "other": "got a.docx, allowed: a JSON",
        "a.json.gz": "compressed, allowed: .*; unpack it first",
        "b.pkl": "pickled, allowed: .*; nothing is unpickled",
        "disk": "got the splits train, allowed: the folder of one of them",
        "x-*.json": "no file matches",
        "energon": "dataset.yaml: does not exist, allowed: a folder that `energon prepare` has finished",
    }.items():
        with pytest.raises(ValueError, match=message) as error:
            find_layout(f"{tmp_path}/{source}")
        assert "\n" not in str(error.value)
    assert find_layout(f"{tmp_path}/splits/train-*").files == (f"{tmp_path}/splits/train-00000-of-00001.parquet",)


HEADER = "image,caption\n"
POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n"
TABLE = pa.table({"image": [SAMPLES[0].image], "caption": ["a"]})
DAMAGED_TEXT = pa.StringArray.from_buffers(1, pa.array([0, 2], pa.int32()).buffers()[1], pa.py_buffer(b"a\xff"))


def to_parquet(table: pa.Table) -> bytes:
    sink = io.BytesIO()
    parquet.write_table(table, sink)
    return sink.getvalue()


@pytest.mark.usefixtures("local_ray_data")
@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        *((f"a.{suffix}", POINTER, "a git-lfs pointer; git lfs pull") for suffix in ("json", "parquet", "csv", "tar")),
        ("a.csv", HEADER, "no records, allowed: at least one"),
        ("a.csv", "", "no records, allowed: at least one"),
        ("a.csv", f'{HEADER}a.jpg,"open\nb.jpg,two\n', "the row after line 1: unexpected end of data, allowed: cells"),
        ("a.csv", "image,caption,caption\na.jpg,a,b\n", "got 2 columns caption"),
        ("a.parquet", to_parquet(TABLE.append_column("caption", TABLE["caption"])), "got 2 columns caption"),
        ("a.parquet", to_parquet(TABLE.slice(1)), "no records, allowed: at least one"),
        ("a.parquet", to_parquet(pa.table({"image": ["a"], "caption": DAMAGED_TEXT})), "rows 0 to 0: .*Invalid UTF8"),
    ],
)  # fmt: skip
def test_files_that_would_be_misread_are_refused_in_a_line(
    tmp_path: Path, name: str, content: str | bytes, message: str
) -> None:
    (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ValueError, match=f"{name}: .*{message}") as error:
        make_set({"source": str(tmp_path / name)}, tmp_path / "out", max_bad_fraction=1)
    assert "\n" not in str(error.value)


@pytest.mark.usefixtures("local_ray_data")
def test_rows_that_would_be_misread_are_listed_with_their_detail(tmp_path: Path) -> None:
    (tmp_path / "p.jpg").write_text(POINTER)
    (tmp_path / "a.jpg").write_bytes(SAMPLES[0].image)
    (tmp_path / "a.csv").write_text(f'{HEADER}a.jpg,one, two\na.jpg,kept\np.jpg,three\na.jpg,"{POINTER}"\na.jpg,\n')
    summary = make_set({"source": str(tmp_path / "a.csv")}, tmp_path / "out", max_bad_fraction=1)
    assert (summary["records"], summary["samples"]) == (5, 1)
    listed = [json.loads(line) for line in (tmp_path / "out" / QUARANTINE_FILE).read_text().splitlines()]
    lines = "\n".join(RejectionSummary(listed).explain())
    for part in (
        'line 2): got [" two"]: more cells than columns: put a text with a separator into quotation marks',
        "line 4): image: got p.jpg: a git-lfs pointer; git lfs pull fetches the file",
        ": a git-lfs pointer; git lfs pull fetches the file\n",
        "caption: got ''",
    ):
        assert part in lines


def test_a_large_cell_and_turns_in_cells_are_read(tmp_path: Path) -> None:
    url = source_files.to_data_url(SAMPLES[0].image + bytes(200_000))
    turns = source_files.to_messages(CONVERSATIONS[0])
    with (tmp_path / "a.csv").open("w", newline="") as file:
        csv.writer(file).writerows([["image", "messages"], [url, json.dumps(turns)]])
    columns = {name: [turn[name] for turn in turns] for name in turns[0]}
    parquet.write_table(pa.Table.from_pylist([{"image": url, "messages": columns}]), tmp_path / "a.parquet")
    for name in ("a.csv", "a.parquet"):
        [record] = RecordSource(SetSource(source=str(tmp_path / name)))
        assert record.record["conversations"] == CONVERSATIONS[0]["conversations"]
        assert len(record.image or b"") > 200_000


def test_a_folder_with_the_characters_of_a_pattern_is_no_pattern(tmp_path: Path) -> None:
    (tmp_path / "a [1]").mkdir()
    (tmp_path / "a [1]" / "a.jsonl").touch()
    assert find_layout(str(tmp_path / "a [1]")).files == (str(tmp_path / "a [1]" / "a.jsonl"),)
    with pytest.raises(ValueError, match="source: got an empty text"):
        find_layout(" ")


ENTRY = {"file_name": "a.json"}


@pytest.mark.parametrize(
    ("entries", "name", "message"),
    [
        ({"a": ENTRY, "b": ENTRY}, "", "got 2 entries, allowed: one of a, b, such as .*dataset_info.json:a"),
        ({"a": ENTRY}, ":c", "got no entry c, allowed: one of a"),
        ({"a": {"hf_hub_url": "x/y"}}, ":a", "a.hf_hub_url: got x/y, allowed: file_name; download the data"),
        ({"a": {**ENTRY, "ranking": True}}, ":a", "a: got preferences, allowed: conversations"),
        ({"a": {**ENTRY, "num_samples": 5}}, ":a", "a.num_samples: got 5, allowed"),
        ({"a": {**ENTRY, "formatting": "sharegpt", "columns": {"tools": "t"}}}, ":a", "a.columns.tools: got 't', all"),
        ({"a": {**ENTRY, "formatting": "x"}}, ":a", "a.formatting: got x, allowed: alpaca, sharegpt"),
        ({"a": {**ENTRY, "columns": {"what": "x"}}}, ":a", "a.columns.what: got 'x', allowed: prompt, query"),
        ({"a": {**ENTRY, "formatting": "sharegpt", "tags": {"what": "x"}}}, ":a",
         "a.tags.what: got 'x', allowed: role_tag"),
        ([], ":a", "got list, allowed: entries of data sets by name"),
        ({"a": {**ENTRY, "columns": ["x"]}}, ":a", r"a.columns: got \['x'\], allowed: names of columns"),
        ({"a": {**ENTRY, "columns": {"prompt": 5}}}, ":a", "a.columns.prompt: got 5, allowed: a name"),
        ({"a": {**ENTRY, "formatting": "sharegpt", "tags": ["x"]}}, ":a", r"a.tags: got \['x'\], allowed: names of fi"),
        ({"a": {"file_name": None}}, ":a", "a.file_name: got None, allowed: the name of a file or a folder"),
    ],
)  # fmt: skip
def test_entries_of_llama_factory_that_are_not_read_are_refused(
    tmp_path: Path, entries: Any, name: str, message: str
) -> None:
    (tmp_path / "a.json").write_text("[]")
    with pytest.raises(ValueError, match=message):
        find_layout(source_files.write_json(tmp_path / "dataset_info.json", entries) + name)


def test_braces_in_the_names_of_energon_are_expanded(tmp_path: Path) -> None:
    """As Energon does, in tars and in exclusions."""
    description = {"sample_type": {"__class__": "CaptioningSample"}}
    source_files.write_energon_files(tmp_path, description, ["{08..11}.tar", "x.tar"], ("{09..10}.tar", "x.tar/{a,b}"))
    layout = find_layout(str(tmp_path))
    assert [name.rpartition("/")[2] for name in layout.files] == ["08.tar", "11.tar", "x.tar"]
    assert layout.excluded == {f"{tmp_path}/x.tar": frozenset("ab")}
    (tmp_path / ".nv-meta" / "split.yaml").write_text(json.dumps({"split_parts": {"train": ["{0..2.tar"]}}))
    with pytest.raises(ValueError, match=r"split.yaml: Unbalanced braces: '\{0\.\.2\.tar', allowed: braces in pairs"):
        find_layout(str(tmp_path))


def test_an_energon_sample_type_that_is_not_read_is_refused(tmp_path: Path) -> None:
    sample_type = {"__module__": "megatron.energon", "__class__": "MultiChoiceVQASample"}
    source_files.write_energon_files(tmp_path, {"sample_type": sample_type, "field_map": {"image": "jpg"}}, ["a.tar"])
    with pytest.raises(ValueError, match="a field_map of MultiChoiceVQASample, allowed: CaptioningSample, VQASample"):
        find_layout(str(tmp_path))


@pytest.mark.parametrize(
    ("description", "split", "message"),
    [
        ({}, {"split_parts": {"train": "a.tar"}}, "split.yaml: split_parts.train: got 'a.tar', allowed: a list"),
        ({}, {"split_parts": {"train": [1]}}, r"split.yaml: split_parts.train: got \[1\], allowed: a list of names"),
        ({}, {"split_parts": {"train": ["a.tar"]}, "exclude": "a.tar/0"}, "split.yaml: exclude: got 'a.tar/0'"),
        ({"sample_type": "CaptioningSample"}, {}, "dataset.yaml: sample_type: got 'CaptioningSample', allowed: __mod"),
        ({"field_map": ["jpg"]}, {}, r"dataset.yaml: field_map: got \['jpg'\], allowed: members by their meaning"),
        ({"field_map": {"image": None}}, {}, r"dataset.yaml: field_map: got {'image': None}, allowed: members"),
    ],
)  # fmt: skip
def test_descriptions_of_energon_with_wrong_types_are_refused(
    tmp_path: Path, description: dict[str, Any], split: dict[str, Any], message: str
) -> None:
    sample_type = {"sample_type": {"__class__": "CaptioningSample"}}
    source_files.write_energon_files(tmp_path, {**sample_type, **description}, ["a.tar"])
    if split:
        (tmp_path / ".nv-meta" / "split.yaml").write_text(json.dumps(split))
    with pytest.raises(ValueError, match=message):
        find_layout(str(tmp_path))


def write_texts(folder: Path, texts: dict[str, str]) -> None:
    """Write an image and the files beside it into a folder for each file's stem."""
    for name, text in texts.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
        path.with_suffix(".jpg").write_bytes(SAMPLES[0].image)


def read_captions(folder: Path, **settings: Any) -> dict[str, str]:
    """Read the caption of each image of a folder, or the reason for which it is rejected, by the image's stem."""
    found = {}
    for given in RecordSource(SetSource(source=str(folder), **settings)):
        rejection = given.rejection
        text = f"{rejection.reason}: {rejection.field}" if rejection else given.record["conversations"][1]["value"]
        found[given.origin.removesuffix(".jpg")] = text
    return found


def test_texts_beside_an_image_are_read_whatever_their_case(tmp_path: Path) -> None:
    write_texts(tmp_path, {"a.txt": "1", "b.TXT": "2", "c.Caption": "3", "d.JSON": '{"caption": "4"}', "e.f.TXT": "5"})
    assert read_captions(tmp_path) == {"a": "1", "b": "2", "c": "3", "d": "4", "e.f": "5"}


def test_captions_beside_an_image_that_differ_are_listed(tmp_path: Path) -> None:
    """As in tars: img2dataset writes the same caption twice."""
    metadata = {"url": "u", "key": "0", "width": 8, "status": "success"}
    write_texts(
        tmp_path,
        {
            "a.txt": "one\n", "a.json": json.dumps({**metadata, "caption": "one"}),
            "b.txt": "one", "b.json": json.dumps({**metadata, "caption": "two"}),
            "c.txt": "one", "c.caption": "two",
            # A JSON about something else.
            "d.txt": "one", "d.json": json.dumps({"imageData": "x", "shapes": [], "caption": None}),
            "e.txt": "one", "e.json": "[1]",
        },
    )  # fmt: skip
    assert read_captions(tmp_path) == {
        "a": "one", "b": "several columns: b.txt and b.json[caption]", "c": "several columns: c.txt and c.caption",
        "d": "one", "e": "one",
    }  # fmt: skip
    # The user's choice.
    chosen = read_captions(tmp_path, columns={"text": "caption"})
    assert (chosen["a"], chosen["b"], chosen["c"]) == ("one", "two", "two")
    assert chosen["d"].startswith("wrong fields")


def test_a_link_to_a_folder_above_is_refused(tmp_path: Path) -> None:
    write_texts(tmp_path / "photos", {"a/0.txt": "1", "b/1.txt": "2"})
    # A link to a folder beside is read.
    (tmp_path / "photos" / "c").symlink_to(tmp_path / "photos" / "a")
    assert read_captions(tmp_path / "photos") == {"a/0": "1", "b/1": "2", "c/0": "1"}
    (tmp_path / "photos" / "b" / "up").symlink_to(tmp_path / "photos")
    with pytest.raises(ValueError, match=r"photos/b/up: a link to .*/photos, a folder above it, allowed: ") as error:
        read_captions(tmp_path / "photos")
    assert len(str(error.value)) < 200 + 2 * len(str(tmp_path))


def test_a_table_of_text_is_read_in_chunks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cells = [["a,b", 'say "yes"', "two\nlines", "é" * 9, "\r\n"][number % 5] for number in range(40)]
    with (tmp_path / "a.csv").open("w", newline="", encoding="utf-8-sig") as file:
        csv.writer(file).writerows(
            [["image", "caption"], *([f"{number}.jpg", cell] for number, cell in enumerate(cells))]
        )
    whole = [row for _, row in read_csv(str(tmp_path / "a.csv"))]
    assert [row["caption"] for row in whole] == cells
    for size in (1, 2, 7, 100):
        monkeypatch.setattr(storage, "CHUNK_BYTES", size)
        assert [row for _, row in read_csv(str(tmp_path / "a.csv"))] == whole


@pytest.mark.usefixtures("local_ray_data")
def test_samples_of_tars_without_one_image_or_text_are_listed(tmp_path: Path) -> None:
    source = tmp_path / "tars"
    source.mkdir()
    image = SAMPLES[0].image
    turns = [{"role": "user", "content": "<image>Q"}, {"role": "assistant", "content": "A"}]
    with webdataset.TarWriter(str(source / "a.tar")) as tar:
        for members in (
            {"jpg": image, "txt": "kept"},
            {"jpg": image, "png": image, "txt": "two images"},
            {"jpg": image},
            {"txt": "no image"},
            {"jpg": image, "a.json": turns, "b.json": turns},
            {"json": {"texts": turns, "media": "image", "name": ["0_a.jpg"]}},
            {"json": {"texts": turns, "media": "video", "name": ["0_a.mp4"]}, "0_a.mp4": b"x"},
            {"jpg": image, "txt": b"\xff"},
            {"jpg": b"no image", "txt": "broken"},
            {"jpg": image, "json": b"{no JSON"},
        ):
            tar.write({"__key__": f"{len(tar.tarstream.members):04d}", **members})
    summary = make_set({"source": str(source)}, tmp_path / "out", max_bad_fraction=1)
    assert summary["samples"] == 1
    listed = [json.loads(line) for line in (tmp_path / "out" / QUARANTINE_FILE).read_text().splitlines()]
    assert [entry["reason"] for entry in listed] == [
        "several images", "wrong fields", "missing image", "several records", "missing image", "video", "broken text",
        "broken image", "not JSON",
    ]  # fmt: skip
    assert all(entry["origin"].startswith("a.tar: sample ") for entry in listed)
    assert [entry["value"] for entry in listed][:1] == ["jpg, png"]
    assert (listed[-1]["field"], listed[-1]["value"]) == ("json", "{no JSON")
