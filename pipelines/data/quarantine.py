"""Explanation of rejected records: each reason with its count, three examples with field and value, and what to do."""

import json
from collections import Counter
from collections.abc import Iterable, Iterator
from typing import Any

from pipelines.core import storage
from pipelines.data import records, tars

MAX_SHOWN_RECORDS = 3

REASON_ADVICE = {
    "not JSON": "repair or remove the damaged line or member",
    "wrong fields": "write each turn with from and value as text; name columns of other names by --columns, such as "
    "--columns conversations=chat (columns: {conversations: chat} in a job file)",
    "duplicate": "remove the copies; --fix leaves them out, and does not count them as rejected",
    "turn order": "merge or remove turns, so that questions and answers alternate; if all begin with gpt, check "
    "which role is which; tool calls are not read",
    "empty turn": "remove the round, or write the missing text",
    "broken text": "write the file again in UTF-8",
    "video": "remove these records, or replace a video by one of its frames",
    "audio": "remove these records",
    "point cloud": "remove these records",
    "unsupported image": "give each record one image, and one <image> in its first question: remove the others, make a "
    "record for each, or join them into one image; name another column of the image by --image-key",
    "image without tag": "put <image> where the question refers to the image",
    "tag without image": "name the image of the record, or remove <image> from its text",
    "tag in system message": "move <image> to a question",
    "several tags": "keep one <image>, or make a record for each image",
    "too long": "raise --max-words, or split the conversation",
    "outside folder": "choose a higher folder as --images; download images of URLs first, with img2dataset for example",
    "missing image": "check --images: the path must exist below it",
    "broken image": "download or convert the file again",
    "no record": "redux shards make --source reads tars with captions or other conversations",
    "several records": "keep one JSON member with a conversation in each sample",
    "several columns": "name the column by --image-key or --text-key (columns: {image: NAME, text: NAME} in a job "
    "file)",
    "several images": "name the member with the image by --image-key, such as --image-key jpg (columns: {image: jpg} "
    "in a job file)",
    "split sample": "pack the members of a sample one after the other, with tar --sort=name",
    "sparse member": "make the tar again without --sparse",
}
"""Advice for each reason of RECORD_REASONS and TAR_REASONS."""


class RejectionSummary:
    """Counts and examples of the entries of a quarantine list, which may be longer than memory.

    counts: number of entries of each reason. first_entry: the first one, or {}.
    """

    def __init__(self, entries: Iterable[dict[str, Any]] = ()) -> None:
        self.counts = Counter[str]()
        self.first_entry: dict[str, Any] = {}
        self._examples: dict[str, list[dict[str, Any]]] = {}
        self._repairs: dict[str, tuple[int, str]] = {}  # number of repairable entries, and the repair of the first
        for entry in entries:
            self.add(entry)

    def add(self, entry: dict[str, Any]) -> None:
        """Count an entry."""
        # Entries of make have a number, those of index a key and a tar.
        reason = entry["reason"]
        self.first_entry = self.first_entry or entry
        self.counts[reason] += 1
        if self.counts[reason] <= MAX_SHOWN_RECORDS:
            self._examples.setdefault(reason, []).append(entry)
        # Entries know their repair even if --fix was not given.
        if repair := entry.get("repair"):
            count, description = self._repairs.get(reason, (0, repair))
            self._repairs[reason] = (count + 1, description)

    def explain(self) -> list[str]:
        """Explain the entries in lines, the most frequent reason first."""
        lines = []
        for reason, count in self.counts.most_common():
            explanation = (tars.TAR_REASONS | records.RECORD_REASONS).get(reason, "rejected by an older version")
            lines.append(f"{count:>10} {reason}: {explanation}")
            lines += [f"{'':>11}{_describe_example(entry)}" for entry in self._examples[reason]]
            if reason in REASON_ADVICE:
                lines.append(f"{'':>11}what to do: {REASON_ADVICE[reason]}")
            if reason in self._repairs:
                repairable, repair = self._repairs[reason]
                lines.append(f"{'':>11}--fix repairs {repairable} of them: it {repair}")
        return lines


class QuarantineError(ValueError):
    """Error of a set with too many rejected records. Its text is one line.

    Args:
        message: the line.
        rejections: what was rejected.
    """

    def __init__(self, message: str, rejections: RejectionSummary) -> None:
        super().__init__(message)
        self.rejections = rejections


def read_list(url: str) -> Iterator[dict[str, Any]]:
    """Yield the entries of a quarantine list."""
    data, start = storage.map_file(url), 0
    while (end := data.find(b"\n", start)) >= 0:
        yield json.loads(data[start:end])
        start = end + 1


def _describe_example(entry: dict[str, Any]) -> str:
    """Describe one rejected record: its position, its field and its value."""
    if "number" in entry:
        name = f"record {entry['number']}"
        details = [str(entry[key]) for key in ("origin", "id") if entry.get(key) not in (None, "")]
        # The id is known by the origin already if that is a sample of a tar.
        if len(details) == 2 and details[0].endswith(details[1]):
            details.pop()
        name += f" ({', '.join(details)})" if details else ""
    else:
        name = f"{tars.escape_unprintable(entry['key'])} of {entry['shard']}"
    field, value = entry.get("field") or "", entry.get("value") or ""
    # The details of this record, after the explanation of the reason.
    reason = records.RECORD_REASONS.get(entry["reason"], "")
    explanation = str(entry.get("explanation", ""))
    detail = explanation.removeprefix(f"{reason}: ") if reason and explanation.startswith(f"{reason}: ") else ""
    # An empty text is a value, too.
    example = f"{name}: {field + ': ' if field else ''}got {value or repr('')}" if value or field else name
    return f"{example}: {detail}" if detail else example
