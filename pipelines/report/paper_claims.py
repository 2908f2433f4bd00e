"""Claims of the paper as data: which row is better than which, in which column, and where the paper says so.

Source: arXiv 2411.15453, Tables 1, 3, 4 and 5, Figure 2, and the text beside them. Effects are differences of the
paper's own numbers (`paper.py`). Understanding is GQA in the paper. A study without GQA is judged by easy-VQA.
"""

from dataclasses import dataclass
from typing import Literal

from pipelines.report import paper
from pipelines.report.table_rows import LLAVA_ROW, TABLE_ROWS, TableRow, make_spd_rows

SIZES = ("7B", "13B")

Measure = Literal["following", "understanding", "json", "keywords"]

SOURCES_BY_MEASURE: dict[Measure, tuple[str, ...]] = {
    "following": ("instructions.strict",),
    "understanding": ("gqa.accuracy", "easy_vqa.accuracy"),
    "json": ("instructions.strict.json",),
    "keywords": ("instructions.strict.keywords",),
}
"""Metrics by which a measure is judged; the first that both models have."""

PAPER_COLUMNS: dict[Measure, tuple[str, ...]] = {"following": ("AVG", "IF"), "understanding": ("GQA",)}

MARGIN = 1.0
"""Largest loss, in points, that counts as none. The losses that the paper calls slight are at most 0.4 points."""


@dataclass(frozen=True)
class PaperClaim:
    """A claim of the paper.

    Args:
        source: table or figure.
        text: the claim in a sentence.
        ours: label of the row that the claim is about, in `table_rows`.
        base: label of the row with which it is compared.
        measure: what is compared.
        kind: "gain" if `ours` has more, "loss" if it has less, "kept" if it has no less.
    """

    source: str
    text: str
    ours: str
    base: str
    measure: Measure
    kind: Literal["gain", "loss", "kept"]

    @property
    def rows(self) -> tuple[TableRow, TableRow]:
        """The two rows: that of the claim, and that with which it is compared."""
        rows_by_label = {row.label: row for row in self._list_rows()}
        return rows_by_label[self.ours], rows_by_label[self.base]

    def _list_rows(self) -> tuple[TableRow, ...]:
        return (LLAVA_ROW, *make_spd_rows()) if self.table == "figure-2" else TABLE_ROWS[self.table]

    @property
    def table(self) -> str:
        """Key of the table in `paper.TABLES`, or "figure-2"."""
        return self.source.lower().replace(" ", "-")

    @property
    def effects(self) -> dict[str, float]:
        """Differences of the paper's numbers in points, by model size; empty if the paper prints none."""
        printed = paper.TABLES.get(self.table)
        if printed is None:
            return {}
        result = {}
        # Tables 3 to 5 have one size.
        for size in SIZES if self.table == "table-1" else SIZES[:1]:
            names = [str(row.paper).format(size=size) for row in self.rows]
            columns = [column for column in PAPER_COLUMNS[self.measure] if column in printed.columns]
            ours, base = (printed.cell(name, columns[0]) for name in names)
            assert ours is not None
            assert base is not None
            result[size] = round(ours - base, 2)
        return result

    @property
    def smallest_effect(self) -> float:
        """Half of the smaller of the paper's effects, in points, without its sign; 0 if the paper prints none."""
        return min((abs(effect) for effect in self.effects.values()), default=0.0) / 2


_LLAVA, _BOTH = "LLaVA-1.5", "VMTC + CMAI"

CLAIMS = (
    PaperClaim("Figure 2", "Down-sampling by 90 % gives more answers in JSON.", "SPD 90%", _LLAVA, "json", "gain"),
    PaperClaim(
        "Figure 2", "Down-sampling by 90 % gives more answers with keywords.", "SPD 90%", _LLAVA, "keywords", "gain"
    ),
    PaperClaim("Figure 2", "Down-sampling by 90 % costs understanding.", "SPD 90%", _LLAVA, "understanding", "loss"),
    PaperClaim("Table 1", "Down-sampling follows more instructions.", "SPD", _LLAVA, "following", "gain"),
    PaperClaim("Table 1", "Down-sampling costs understanding.", "SPD", _LLAVA, "understanding", "loss"),
    PaperClaim("Table 1", "VMTC + CMAI follow more instructions.", _BOTH, _LLAVA, "following", "gain"),
    PaperClaim("Table 1", "VMTC + CMAI keep understanding.", _BOTH, _LLAVA, "understanding", "kept"),
    PaperClaim(
        "Table 1", "VMTC + CMAI follow more instructions than down-sampling.", _BOTH, "SPD", "following", "gain"
    ),
    PaperClaim(
        "Table 1", "A caption in place of the image follows more than VMTC + CMAI.", "Upper limit", _BOTH,
        "following", "gain",
    ),
    PaperClaim(
        "Table 1", "A caption in place of the image costs understanding.", "Upper limit", _LLAVA,
        "understanding", "loss",
    ),
    PaperClaim("Table 3", "VMTC alone follows more instructions.", "VMTC", "neither", "following", "gain"),
    PaperClaim("Table 3", "CMAI alone follows more instructions.", "CMAI", "neither", "following", "gain"),
    PaperClaim("Table 3", "VMTC alone keeps understanding.", "VMTC", "neither", "understanding", "kept"),
    PaperClaim("Table 3", "CMAI alone keeps understanding.", "CMAI", "neither", "understanding", "kept"),
    PaperClaim("Table 3", "Both follow more than VMTC alone.", _BOTH, "VMTC", "following", "gain"),
    PaperClaim("Table 4", "VMTC adds to CMAI.", "LWP + MG + CLST", "no VMTC", "following", "gain"),
    PaperClaim(
        "Table 4", "Pruning layer by layer follows more than in the last layer.", "LWP", "LLP", "following", "gain"
    ),
    PaperClaim(
        "Table 4", "Pruning layer by layer understands more than in the last layer.", "LWP", "LLP",
        "understanding", "gain",
    ),
    PaperClaim("Table 4", "Merging follows more than pruning.", "LWP + MG", "LWP", "following", "gain"),
    PaperClaim("Table 4", "Merging understands more than pruning.", "LWP + MG", "LWP", "understanding", "gain"),
    PaperClaim(
        "Table 4", "Clusters follow more than one merged token.", "LWP + MG + CLST", "LWP + MG", "following", "gain"
    ),
    PaperClaim(
        "Table 4", "Clusters understand more than one merged token.", "LWP + MG + CLST", "LWP + MG",
        "understanding", "gain",
    ),
    PaperClaim("Table 5", "CMAI adds to VMTC.", "Neighbourhood", "no CMAI", "following", "gain"),
    PaperClaim(
        "Table 5", "The focus score of eq. 11 adds more than text-to-image attention.", "Neighbourhood", "TIA",
        "following", "gain",
    ),
    PaperClaim(
        "Table 5", "The focus score of eq. 11 adds more than the sum of this attention.", "Neighbourhood", "Sum TIA",
        "following", "gain",
    ),
    PaperClaim(
        "Table 5", "The focus score of eq. 11 adds more than a discounted sum of it.", "Neighbourhood",
        "Discounted Sum TIA", "following", "gain",
    ),
    PaperClaim(
        "Table 5", "A discounted sum costs understanding.", "Discounted Sum TIA", "no CMAI", "understanding", "loss"
    ),
)  # fmt: skip
"""The claims, in the order of the paper's figures and tables."""
