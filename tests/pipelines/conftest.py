"""What tests of the Ray floor share: a set of shards that anyone can make in a second, and a tokenizer for it."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from pipelines import shards
from pipelines.shards import Making, Shards
from redux.conversation import TEMPLATES, word_tokenizer

SIZES = ((8, 8), (16, 16), (12, 6), (5, 9))
COLOURS = ("red", "blue", "green")


@pytest.fixture(scope="session")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the records' images."""
    return tmp_path_factory.mktemp("images")


@pytest.fixture(scope="session")
def records(pictures: Path) -> list[dict]:
    """22 records of one to four rounds; no two images are the same, and not all have the same size."""
    noise = np.random.default_rng(0)
    result = []
    for number in range(22):
        width, height = SIZES[number % len(SIZES)]
        picture = noise.integers(0, 256, (height, width, 3), dtype=np.uint8)
        Image.fromarray(picture).save(pictures / f"{number}.png")
        turns = []
        for round_ in range(number % 4 + 1):
            question = f"is there {'no ' * round_}{COLOURS[round_ % 3]} shape number {number}?"
            turns += [{"from": "human", "value": question}, {"from": "gpt", "value": ("yes", "no")[round_ % 2]}]
        turns[0]["value"] = f"<image>\n{turns[0]['value']}"
        result.append({"id": f"test/{number}", "image": f"{number}.png", "conversations": turns})
    return result


@pytest.fixture(scope="session")
def stored(ray_cluster: Any, records: list[dict], pictures: Path, tmp_path_factory: pytest.TempPathFactory) -> Shards:
    """The records as five shards; a test that writes there makes a set of its own."""
    folder = tmp_path_factory.mktemp("shards")
    shards.make(records, str(pictures), str(folder), Making(samples_per_shard=5))
    return Shards(folder)


@pytest.fixture(scope="session")
def tokenizer(records: list[dict], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where a tokenizer of the records' words lies."""
    folder = tmp_path_factory.mktemp("tokenizer")
    pieces = [piece for record in records for piece, _ in TEMPLATES["vicuna_bare"].spans(record["conversations"])]
    word_tokenizer(pieces, length=96).save_pretrained(folder)
    return folder
