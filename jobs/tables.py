"""`redux tables`: finished runs in the paper's tables, as Markdown, as CSV and as one page.

A CSV file has a line for each cell, so a number stands beside its interval and no program has to take cells apart.
"""

import csv
import io
from collections.abc import Iterator, Sequence
from pathlib import Path

from pipelines.evaluation.tasks import EVALUATION_TASKS
from pipelines.report import comparison, page
from pipelines.report.runs import Scorers, find_families
from pipelines.report.tables import Cell, Column, ResultRow, ResultTable, build_tables, compare_prompts

FIELDS = (
    "family", "row", "source", "about", "column", "value", "low", "high",
    "difference", "difference_low", "difference_high", "noise", "ratio", "command",
)  # fmt: skip


def tell(runs: Sequence[Path], out: Path | None, scorers: Scorers, samples: int = 10_000) -> str:
    """The tables as Markdown; with `out`, that, a page and CSV files are also written there.

    runs: folders of runs, or folders that hold such folders.
    samples: draws of each bootstrap.
    Raises ValueError where there is no finished run, saying where it looked.
    """
    families, notes = find_families(runs, scorers)
    tables = build_tables(families, samples)
    text = markdown(tables, [*comparison.write_summary(tables), *notes])
    if out:
        followed = scorers.get("instructions")
        asked = {family.label: compare_prompts(family, followed) for family in families} if followed else {}
        out.mkdir(parents=True, exist_ok=True)
        page.write(out / "tables.md", text)
        page.write(out / "tables.html", comparison.render(tables, notes, asked))
        for table in tables:
            page.write(out / f"{table.key}.csv", cells(table))
    return text


def markdown(tables: Sequence[ResultTable], notes: Sequence[str]) -> str:
    """Each table with its missing rows' commands below it."""
    parts = ["\n\n".join(notes)]
    for table in tables:
        parts.append(f"## {table.title}")
        for family, rows in table.blocks.items():
            parts += [f"**{family}**"] if len(table.blocks) > 1 else []
            parts.append("\n".join(_rows(table.columns, rows)))
            if commands := [line.command for line in rows if line.command]:
                parts.append("Missing:\n\n" + "\n".join(f"    {command}" for command in commands))
        parts += [f"- {note}" for note in table.notes]
    return "\n\n".join(parts) + "\n"


def _rows(columns: Sequence[Column], rows: Sequence[ResultRow]) -> Iterator[str]:
    yield "| | | " + " | ".join(column.name for column in columns) + " |"
    yield "|---|---|" + "---:|" * len(columns)
    for line in rows:
        told = [_told(column, cell) for column, cell in zip(columns, line.cells, strict=False)]
        told += [""] * (len(columns) - len(told))
        yield "| " + " | ".join(text.replace("|", "\\|") for text in (line.label, line.about, *told)) + " |"


def _told(column: Column, cell: Cell | None) -> str:
    if cell is None:
        return ""
    text = column.number_format.format(cell.value)
    if cell.interval:
        text += (
            f" ({column.number_format.format(cell.interval.low)} to {column.number_format.format(cell.interval.high)})"
        )
    if cell.difference:
        text += f"; {cell.difference.value:+.1f}" + (" within noise" if cell.difference.is_noise else "")
    return text + (f"; {cell.ratio:.2f} of LLaVA's" if cell.ratio is not None else "")


def cells(table: ResultTable) -> str:
    """CSV, a line for each cell; a missing row has one line, with its command."""
    file = io.StringIO()
    writer = csv.DictWriter(file, FIELDS, lineterminator="\n")
    writer.writeheader()
    for family, rows in table.blocks.items():
        for line in rows:
            head = {"family": family, "row": line.label, "source": line.source, "about": line.about}
            if line.command:
                writer.writerow({**head, "command": line.command})
            for column, cell in zip(table.columns, line.cells, strict=False):
                if cell:
                    writer.writerow({**head, "column": column.name, **_numbers(cell)})
    return file.getvalue()


def _numbers(cell: Cell) -> dict[str, float | int | None]:
    told: dict[str, float | int | None] = {"value": cell.value, "ratio": cell.ratio}
    if cell.interval:
        told |= {"low": cell.interval.low, "high": cell.interval.high}
    if more := cell.difference:
        told |= {"difference": more.value, "difference_low": more.low, "difference_high": more.high}
        told["noise"] = int(more.is_noise)
    return told


def scorers() -> Scorers:
    """Of all tasks."""
    return {name: task.metrics for name, task in EVALUATION_TASKS.items()}
