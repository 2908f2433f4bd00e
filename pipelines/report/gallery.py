"""Gallery of answers: a few questions of each task with image, reference answer and response, wrong ones first.

The page must stay small, so images are thumbnails and long texts are cut. A missing image leaves a placeholder.

Images come from the folder of the task, local or a URL. Questions of benchmarks are read again to find them, because a
line of answers does not name its image.
"""

import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from PIL import Image

from pipelines.core import storage
from pipelines.evaluation.tasks import TaskSettings, find_image_folder, load_questions, spread_evenly
from pipelines.report.page import cut_text, encode_image
from pipelines.report.scores import JudgedRow, TaskResult

THUMBNAIL_SIZE = 256
"""Longest side of a thumbnail in pixels."""

WRONG_SHARE = 0.75
"""Largest share of wrong answers in the gallery of a task that also has right ones."""

MAX_SHOWN_REFERENCES = 4


class Card(NamedTuple):
    """A question of the gallery.

    Args:
        question: the prompt.
        references: reference answers.
        response: answer of the model.
        score: score as a share of the maximum; None without a reference.
        kind: type of the question.
        image: thumbnail as a data URI, "" for none.
        problem: why there is no image, "" for a question without one.
        width: width of the thumbnail in pixels.
        height: its height.
    """

    question: str
    references: tuple[str, ...]
    response: str
    score: float | None
    kind: str
    image: str
    problem: str
    width: int = 4
    height: int = 3

    @property
    def verdict(self) -> str:
        """CSS class: "right", "partly", "wrong" or "unscored"."""
        if self.score is None:
            return "unscored"
        if self.score >= 1 - 1e-9:
            return "right"
        return "wrong" if self.score <= 0 else "partly"


@dataclass(frozen=True)
class Gallery:
    """Cards of one task.

    Args:
        name: name of the task.
        title: its name on the page.
        cards: the cards, wrong ones first.
        kinds: types of the questions on the cards.
        wrong: number of all wrong answers.
        right: number of all right answers.
        total: number of all answers.
    """

    name: str
    title: str
    cards: tuple[Card, ...]
    kinds: tuple[str, ...]
    wrong: int
    right: int
    total: int


class ImageReader:
    """Reader of the images of a task.

    Args:
        name: name of the task.
        settings: its settings; None if the job no longer says them.
    """

    def __init__(self, name: str, settings: TaskSettings | None) -> None:
        self.name = name
        self.settings = settings or TaskSettings()
        self._images: Mapping[str, Any] | None = None
        self._is_reachable = True

    def read(self, row: Mapping[str, Any]) -> bytes | None:
        """Read the image of a row; None for a question without an image.

        Raises:
            ValueError: the image cannot be read.
        """
        image = row["image"] if "image" in row else self._find_image(row)
        if image is None or isinstance(image, bytes):
            return image
        if not self._is_reachable:
            raise ValueError("the folder of the images cannot be reached")
        url = self.locate({"image": str(image)})
        try:
            return storage.read(url)
        except Exception as error:  # Each kind of store has its own
            # A store that does not answer is not asked again, because each try may take minutes.
            self._is_reachable = storage.is_local(url)
            reason = str(error).removeprefix(f"{url}: ").partition(", allowed")[0]
            raise ValueError(f"{image}: {reason}") from None

    def locate(self, row: Mapping[str, Any]) -> str:
        """Return the path or URL of the image of a row; "" if its line of answers does not name it."""
        image = row.get("image")
        return storage.join(find_image_folder(self.name, self.settings), image) if isinstance(image, str) else ""

    def _find_image(self, row: Mapping[str, Any]) -> Any:
        """Find the image of a row in the questions of the task."""
        if self._images is None:
            try:
                self._images = {question.id: question.image for question in load_questions(self.name, self.settings)}
            except (OSError, ValueError, ImportError) as error:
                self._images, self._problem = {}, f"the questions cannot be read again: {error}"
            else:
                self._problem = "the questions no longer contain this one"
        if row.get("id") not in self._images:
            raise ValueError(self._problem)
        return self._images[row["id"]]


def make_gallery(result: TaskResult, reader: ImageReader, count: int) -> Gallery:
    """Make the gallery of a task with at most `count` cards."""
    cards = tuple(_make_card(judged, reader) for judged in select_rows(result.rows, count))
    return Gallery(
        result.name,
        result.title,
        cards,
        tuple(dict.fromkeys(card.kind for card in sorted(cards, key=lambda card: card.kind))),
        wrong=sum(judged.is_wrong for judged in result.rows),
        right=sum(judged.is_right for judged in result.rows),
        total=len(result.rows),
    )


def select_rows(rows: Sequence[JudgedRow], count: int) -> list[JudgedRow]:
    """Select at most `count` rows, evenly spaced in each type; the lowest score first.

    Up to three of four are wrong, so that a filter for right answers finds some.
    """
    wrong_rows = [judged for judged in rows if judged.is_wrong]
    other_rows = [judged for judged in rows if not judged.is_wrong]
    num_wrong = min(len(wrong_rows), max(round(count * WRONG_SHARE), count - len(other_rows)))
    selected = _spread_over_kinds(wrong_rows, num_wrong) + _spread_over_kinds(other_rows, count - num_wrong)
    return sorted(selected, key=lambda judged: 2.0 if judged.score is None else judged.score)


def _spread_over_kinds(rows: Sequence[JudgedRow], count: int) -> list[JudgedRow]:
    """Select rows of all types in turn, so that a rare type is not lost."""
    by_kind: dict[str, list[int]] = {}
    for number, judged in enumerate(rows):
        by_kind.setdefault(judged.kind, []).append(number)
    quotas = dict.fromkeys(by_kind, 0)
    left = min(count, len(rows))
    while left:
        for kind, numbers in by_kind.items():
            if left and quotas[kind] < len(numbers):
                quotas[kind] += 1
                left -= 1
    # Each type begins at another row, because several types may have the same images in the same order.
    selected = [
        numbers[(position + shift * (len(numbers) // len(by_kind) + 1)) % len(numbers)]
        for shift, (kind, numbers) in enumerate(by_kind.items())
        for position in spread_evenly(len(numbers), quotas[kind])
    ]
    return [rows[number] for number in sorted(selected)]


def select_images(rows: Sequence[JudgedRow], reader: ImageReader, count: int) -> list[tuple[JudgedRow, bytes]]:
    """Select at most `count` rows about different images, evenly spaced, with the images; unreadable ones are left out.

    The selection does not depend on the responses.
    """
    first_row_by_image = {str(judged.row.get("image", judged.row.get("unit"))): judged for judged in reversed(rows)}
    by_image = list(reversed(first_row_by_image.values()))
    result = []
    for index in spread_evenly(len(by_image), count):
        try:
            image = reader.read(by_image[index].row)
        except ValueError:
            continue
        if image is not None:
            result.append((by_image[index], image))
    return result


def _make_card(judged: JudgedRow, reader: ImageReader) -> Card:
    card = Card(
        question=cut_text(judged.row.get("prompt")),
        references=tuple(cut_text(text) for text in judged.references[:MAX_SHOWN_REFERENCES]),
        response=cut_text(judged.row.get("response")),
        score=judged.score,
        kind=judged.kind,
        image="",
        problem="",
    )
    try:
        content = reader.read(judged.row)
        if content is None:
            return card
        thumbnail = make_thumbnail(content)
    except ValueError as error:
        return card._replace(problem=cut_text(error, 200))
    return card._replace(image=encode_image(thumbnail), width=thumbnail.width, height=thumbnail.height)


def make_thumbnail(content: bytes) -> Image.Image:
    """Decode an image file as a thumbnail; ValueError if that is impossible."""
    try:
        with Image.open(io.BytesIO(content)) as decoder:
            decoder.draft("RGB", (2 * THUMBNAIL_SIZE, 2 * THUMBNAIL_SIZE))  # A large JPEG is decoded at a smaller size
            image = decoder.convert("RGB")
    except Exception as error:  # Each of Pillow's formats has its own
        raise ValueError(f"not an image that can be read: {type(error).__name__}") from None
    image.thumbnail((THUMBNAIL_SIZE, THUMBNAIL_SIZE))
    return image
