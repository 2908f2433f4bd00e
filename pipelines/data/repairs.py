"""Repairs of rejected records, where only one repair is possible and no learned text is invented.

- A last turn of "human" without an answer, and a last round with an empty answer, are left out: nothing is learned of
  them. A first turn of "gpt" is left out, as LLaVA's trainer does, unless the two roles may be exchanged: if the
  last turn is of "human", questions would become learned answers.
- `<image>` is put before the first question of a record with an image and without a tag.
- Another program's tag of an image, such as `<|image|>`, becomes `<image>` if it is the only one and there is an image.
- `<image>` in each question about one image stays in the first question alone.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

from pipelines.data.records import (
    RecordRejection,
    count_system_turns,
    find_image_tags,
    find_rejection,
    has_image,
    replace_image_tag,
)
from redux.conversation import IMAGE_TOKEN

MAX_REPAIRS = 4
"""Maximum number of repairs of one record."""

Turns = list[dict[str, Any]]


class Repair(NamedTuple):
    """Repaired record, and a description of the change."""

    record: dict[str, Any]
    description: str


def find_repair(record: Any, rejection: RecordRejection, max_words: int | None) -> Repair | None:
    """Find the repair of a rejected record. None if there is none, or if the repaired record is rejected as well.

    Args:
        record: the record.
        rejection: the reason to reject it.
        max_words: as for `find_rejection`.
    """
    # A repair may show the next reason, such as a missing tag after a superfluous turn.
    descriptions: list[str] = []
    remaining: RecordRejection | None = rejection
    for _ in range(MAX_REPAIRS):
        change = _CHANGES.get(remaining.reason) if remaining and _has_turns(record) else None
        repaired = change(record) if change else None
        if repaired is None:
            return None
        record = repaired.record
        descriptions.append(repaired.description)
        remaining = find_rejection(record, max_words)
        if remaining is None:
            return Repair(record, "; ".join(descriptions))
    return None


def _has_turns(record: Any) -> bool:
    """Return True if a record has turns with roles and texts. A rejection for another field says nothing about them."""
    turns = record.get("conversations") if isinstance(record, dict) else None
    return isinstance(turns, list) and all(
        isinstance(turn, dict) and isinstance(turn.get("from"), str) and isinstance(turn.get("value"), str)
        for turn in turns
    )


def _with_turns(record: dict[str, Any], turns: Turns, description: str) -> Repair:
    return Repair({**record, "conversations": turns}, description)


def _repair_order(record: dict[str, Any]) -> Repair | None:
    turns: Turns = record["conversations"]
    num_system = count_system_turns(turns)
    roles = [turn["from"] for turn in turns[num_system:]]
    may_be_exchanged = roles[-1:] == ["human"]
    if len(roles) > 2 and roles[0] == "gpt" and not may_be_exchanged:
        return _with_turns(record, turns[:num_system] + turns[num_system + 1 :], "leaves out the first turn, of gpt")
    alternates = all(role == ("human", "gpt")[number % 2] for number, role in enumerate(roles))
    if len(roles) > 2 and alternates and roles[-1] == "human":
        return _with_turns(record, turns[:-1], "leaves out the last turn, a question without an answer")
    return None


def _repair_empty_turn(record: dict[str, Any]) -> Repair | None:
    turns: Turns = record["conversations"]
    num_system = count_system_turns(turns)
    if len(turns) - num_system > 2 and not turns[-1]["value"].strip() and IMAGE_TOKEN not in turns[-2]["value"]:
        return _with_turns(record, turns[:-2], "leaves out the last round, which has an empty answer")
    return None


def _repair_missing_tag(record: dict[str, Any]) -> Repair | None:
    turns: Turns = record["conversations"]
    num_system = count_system_turns(turns)
    changed = {**turns[num_system], "value": f"{IMAGE_TOKEN}\n{turns[num_system]['value']}"}
    repaired = [*turns[:num_system], changed, *turns[num_system + 1 :]]
    return _with_turns(record, repaired, "puts <image> before the first question")


def _repair_foreign_tag(record: dict[str, Any]) -> Repair | None:
    turns: Turns = record["conversations"]
    if not has_image(record) or not isinstance(record["image"], str):
        return None
    if any(IMAGE_TOKEN in turn["value"] for turn in turns):
        return None
    numbered_tags = [(number, tag) for number, turn in enumerate(turns) for tag in find_image_tags(turn["value"])]
    if len(numbered_tags) != 1 or turns[numbered_tags[0][0]]["from"] != "human":
        return None
    [(number, tag)] = numbered_tags
    changed = {**turns[number], "value": replace_image_tag(turns[number]["value"], tag)}
    return _with_turns(record, [*turns[:number], changed, *turns[number + 1 :]], f"replaces {tag} by <image>")


def _repair_several_tags(record: dict[str, Any]) -> Repair | None:
    turns: Turns = record["conversations"]
    # Exactly one tag in each question: they can only mean the same image.
    humans = [turn for turn in turns if turn["from"] == "human"]
    if any(turn["value"].count(IMAGE_TOKEN) != (turn["from"] == "human") for turn in turns) or len(humans) < 2:
        return None
    changed = [
        turn if turn is humans[0] else {**turn, "value": turn["value"].replace(IMAGE_TOKEN, "").strip()}
        for turn in turns
    ]
    return _with_turns(record, changed, "keeps <image> in the first question alone")


_CHANGES: dict[str, Callable[[dict[str, Any]], Repair | None]] = {
    "turn order": _repair_order,
    "empty turn": _repair_empty_turn,
    "image without tag": _repair_missing_tag,
    "unsupported image": _repair_foreign_tag,
    "several tags": _repair_several_tags,
}
"""Changes by the reason of the rejection."""
