"""Tests of the paper's numbers: relations between them that a typing error would break."""

import pytest

from pipelines.report.paper import TABLE_1, TABLE_2, TABLE_3, TABLE_4, TABLE_5, TABLES, TASK_TITLES, PaperTable

QUESTIONS = 218


def test_the_average_of_table_1_is_the_mean_of_its_sixteen_tasks() -> None:
    assert len(TABLE_1.rows) == 8
    for name, (_, *tasks, average) in TABLE_1.rows.items():
        assert len(tasks) == len(TASK_TITLES) == 16
        # Printed tasks are off by 0.05 at most, and so is their mean.
        assert sum(task for task in tasks if task is not None) / 16 == pytest.approx(average, abs=0.1), name


def test_tasks_are_shares_of_218_questions_all_but_five() -> None:
    values = [task for _, *tasks, _ in TABLE_1.rows.values() for task in tasks if task is not None]
    shares = {f"{100 * right / QUESTIONS:.1f}" for right in range(QUESTIONS + 1)}
    assert len(values) == 128
    assert len([value for value in values if f"{value:.1f}" not in shares]) == 5


@pytest.mark.parametrize("table", TABLES.values(), ids=TABLES)
def test_every_row_has_a_number_or_a_dash_for_each_column(table: PaperTable) -> None:
    assert {len(values) for values in table.rows.values()} == {len(table.columns)}
    for values in table.rows.values():
        for column, value in zip(table.columns, values, strict=True):
            assert value is None or (1000 < value < 2000 if column == "MME" else 0 < value <= 100)


def test_rows_that_are_the_same_model_have_the_same_numbers() -> None:
    assert TABLE_3.rows["CMAI"] == TABLE_4.rows["none"]
    assert TABLE_3.rows["VMTC, CMAI"] == TABLE_4.rows["LWP, MG, CLST"]
    both, vmtc = TABLE_5.rows["Ours"], TABLE_5.rows["No CMAI"]
    assert both == pytest.approx(TABLE_3.rows["VMTC, CMAI"], abs=0.05)
    assert vmtc == pytest.approx(TABLE_3.rows["VMTC"], abs=0.05)
    for size in ("7B", "13B"):
        for name in (f"LLaVA-1.5-{size}", f"Ours-{size}"):
            assert TABLE_1.cell(name, "AVG") == TABLE_2.cell(name, "IF")
            assert TABLE_1.cell(name, "GQA") == TABLE_2.cell(name, "GQA")


def test_what_the_paper_contradicts_is_as_printed_and_noted() -> None:
    assert TABLE_2.cell("Ours-7B", "MME") == TABLE_3.cell("CMAI", "MME") != TABLE_3.cell("VMTC, CMAI", "MME")
    assert any("1518.5" in note and "1515.8" in note for note in TABLE_2.notes)
    assert TABLE_1.cell("Ours-7B", "AVG") != TABLE_3.cell("VMTC, CMAI", "IF")
    assert any("44.1" in note and "44.2" in note for note in TABLE_1.notes)
    assert any("48.68" in note for note in TABLE_1.notes)


def test_the_gains_that_the_text_names_follow() -> None:
    def gain(table: PaperTable, row: str, base: str, column: str) -> float:
        after, before = table.cell(row, column), table.cell(base, column)
        assert after is not None
        assert before is not None
        return round(after - before, 1)

    assert [gain(TABLE_1, f"SPD-{size}", f"LLaVA-1.5-{size}", "AVG") for size in ("7B", "13B")] == [3.7, 5.3]
    assert [gain(TABLE_1, f"SPD-{size}", f"LLaVA-1.5-{size}", "GQA") for size in ("7B", "13B")] == [-2.1, -1.6]
    assert [gain(TABLE_1, f"Ours-{size}", f"LLaVA-1.5-{size}", "AVG") for size in ("7B", "13B")] == [9.4, 9.5]
    assert [gain(TABLE_1, f"Upper Limit-{size}", f"Ours-{size}", "AVG") for size in ("7B", "13B")] == [5.5, 6.5]
    assert [gain(TABLE_3, row, "neither", "IF") for row in ("VMTC", "CMAI", "VMTC, CMAI")] == [5.2, 3.9, 9.5]
    assert gain(TABLE_4, "LWP, MG, CLST", "none", "IF") == 5.6
    assert [gain(TABLE_5, row, "No CMAI", "IF") for row in ("+ TIA", "+ Sum TIA", "Ours")] == [0.6, 3.0, 4.3]
    assert [gain(TABLE_2, "Ours-7B", "LLaVA-1.5-7B", column) for column in ("VQAv2", "GQA", "TextVQA")] == [
        -0.1, -0.4, -0.4,
    ]  # fmt: skip
    assert [gain(TABLE_2, "Ours-7B", "LLaVA-1.5-7B", column) for column in ("MME", "MMB")] == [7.8, 1.8]


def test_a_row_or_column_that_is_not_there_has_no_number() -> None:
    assert TABLE_2.cell("Shikra", "IF") is None
    assert TABLE_2.cell("Shikra", "T1") is None
    assert TABLE_2.cell("nobody", "IF") is None
