"""The sixteen instructions, pairs of them and the held-out constraints as tasks of lmms-eval, with a local file.

`redux.benchmarks.instructions` writes the file of frozen prompts. lmms-eval has no argument for the location of data.
So a task reads `instructions.jsonl`, and images from the folder `images`, in the working directory. A task file of
three lines that includes one of these tasks changes both:

    include: …/redux/lmms_eval/tasks/no_comma.yaml
    dataset_path: /data/prompts.jsonl
    dataset_kwargs: {images: /data/images}

Cost: each task reads the file once, and an image when it asks a question about it.
"""

import io
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from datasets import Dataset, DatasetDict
from lmms_eval.api.task import ConfigurableTask
from PIL import Image

from redux.benchmarks import Question
from redux.benchmarks.instructions import pair_arguments, read_questions
from redux.instructions import follows_loosely, follows_strictly

PAIRS = "pairs"
"""`dataset_name` of the task whose prompts have two instructions."""


class Instructions(ConfigurableTask):
    """A task with the questions of one instruction, whose id is `dataset_name`, or with those of all pairs."""

    def __init__(self, config: Mapping[str, Any]) -> None:
        # lmms-eval passes the key `class`, which its TaskConfig does not know.
        super().__init__(config={name: value for name, value in config.items() if name != "class"})

    def download(self, dataset_kwargs: Mapping[str, Any] | None = None) -> None:
        """Read the frozen file.

        Arguments of instructions become text: as columns of a table every question would have those of all others.
        """
        if not Path(self.DATASET_PATH).is_file():
            raise ValueError(
                f"dataset_path: got {self.DATASET_PATH}, allowed: a file of frozen prompts, in the folder where "
                "lmms-eval is started"
            )
        questions = [
            question
            for question in read_questions(self.DATASET_PATH)
            if question.reference.get("instruction_id", PAIRS) == self.DATASET_NAME
        ]
        if not questions:
            raise ValueError(f"{self.DATASET_PATH}: got no question with {self.DATASET_NAME}, allowed: at least one")
        self.questions: dict[str, Question] = {question.id: question for question in questions}
        self.images = Path((dataset_kwargs or {}).get("images", "images"))
        self.dataset = self.dataset_no_image = DatasetDict(
            test=Dataset.from_list([_build_document(question) for question in questions])
        )

    def doc_to_visual(self, doc: Mapping[str, Any]) -> list[Image.Image]:
        """Load the image of a question, as a list for lmms-eval."""
        image = self.questions[doc["id"]].image
        if image is None:
            return []
        return [Image.open(io.BytesIO(image) if isinstance(image, bytes) else self.images / image).convert("RGB")]


def _build_document(question: Question) -> dict[str, str]:
    reference = question.reference
    return {
        "id": question.id,
        "prompt": question.prompt,
        "instructions": json.dumps(pair_arguments(reference)),
    }


def process_results(doc: Mapping[str, Any], results: Sequence[str]) -> dict[str, float]:
    """Score an answer; lmms-eval computes the means."""
    instructions = json.loads(doc["instructions"])
    strict = [follows_strictly(id, kwargs, results[0]) for id, kwargs in instructions]
    loose = [follows_loosely(id, kwargs, results[0]) for id, kwargs in instructions]
    scores = {"strict": fmean(strict), "loose": fmean(loose)}
    # lmms-eval takes no score that the file of the task does not list.
    if len(instructions) > 1:
        scores |= {"prompt_strict": float(all(strict)), "prompt_loose": float(all(loose))}
    return scores
