"""Batch inference over every test question, each asked alone, and the score.

rows in:   number of a batch of images
rows out:  one row a question: id, image, question, answer, response
resources: `actors` actors share the CPUs, or take a GPU each

answers.jsonl   {"id", "image", "question", "answer", "response", "type", "correct"}, in the order of the test set
"""

import json
import math
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import ray
import ray.data
import torch
from annotated_types import Ge
from PIL import Image
from ray.data import ExecutionOptions
from tqdm import tqdm
from transformers import AutoTokenizer

from pipelines import cluster
from pipelines.easy_vqa import TYPES
from pipelines.report import Example
from pipelines.shards import Sample, Shards
from redux.answer import answer, answer_from_descriptions
from redux.conversation import IMAGE, TEMPLATES
from redux.image import Fit, pixels
from redux.model import ReduxForConditionalGeneration, normalise
from redux.remote import fetched

FILE = "answers.jsonl"


@dataclass(frozen=True, kw_only=True)
class Evaluate:
    """Settings.

    images: of a batch, with all their questions.
    actors: models at work at a time.
    image: how the model knows it: "seen", or "described" by itself beforehand, the upper limit of Table 1.
    """

    images: Annotated[int, Ge(1)] = 16
    actors: Annotated[int, Ge(1)] = 1
    max_new_tokens: Annotated[int, Ge(1)] = 8
    image: Literal["seen", "described"] = "seen"


class Answerer:
    """An actor with the model: answers all questions of a batch of images, greedily."""

    def __init__(self, model: str, shards: str, settings: Evaluate, template: str, fit: Fit) -> None:
        self.device = "cuda" if torch.cuda.is_available() else "cpu"
        if self.device == "cpu":
            torch.set_num_threads(max(len(os.sched_getaffinity(0)) // settings.actors, 1))
        with fetched(model) as folder:
            self.model = ReduxForConditionalGeneration.from_pretrained(folder).eval().to(self.device)
            self.tokenizer = AutoTokenizer.from_pretrained(folder)
        self.shards, self.settings, self.template, self.fit = Shards(shards), settings, TEMPLATES[template], fit

    def __call__(self, rows: dict[str, np.ndarray]) -> dict[str, list]:
        first = int(rows["id"][0]) * self.settings.images
        samples = self.shards.read(range(first, min(first + self.settings.images, len(self.shards))))
        asked = [(sample, *pair) for sample in samples for pair in questions(sample)]
        return {
            "id": [f"{sample.id}/{number}" for sample in samples for number, _ in enumerate(questions(sample))],
            "image": [sample.id for sample, _, _ in asked],
            "question": [question for _, question, _ in asked],
            "answer": [answer for _, _, answer in asked],
            "response": self.answer(samples, [(sample.key, question) for sample, question, _ in asked]),
        }

    def answer(self, samples: list[Sample], asked: list[tuple[str, str]]) -> list[str]:
        """Responses to (sample key, question) pairs."""
        size = self.model.config.vision_config.image_size
        images = torch.from_numpy(np.stack([pixels(sample.image, size, self.fit) for sample in samples]))
        number = {sample.key: place for place, sample in enumerate(samples)}
        shows, told = [number[key] for key, _ in asked], [question for _, question in asked]
        if self.settings.image == "described":
            return answer_from_descriptions(
                self.model, self.tokenizer, self.template, told, images, shows, self.settings.max_new_tokens
            )
        return answer(self.model, self.tokenizer, self.template, told, images[shows], self.settings.max_new_tokens)


def questions(sample: Sample) -> Iterator[tuple[str, str]]:
    """(question, answer) of each round of a conversation."""
    texts = [turn["value"].removeprefix(f"{IMAGE}\n") for turn in sample.record["conversations"]]
    return zip(texts[::2], texts[1::2], strict=True)


def evaluate(
    model: str | Path, shards: str, run: Path, settings: Evaluate, template: str, fit: Fit = "pad"
) -> dict[str, float]:
    """Answer every question of the shards into run/answers.jsonl; returns the scores by name.

    model: folder or URL.
    template, fit: of conversations and images, as the model was trained.
    """
    stored = Shards(shards)
    batches = math.ceil(len(stored) / settings.images)
    cluster.require({"CPU": settings.actors / 2 + 1}, f"evaluate with actors = {settings.actors}")
    gpu = ray.cluster_resources().get("GPU", 0) >= settings.actors
    answers = ray.data.range(batches, override_num_blocks=batches).map_batches(
        Answerer,
        fn_constructor_args=(str(model), shards, settings, template, fit),
        batch_size=None,
        compute=ray.data.ActorPoolStrategy(size=settings.actors),
        num_cpus=0.5,
        num_gpus=1 if gpu else None,
    )
    answers.context.execution_options = ExecutionOptions(preserve_order=True)
    unfinished, entries, image = run / f".{FILE}", [], None
    with unfinished.open("w") as file, tqdm(desc="evaluate", total=len(stored), unit="image") as bar:
        for row in answers.iter_rows():
            entries.append(entry := judged(row))
            file.write(json.dumps(entry) + "\n")
            bar.update(row["image"] != image)  # at the first question of each
            image = row["image"]
    os.replace(unfinished, run / FILE)
    return scores(entries)


def judged(row: dict[str, Any]) -> dict[str, Any]:
    """The row with the type of its question and whether the response is the answer, word for word."""
    return {**row, "type": TYPES[row["answer"]], "correct": row["response"] == row["answer"]}


def scores(entries: list[dict]) -> dict[str, float]:
    """Accuracy over all questions and over those of each type."""
    result = {"easy_vqa.questions": len(entries), "easy_vqa.accuracy": _share(entries)}
    for kind in sorted({entry["type"] for entry in entries}):
        result[f"easy_vqa.accuracy.{kind}"] = _share([entry for entry in entries if entry["type"] == kind])
    return result


def _share(entries: list[dict]) -> float:
    return sum(entry["correct"] for entry in entries) / len(entries)


def examples(model: str | Path, shards: str, answers: Path, count: int, fit: Fit = "pad") -> list[Example]:
    """`count` answered questions on different images, evenly spread over the test set, with what VMTC did to each."""
    entries = [json.loads(line) for line in answers.read_text().splitlines()]
    by_image = {entry["image"]: entry for entry in reversed(entries)}
    stored, llava = Shards(shards), ReduxForConditionalGeneration.from_pretrained(model).eval()
    result = []
    for number in range(0, len(stored), max(len(stored) // count, 1))[:count] if count else ():
        [sample] = stored.read([number])
        image = pixels(sample.image, llava.config.vision_config.image_size, fit)
        entry = by_image[sample.id]
        with torch.inference_mode():
            _, fate = llava.model.encode_images(normalise(torch.from_numpy(image[None])))
        result.append(
            Example(
                image=Image.fromarray(image.transpose(1, 2, 0)),
                question=entry["question"],
                answer=entry["answer"],
                response=entry["response"],
                correct=entry["correct"],
                slot=fate.slot[0].numpy(),
                merged=fate.merged[0].numpy(),
            )
        )
    return result
