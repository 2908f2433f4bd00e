"""The sixteen instructions as tasks of lmms-eval, over a file of frozen prompts and without the hub.

`redux.benchmarks.instructions` writes the file.  lmms-eval has no argument for where data lies, so a task looks for
`instructions.jsonl`, and for images that are paths in the folder `images`, where lmms-eval is started.  A task file of
three lines that includes one of ours says otherwise:

    include: …/redux/lmms_eval/tasks/no_comma.yaml
    dataset_path: /data/prompts.jsonl
    dataset_kwargs: {images: /data/images}

Cost: the file is read once for each task, and an image when its question is asked.
"""

import io
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from datasets import Dataset, DatasetDict
from lmms_eval.api.task import ConfigurableTask
from PIL import Image

from redux.benchmarks import Question
from redux.benchmarks.instructions import read_questions
from redux.instructions import follows_loosely, follows_strictly


class Instructions(ConfigurableTask):
    """The questions of one instruction, `dataset_name`."""

    def __init__(self, config: Mapping[str, Any]) -> None:
        super().__init__(config={name: value for name, value in config.items() if name != "class"})

    def download(self, dataset_kwargs: Mapping[str, Any] | None = None) -> None:
        """Reads the frozen file; kwargs become text, as columns of a table would add those of other questions."""
        if not Path(self.DATASET_PATH).is_file():
            raise ValueError(
                f"dataset_path: got {self.DATASET_PATH}, allowed: a file of frozen prompts, in the folder where "
                "lmms-eval is started"
            )
        asked = [
            each for each in read_questions(self.DATASET_PATH) if each.reference["instruction_id"] == self.DATASET_NAME
        ]
        if not asked:
            raise ValueError(f"{self.DATASET_PATH}: got no question with {self.DATASET_NAME}, allowed: at least one")
        self.questions: dict[str, Question] = {each.id: each for each in asked}
        self.images = Path((dataset_kwargs or {}).get("images", "images"))
        self.dataset = self.dataset_no_image = DatasetDict(
            test=Dataset.from_list([_build_document(each) for each in asked])
        )

    def doc_to_visual(self, doc: Mapping[str, Any]) -> list[Image.Image]:
        """The image of a question, in a list, as lmms-eval wants it."""
        image = self.questions[doc["id"]].image
        if image is None:
            return []
        return [Image.open(io.BytesIO(image) if isinstance(image, bytes) else self.images / image).convert("RGB")]


def _build_document(question: Question) -> dict[str, str]:
    reference = question.reference
    return {
        "id": question.id,
        "prompt": question.prompt,
        "instruction_id": reference["instruction_id"],
        "kwargs": json.dumps(reference["kwargs"]),
    }


def process_results(doc: Mapping[str, Any], results: Sequence[str]) -> dict[str, float]:
    """Whether the answer follows the instruction; lmms-eval takes the means."""
    told = (doc["instruction_id"], json.loads(doc["kwargs"]), results[0])
    return {"strict": float(follows_strictly(*told)), "loose": float(follows_loosely(*told))}
