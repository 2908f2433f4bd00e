"""Records of a source in LLaVA's form, one after the other, so that memory does not grow with the source."""

from collections.abc import Iterator
from typing import Any

from pipelines.core import storage
from pipelines.data.options import SetSource
from pipelines.data.records import LFS_ADVICE, LFS_POINTER
from pipelines.data.sources.image_folder import read_image_folder
from pipelines.data.sources.json_records import read_json_records
from pipelines.data.sources.layouts import find_layout
from pipelines.data.sources.rows import IMAGE_COLUMNS, KNOWN_COLUMNS, SourceRecord, convert_row
from pipelines.data.sources.tables import read_arrow, read_csv, read_parquet
from pipelines.data.sources.tar_rows import read_tar_records
from pipelines.data.tars import COMPRESSION_MAGIC

FILE_MAGIC = {
    **{magic: (program, "plain files; unpack it first") for magic, program in COMPRESSION_MAGIC.items()},
    b"PK\x03\x04": ("zip or Excel", "plain files; unpack it, or export the table as CSV"),
    b"PAR1": ("parquet", "the suffix .parquet"),
    b"ARROW1": ("arrow", "the suffix .arrow"),
    b"SQLite format 3": ("SQLite", "a table that is exported as CSV"),
}
"""Kinds of files by their first bytes, and what is allowed in place of another kind."""


class RecordSource:
    """Source of records. Each iteration reads it from the start.

    Args:
        settings: path of the source, and what is not usual about it.

    Raises:
        ValueError: the form of the source is not read. Iterating raises it for damaged files.
    """

    def __init__(self, settings: SetSource) -> None:
        self.source = settings.source
        # The files are listed once; each iteration opens them again.
        self.layout = find_layout(settings.source)
        # Those that the user names come before those of a description.
        self.columns = {**self.layout.columns, **settings.columns}
        self.prompt = settings.prompt
        self.images = settings.images or self.layout.images

    def __iter__(self) -> Iterator[SourceRecord]:
        is_empty = True
        for record in self._iterate():
            is_empty = False
            yield record
        if is_empty:
            raise ValueError(f"{self.source}: no records, allowed: at least one")

    def _iterate(self) -> Iterator[SourceRecord]:
        if self.layout.kind == "images":
            for origin, row, rejection in read_image_folder(self.layout.files[0], self.columns):
                if rejection:
                    yield SourceRecord(row, origin=origin, rejection=rejection)
                else:
                    yield convert_row(row, self.columns, self.prompt, origin, may_be_record=False)
            return
        for url in self.layout.files:
            self._check_beginning(url)
            if self.layout.kind == "tar":
                yield from read_tar_records(url, self.columns, self.prompt, self.layout.excluded.get(url, frozenset()))
                continue
            name = url.rpartition("/")[2]
            for position, row in self._read_rows(url):
                # Only JSON has no values that a record cannot store.
                yield convert_row(row, self.columns, self.prompt, f"{name}: {position}", self.layout.kind == "json")

    def _check_beginning(self, url: str) -> None:
        """Check that the first bytes of a file are not those of another kind than that of its name."""
        size = min(storage.get_size(url), len(LFS_POINTER))
        beginning = storage.read_ranges([(url, 0, size)])[0]
        if beginning == LFS_POINTER.encode():
            raise ValueError(f"{url}: {LFS_ADVICE}")
        kind = self.layout.kind
        for magic, (actual_kind, advice) in FILE_MAGIC.items():
            # The reader of tars has its own message for compressed ones.
            if beginning.startswith(magic) and actual_kind != kind and kind != "tar":
                raise ValueError(f"{url}: got {actual_kind}, which is read as {kind}, allowed: {advice}")

    def _read_rows(self, url: str) -> Iterator[tuple[str, Any]]:
        if self.layout.kind == "parquet":
            return read_parquet(url)
        if self.layout.kind == "arrow":
            return read_arrow(url)
        if self.layout.kind == "csv":
            return read_csv(url)
        return read_json_records(url, KNOWN_COLUMNS | {*IMAGE_COLUMNS, *self.columns.values()})

    def describe(self) -> dict[str, Any]:
        """Describe a source with images in its files: what its records depend on. {} for a source without.

        Names and sizes stand for the files, since reading all images again would take long.
        """
        if self.layout.kind in ("json", "csv", "images"):
            return {}
        excluded = {url.rpartition("/")[2]: sorted(keys) for url, keys in self.layout.excluded.items()}
        return {
            "files": [(url.rpartition("/")[2], storage.get_size(url)) for url in self.layout.files],
            "columns": dict(self.columns),
            "prompt": self.prompt,
            **({"excluded": excluded} if excluded else {}),
        }
