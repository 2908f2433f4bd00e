"""Write the paper's tables over finished runs (`redux tables`) as Markdown, CSV and one HTML page.

A CSV file has one line per cell, so that a program finds each number and its interval in separate columns.
"""

import csv
import io
from collections.abc import Iterator, Sequence
from pathlib import Path

from jobs.layout import require_folder
from pipelines.evaluation.tasks import RESERVED_NAMES, find_task
from pipelines.report import comparison, page
from pipelines.report.columns import Column
from pipelines.report.runs import Scorer, ScorerFinder, group_families, read_finished_runs
from pipelines.report.tables import (
    Cell,
    ResultRow,
    ResultTable,
    build_tables,
    compare_prompts,
    drop_empty_columns,
    keep_filled,
)
from pipelines.report.variants import VariantCell, VariantTable, compare_variants
from pipelines.report.verdicts import FamilyVerdicts, Verdict, judge_claims

CSV_FIELDS = (
    "family", "row", "source", "about", "column", "value", "low", "high",
    "difference", "difference_low", "difference_high", "noise", "ratio", "command",
)  # fmt: skip


CLAIM_FIELDS = (
    "family", "source", "claim", "value", "low", "high", "outcome", "reason", "about", "needed", "command",
)  # fmt: skip


def write_tables(
    runs: Sequence[Path],
    out: Path | None,
    find_scorer: ScorerFinder,
    samples: int = 10_000,
    lists_missing: bool = False,
) -> str:
    """Write the tables over runs.

    Args:
        runs: folders of runs, or folders that hold such folders.
        out: folder for Markdown, HTML and CSV files; None writes no files.
        find_scorer: finds the functions that score the answers of a task.
        samples: draws of each bootstrap.
        lists_missing: list rows of the paper's tables without a run, each with its command.

    Returns:
        The tables as Markdown.

    Raises:
        ValueError: there is no finished run, or `out` is a file.
    """
    # Found before the bootstrap, which takes long.
    for run in runs:
        require_folder(run, "RUN", "the folder of a run, or a folder that holds run folders")
    if out and out.exists() and not out.is_dir():
        raise ValueError(f"--out: got {out}, which is a file, allowed: a folder")
    finished, notes = read_finished_runs(runs, find_scorer)
    variants = compare_variants(finished, samples)
    families = group_families(finished, notes)
    tables = build_tables(families, samples)
    # Files have all tables; the text has what is filled, or also the rows that lack a run.
    if lists_missing:
        printed_tables = [drop_empty_columns(table) for table in tables]
    else:
        printed_tables = [filled for table in tables if (filled := keep_filled(table)).blocks]
    verdicts = judge_claims(families, samples)
    text = format_markdown(printed_tables, [*comparison.write_summary(tables), *notes], variants, verdicts)
    if out:
        scorer = find_scorer("instructions")
        prompt_plots = {family.label: compare_prompts(family, scorer) for family in families} if scorer else {}
        out.mkdir(parents=True, exist_ok=True)
        page.write(out / "tables.md", text)
        page.write(out / "tables.html", comparison.render(tables, notes, prompt_plots, variants, verdicts))
        if verdicts:
            page.write(out / "claims.csv", format_claims_csv(verdicts))
        for table in tables:
            page.write(out / f"{table.key}.csv", format_csv(table))
    return text


def _format_variants(table: VariantTable) -> str:
    """Format the comparison of own variants as Markdown."""
    lines = ["## Variants", "", "| | " + " | ".join(column.title for column in table.columns) + " |"]
    lines.append("|---|" + "---:|" * len(table.columns))
    for variant, cells in zip(table.variants, table.cells, strict=True):
        texts = (variant.label, *(_format_variant_cell(cell) for cell in cells))
        lines.append("| " + " | ".join(text.replace("|", "\\|") for text in texts) + " |")
    return "\n".join(lines)


def _format_variant_cell(cell: VariantCell | None) -> str:
    if cell is None:
        return ""
    text = f"{cell.value:.1f}"
    if cell.interval:
        text += f" ({cell.interval.low:.1f} to {cell.interval.high:.1f})"
    if cell.difference:
        text += f"; {cell.difference.value:+.1f}" + (" within noise" if cell.difference.is_noise else "")
    return text


def _format_verdicts(verdicts: Sequence[FamilyVerdicts]) -> Iterator[str]:
    """Format the verdicts of each family as Markdown; claims without a measurement are counted."""
    yield "## Claims of the paper"
    for family in verdicts:
        if len(verdicts) > 1:
            yield f"**{family.label}**"
        lines = ["| | claim | paper | measured | verdict |", "|---|---|---:|---:|---|"]
        lines += ["| " + " | ".join(_format_verdict(verdict)) + " |" for verdict in family.measured]
        yield "\n".join(lines)
        if family.missing:
            yield f"{len(family.missing)} further claims have no run; claims.csv has the commands."


def _format_verdict(verdict: Verdict) -> Iterator[str]:
    claim, interval = verdict.claim, verdict.interval
    assert interval
    effects = ", ".join(f"{effect:+.1f} ({size})" for size, effect in claim.effects.items())
    yield claim.source
    yield claim.text.replace("|", "\\|")
    yield effects
    yield f"{interval.value:+.1f} ({interval.low:+.1f} to {interval.high:+.1f})"
    yield f"{verdict.outcome}: {verdict.reason}" + (f" Needed: {verdict.needed}." if verdict.needed else "")


def format_markdown(
    tables: Sequence[ResultTable],
    notes: Sequence[str],
    variants: VariantTable | None = None,
    verdicts: Sequence[FamilyVerdicts] = (),
) -> str:
    """Format each table as Markdown, with the commands of missing rows below it."""
    parts = [*notes, *([_format_variants(variants)] if variants else [])]
    parts += _format_verdicts(verdicts) if verdicts else []
    for table in tables:
        parts.append(f"## {table.title}")
        for family, rows in table.blocks.items():
            # A single family needs no heading.
            parts += [f"**{family}**"] if len(table.blocks) > 1 else []
            parts.append("\n".join(_format_rows(table.columns, rows)))
            if commands := [row.command for row in rows if row.command]:
                parts.append("Missing:\n\n" + "\n".join(f"    {command}" for command in commands))
        parts += [f"- {note}" for note in table.notes]
    return "\n\n".join(parts) + "\n"


def _format_rows(columns: Sequence[Column], rows: Sequence[ResultRow]) -> Iterator[str]:
    yield "| | | " + " | ".join(column.name for column in columns) + " |"
    yield "|---|---|" + "---:|" * len(columns)
    for row in rows:
        texts = [_format_cell(column, cell) for column, cell in zip(columns, row.cells, strict=False)]
        texts += [""] * (len(columns) - len(texts))
        yield "| " + " | ".join(text.replace("|", "\\|") for text in (row.label, row.about, *texts)) + " |"


def _format_cell(column: Column, cell: Cell | None) -> str:
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


def format_claims_csv(verdicts: Sequence[FamilyVerdicts]) -> str:
    """Format all verdicts as CSV with one line per claim, with the command of a missing run."""
    file = io.StringIO()
    writer = csv.DictWriter(file, CLAIM_FIELDS, lineterminator="\n")
    writer.writeheader()
    for family in verdicts:
        for verdict in (*family.measured, *family.missing):
            interval = verdict.interval
            numbers = {"value": interval.value, "low": interval.low, "high": interval.high} if interval else {}
            head = {"family": family.label, "source": verdict.claim.source, "claim": verdict.claim.text}
            texts = {name: getattr(verdict, name) for name in ("outcome", "reason", "about", "needed", "command")}
            writer.writerow(head | numbers | texts)
    return file.getvalue()


def format_csv(table: ResultTable) -> str:
    """Format a table as CSV with one line per cell; a missing row has one line with its command."""
    file = io.StringIO()
    writer = csv.DictWriter(file, CSV_FIELDS, lineterminator="\n")
    writer.writeheader()
    for family, rows in table.blocks.items():
        for row in rows:
            head = {"family": family, "row": row.label, "source": row.source, "about": row.about}
            if row.command:
                writer.writerow({**head, "command": row.command})
            for column, cell in zip(table.columns, row.cells, strict=False):
                if cell:
                    writer.writerow({**head, "column": column.name, **_list_numbers(cell)})
    return file.getvalue()


def _list_numbers(cell: Cell) -> dict[str, float | int | None]:
    numbers: dict[str, float | int | None] = {"value": cell.value, "ratio": cell.ratio}
    if cell.interval:
        numbers |= {"low": cell.interval.low, "high": cell.interval.high}
    if difference := cell.difference:
        numbers |= {
            "difference": difference.value,
            "difference_low": difference.low,
            "difference_high": difference.high,
            "noise": int(difference.is_noise),
        }
    return numbers


def find_scorer(name: str) -> Scorer | None:
    """Find the scorer of a task of any name; None for files of answers that belong to no task."""
    return None if name in RESERVED_NAMES else find_task(name).metrics
