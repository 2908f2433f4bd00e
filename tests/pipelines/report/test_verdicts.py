"""Tests of the verdicts: claims agree with the tables of the paper, and outcomes follow from intervals by one rule."""

import csv
from pathlib import Path

import pytest

from jobs.tables import write_tables
from pipelines.evaluation.statistics import Interval
from pipelines.report import verdicts
from pipelines.report.paper import TABLE_1, TABLE_3, TABLE_4, TABLE_5
from pipelines.report.paper_claims import CLAIMS, MARGIN, PaperClaim
from pipelines.report.runs import Family
from pipelines.report.verdicts import Verdict, decide, find_model, judge, judge_claims
from redux.presets import PRESETS
from tests.pipelines.report.test_run_report import Page
from tests.pipelines.report.test_tables import FIND_SCORER, find_families, job_changes, write_run

PRINTED = {"Table 1": TABLE_1, "Table 3": TABLE_3, "Table 4": TABLE_4, "Table 5": TABLE_5}


def find_claim(text: str) -> PaperClaim:
    [claim] = [claim for claim in CLAIMS if claim.text.startswith(text)]
    return claim


GAIN = find_claim("VMTC + CMAI follow more instructions.")
LOSS = find_claim("Down-sampling costs understanding.")
KEPT = find_claim("VMTC + CMAI keep understanding.")
FIGURE = find_claim("Down-sampling by 90 % gives more answers in JSON.")


@pytest.mark.parametrize("claim", CLAIMS, ids=lambda claim: claim.text)
def test_a_claim_agrees_with_the_numbers_of_its_table(claim: PaperClaim) -> None:
    ours, base = claim.rows
    assert ours is not base
    if claim.source == "Figure 2":
        assert claim.effects == {}
        return
    assert claim.source in PRINTED
    for effect in claim.effects.values():
        if claim.kind == "kept":
            assert -MARGIN < effect <= 0
        else:
            assert (effect > 0) == (claim.kind == "gain")


def test_effects_are_those_of_the_papers_text() -> None:
    assert GAIN.effects == {"7B": 9.4, "13B": 9.5}
    assert KEPT.effects == {"7B": -0.4, "13B": 0.0}
    assert LOSS.effects == {"7B": -2.1, "13B": -1.6}
    assert find_claim("CMAI alone follows").effects == {"7B": 3.9}
    assert find_claim("VMTC alone follows").effects == {"7B": 5.2}
    assert (GAIN.smallest_effect, LOSS.smallest_effect, FIGURE.smallest_effect) == (4.7, 0.8, 0.0)


@pytest.mark.parametrize(
    ("claim", "low", "high", "outcome"),
    [
        (GAIN, 0.1, 4.8, "supported"),
        (GAIN, 8.0, 11.0, "supported"),
        (GAIN, -0.1, 4.8, "cannot tell"),
        (GAIN, -3.0, 4.6, "contradicted"),
        (GAIN, 0.5, 1.0, "contradicted"),
        (GAIN, -3.0, -1.0, "contradicted"),
        (LOSS, -3.0, -0.1, "supported"),
        (LOSS, -3.0, 0.1, "cannot tell"),
        (LOSS, -0.7, 0.5, "contradicted"),
        (LOSS, 1.0, 2.0, "contradicted"),
        (KEPT, -0.9, 3.0, "supported"),
        (KEPT, -1.1, 0.2, "cannot tell"),
        (KEPT, -4.0, -1.1, "contradicted"),
        (FIGURE, 0.1, 9.0, "supported"),
        (FIGURE, -0.1, 9.0, "cannot tell"),
        (FIGURE, -9.0, 0.0, "contradicted"),
    ],
)
def test_an_outcome_follows_from_the_interval(claim: PaperClaim, low: float, high: float, outcome: str) -> None:
    interval = Interval((low + high) / 2, low, high)
    assert decide(claim, interval, 2, 30)[0] == outcome
    assert decide(claim, interval, 1, 30) == ("cannot tell", "One seed has no interval over trainings.")
    few = "The interval is over 29 images or questions, and needs 30."
    assert decide(claim, interval, 2, 29) == ("cannot tell", few)


def test_the_paper_cannot_have_shown_its_smallest_effects() -> None:
    smallest = verdicts.find_smallest_paper_effect()
    assert 3 < smallest < 3.5
    for effect in verdicts.analyse_power():
        assert (effect.items > verdicts.PAPER_ITEMS) == (effect.effect < smallest), effect.claim.text
        assert list(effect.seeds.values()) == sorted(effect.seeds.values())


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Runs of LLaVA, of both modules and of CMAI with three seeds, and of VMTC with one."""
    folder = tmp_path_factory.mktemp("runs")
    for seed in (0, 1, 2):
        write_run(folder, f"a{seed}", seed, 0.3, **job_changes(PRESETS["llava"]))
        write_run(folder, f"b{seed}", seed, 0.8, **job_changes(PRESETS["default"]))
        write_run(folder, f"c{seed}", seed, 0.3, **job_changes(PRESETS["cmai"]))
    write_run(folder, "d", 0, 0.8, **job_changes(PRESETS["vmtc"]))
    return folder


@pytest.fixture(scope="module")
def family(runs: Path) -> Family:
    [family] = find_families([runs])[0]
    return family


def judge_text(family: Family, text: str) -> Verdict:
    return judge(find_claim(text), family, samples=400)


def test_runs_are_judged_by_their_answers(family: Family) -> None:
    supported = judge_text(family, "VMTC + CMAI follow more instructions.")
    assert supported.outcome == "supported"
    assert supported.interval
    assert 30 < supported.interval.low < supported.interval.value < supported.interval.high < 70
    assert supported.about == "instructions.strict; 480 items; 3 and 3 seeds"
    assert not supported.needed
    # Equal skill: no gain of half of 3.9 points can be excluded with so few answers, so nothing is claimed.
    equal = judge_text(family, "CMAI alone follows")
    assert equal.outcome in ("cannot tell", "contradicted")
    one_seed = judge_text(family, "VMTC alone follows")
    assert (one_seed.outcome, one_seed.reason) == ("cannot tell", "One seed has no interval over trainings.")
    assert "seeds" in one_seed.needed


def test_a_claim_without_a_run_names_the_command(family: Family) -> None:
    missing = judge_text(family, "Merging follows more")
    assert missing.outcome == "not measured"
    assert missing.command.startswith("redux run ")
    assert missing.needed in ("a run of LWP + MG and LWP", "a run of LWP + MG")


def test_with_exchanged_models_a_gain_is_contradicted(tmp_path: Path) -> None:
    for seed in (0, 1, 2):
        write_run(tmp_path, f"a{seed}", seed, 0.8, **job_changes(PRESETS["llava"]))
        write_run(tmp_path, f"b{seed}", seed, 0.3, **job_changes(PRESETS["default"]))
    [exchanged] = find_families([tmp_path])[0]
    assert judge_text(exchanged, "VMTC + CMAI follow more instructions.").outcome == "contradicted"


def test_of_several_models_the_one_with_defaults_is_judged(tmp_path: Path) -> None:
    write_run(tmp_path, "a", 0, 0.5, **job_changes(PRESETS["llava"]))
    for number, gamma in enumerate((0.2, 0.6, 0.8)):
        write_run(tmp_path, f"b{number}", 0, 0.5, model__vmtc=None, model__cmai={"gamma_max": gamma})
    [family] = find_families([tmp_path])[0]
    model = find_model(family, find_claim("CMAI alone follows").rows[0])
    assert model
    assert model.methods.cmai
    assert model.methods.cmai.gamma_max == 0.6


def test_the_page_and_the_text_show_each_verdict(runs: Path, family: Family, tmp_path: Path) -> None:
    text = write_tables([runs], tmp_path / "out", FIND_SCORER, samples=400)
    [judged] = judge_claims([family], samples=400)
    assert len(judged.measured) + len(judged.missing) == len(CLAIMS)
    assert "## Claims of the paper" in text
    page = Page((tmp_path / "out" / "tables.html").read_text())
    for verdict in judged.measured:
        assert verdict.claim.text in text
        assert verdict.claim.text in page.words
        assert verdict.reason in page.words
    lines = list(csv.DictReader((tmp_path / "out" / "claims.csv").read_text().splitlines()))
    assert [line["outcome"] for line in lines] == [verdict.outcome for verdict in (*judged.measured, *judged.missing)]
    commands = {line["claim"]: line["command"] for line in lines}
    for verdict in judged.missing:
        assert commands[verdict.claim.text] == verdict.command
        assert verdict.claim.text in page.words
        assert f"| {verdict.claim.text} |" not in text


def test_without_llava_or_a_pair_of_rows_there_is_no_section(tmp_path: Path) -> None:
    write_run(tmp_path / "runs", "a", 0, 0.5, **job_changes(PRESETS["evit"]))
    text = write_tables([tmp_path / "runs"], tmp_path / "out", FIND_SCORER, samples=400)
    assert "Claims of the paper" not in text
    assert "Claims of the paper" not in (tmp_path / "out" / "tables.html").read_text()
