"""Fuzz tests of records and images: each is kept or listed in quarantine, without a traceback or a hang.

REDUX_FUZZ=10000 tries that many of each; the default is smaller.
"""

import json
import os
import random
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path

import pytest

from pipelines.data.options import ShardOptions
from pipelines.data.records import RECORD_REASONS, find_rejection
from pipelines.data.shard_index import QUARANTINE_FILE, Shards
from pipelines.data.shard_writer import make_shards
from pipelines.data.sources.json_records import iterate_json
from redux.conversation import TEMPLATES, encode_conversation, train_word_tokenizer
from redux.image import load_pixels
from tests.pipelines.odd_records import odd_image, odd_record, picture

NUMBER = int(os.environ.get("REDUX_FUZZ", "400"))


def listed(out: Path, total: int) -> dict[int, str]:
    """Read reasons by number, and check that each line is JSON in UTF-8 with a field and a value."""
    reasons = {}
    for line in (out / QUARANTINE_FILE).read_text("utf-8").splitlines():
        entry = json.loads(line, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
        assert entry.keys() - {"repair"} == {"number", "id", "reason", "field", "value", "explanation"}
        assert entry["explanation"].startswith(RECORD_REASONS[entry["reason"]])
        assert len(line) < 2000
        reasons[entry["number"]] = entry["reason"]
    assert reasons.keys() <= set(range(total))
    return reasons


@pytest.mark.parametrize("form", ["list", "lines"])
def test_each_record_is_kept_or_listed(
    in_process: Callable[[], AbstractContextManager[None]], tmp_path: Path, form: str
) -> None:
    rng = random.Random(form)
    for name in ("a.jpg", "b.jpg"):
        (tmp_path / name).write_bytes(picture())
    (tmp_path / "a.png").write_bytes(picture("PNG"))
    (tmp_path / "cut.jpg").write_bytes(picture()[:99])
    texts = [odd_record(rng) for _ in range(NUMBER // 2)]
    if form == "list":
        text = f"[{', '.join(texts)}]"
    else:
        text = "\n".join([json.dumps({"conversations": []}), *texts])
        texts = [*texts, ""]
    data = text.encode("utf-8", "surrogatepass")
    given = [record for _, record in iterate_json([data], "x.json", frozenset({"conversations"}))]
    assert len(given) == len(texts)
    out = tmp_path / "out"
    with in_process():
        summary = make_shards(given, str(tmp_path), str(out), ShardOptions(samples_per_shard=100, max_bad_fraction=1))
    reasons = listed(out, len(given))
    assert summary["samples"] + len(reasons) == len(given)
    assert len(set(reasons.values())) >= 8
    assert summary["samples"] > len(given) / 4
    stored = Shards(out)
    kept = stored.read_samples(range(len(stored)))
    assert [int(sample.key) for sample in kept] == [number for number in range(len(given)) if number not in reasons]
    tokenizer = train_word_tokenizer(["USER: ASSISTANT: red 0 1 . \n"], 512)
    image = tokenizer.convert_tokens_to_ids("<image>")
    for sample in kept:
        assert find_rejection(sample.record, None) is None
        ids, labels = encode_conversation(tokenizer, sample.record["conversations"], TEMPLATES["vicuna_v1"], 1)
        assert (ids == image).sum() == bool(sample.image)
        assert (labels != image).all()
        assert sample.id.encode() is not None
        if sample.image:
            assert load_pixels(sample.image, 8).shape == (3, 8, 8)


@pytest.mark.parametrize("size", [None, 8])
def test_each_image_is_kept_or_listed(
    in_process: Callable[[], AbstractContextManager[None]], tmp_path: Path, size: int | None
) -> None:
    rng = random.Random(size or 0)
    images = [odd_image(rng) for _ in range(NUMBER // 2)]
    turns = [{"from": "human", "value": "<image>"}, {"from": "gpt", "value": "A."}]
    for number, image in enumerate(images):
        (tmp_path / f"{number}.jpg").write_bytes(image)
    given = [{"id": number, "image": f"{number}.jpg", "conversations": turns} for number in range(len(images))]
    out = tmp_path / "out"
    with in_process():
        summary = make_shards(
            given, str(tmp_path), str(out), ShardOptions(samples_per_shard=100, max_bad_fraction=1, image_size=size)
        )
    reasons = listed(out, len(given))
    assert set(reasons.values()) == {"broken image"}
    assert summary["samples"] + len(reasons) == len(given)
    assert len(given) / 5 < summary["samples"] < len(given)
    stored = Shards(out)
    for sample in stored.read_samples(range(len(stored))):
        number = int(sample.key)
        if size is None:
            assert sample.image == images[number]
            assert load_pixels(sample.image, 8, "crop").shape == (3, 8, 8)
        else:
            assert (load_pixels(sample.image, 8) == load_pixels(images[number], 8)).all()
