"""Tests of the page of a search: front and dominating trials follow their definitions, any study has a page."""

import csv
import itertools
import math
import random
import warnings
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import optuna
import pytest
from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.exceptions import ExperimentalWarning
from optuna.study import Study
from optuna.trial import FrozenTrial, TrialState

from pipelines.search import search_page, search_plots
from pipelines.search.snapshot import Snapshot, format_parameter
from tests.pipelines.report.test_run_report import ATTACK, Page

UP, DOWN = "maximize", "minimize"
RATE = FloatDistribution(1e-4, 1e-2, log=True)
TOKENS = IntDistribution(8, 48)
SCHEDULE = CategoricalDistribution(["constant", "linear", "cosine"])


def trial(values: Sequence[float] | None = None, state: str = "COMPLETE", **changes: Any) -> FrozenTrial:
    """Make a trial: `params` are {name: (value, distribution)}, `constraints` as in Optuna, others are `user_attrs`."""
    params, constraints = changes.pop("params", {}), changes.pop("constraints", None)
    return optuna.trial.create_trial(
        state=TrialState[state],
        values=values,
        params={name: value for name, (value, _) in params.items()},
        distributions={name: distribution for name, (_, distribution) in params.items()},
        constraints=constraints,
        user_attrs=changes,
    )


def study(directions: Sequence[str], trials: Iterable[FrozenTrial] = (), names: Sequence[str] = ()) -> Study:
    made = optuna.create_study(study_name="a search", directions=list(directions))
    if names or len(directions) > 1:
        name(made, list(names) or [f"score.{place}" for place in range(len(directions))])
    made.add_trials(trials)
    return made


def name(made: Study, objectives: list[str]) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ExperimentalWarning)  # Optuna has no other way to name them
        made.set_metric_names(objectives)


def scattered(seed: int, directions: Sequence[str], count: int = 30) -> Study:
    """Make trials with many equal values; some are infeasible, incomplete or references."""
    drawn = random.Random(seed)
    trials = []
    for number in range(count):
        attributes: dict[str, Any] = {"reference": f"reference {number}"} if drawn.random() < 0.2 else {}
        if drawn.random() < 0.5:
            attributes["constraints"] = {"flops <= 2e8": drawn.choice([-1.0, 0.0, 1.0]), "size <= 1": -1.0}
        if drawn.random() < 0.2:
            trials.append(trial(state=drawn.choice(["FAIL", "RUNNING", "WAITING"]), **attributes))
        else:
            trials.append(trial([float(drawn.randrange(6)) for _ in directions], **attributes))
    return study(directions, trials)


def dominates(one: FrozenTrial, other: FrozenTrial, directions: Sequence[str]) -> bool:
    """Compare two trials by the definition, objective by objective."""
    better = [a > b if way == UP else a < b for a, b, way in zip(one.values, other.values, directions, strict=True)]
    worse = [a < b if way == UP else a > b for a, b, way in zip(one.values, other.values, directions, strict=True)]
    return any(better) and not any(worse)


def candidates(made: Study) -> list[FrozenTrial]:
    return [
        each for each in made.trials
        if each.state == TrialState.COMPLETE and all(value <= 0 for value in each.constraints.values())
    ]  # fmt: skip


def ordered(trials: Sequence[FrozenTrial], directions: Sequence[str]) -> bool:
    firsts = [each.values[0] for each in trials]
    return firsts == sorted(firsts, reverse=directions[0] == UP)


def read(made: Study, folder: Path) -> Page:
    return Page(search_page.write_page(made, folder).read_text(encoding="utf-8"))


DIRECTIONS = [ways for count in (1, 2, 3) for ways in itertools.product((UP, DOWN), repeat=count)]


@pytest.mark.parametrize("directions", DIRECTIONS, ids="-".join)
def test_the_front_is_what_no_feasible_trial_dominates(directions: Sequence[str]):
    for seed in range(8):
        made = scattered(seed, directions)
        allowed = candidates(made)
        expected = {each.number for each in allowed if not any(dominates(one, each, directions) for one in allowed)}
        found = search_page.find_front(made)
        assert {each.number for each in found} == expected
        assert len(found) == len(expected)
        assert ordered(found, directions)


@pytest.mark.parametrize("directions", DIRECTIONS, ids="-".join)
def test_trials_that_dominate_a_reference_are_found_by_its_name(directions: Sequence[str]):
    compared = 0
    for seed in range(8):
        made = scattered(seed, directions)
        for reference in made.trials:
            called = reference.user_attrs.get("reference")
            if called and reference.state == TrialState.COMPLETE:
                found = search_page.find_dominating(made, called)
                expected = {each.number for each in candidates(made) if dominates(each, reference, directions)}
                assert {each.number for each in found} == expected
                assert ordered(found, directions)
                compared += 1
    assert compared > 10


def test_a_reference_without_values_is_refused_by_name():
    made = study([UP], [trial([1.0], reference="paper"), trial(state="FAIL", reference="llava")])
    with pytest.raises(ValueError, match=r"a search: got 'llava', allowed: .*\(paper\)"):
        search_page.find_dominating(made, "llava")
    with pytest.raises(ValueError, match="none yet"):
        search_page.find_dominating(study([UP]), "paper")


def test_of_a_reference_that_was_run_again_the_last_counts():
    trials = [trial([0.9], reference="paper"), trial([0.5], reference="paper"), trial([0.7])]
    assert [each.number for each in search_page.find_dominating(study([UP], trials), "paper")] == [0, 2]


def searched(count: int = 40) -> list[FrozenTrial]:
    """Make a search with a decisive, an irrelevant and a conditional parameter, and trials of every state."""
    drawn, trials = random.Random(0), []
    for number in range(count):
        tokens, rate, schedule = drawn.randint(8, 48), 10 ** drawn.uniform(-4, -2), drawn.choice(SCHEDULE.choices)
        params = {"model.tokens": (tokens, TOKENS), "train.rate": (rate, RATE), "model.schedule": (schedule, SCHEDULE)}
        if schedule == "linear":
            params["model.slope"] = (drawn.uniform(0, 1), FloatDistribution(0, 1))
        ended: dict[str, Any] = {"params": params, "steps": 600, "wall_s": 100.5 + number}
        if number % 8 == 3:
            trials.append(trial(state="PRUNED", step=200, **ended))
        elif number % 8 == 6:
            trials.append(trial(state="FAIL", step=100, error="RuntimeError: out of memory\n  at last", **ended))
        else:
            values = [1 - 4 / tokens, 4e6 * tokens]
            metrics = {"score.0": values[0], "easy_vqa.questions": 9673, "wall_s": 1.0, "loss": 1 / 3}
            over = {"flops <= 1.6e8": values[1] - 1.6e8}
            trials.append(trial(values, step=600, constraints=over, metrics=metrics, **ended))
    trials.append(trial([0.8, 1e8], reference="paper", constraints={"flops <= 1.6e8": -6e7}, metrics={"loss": 0.25}))
    trials.append(trial(state="RUNNING", retry_of=6, steps=600, step=10))
    trials.append(trial(state="WAITING"))
    return trials


def test_the_table_reads_back_to_the_same_numbers(tmp_path: Path):
    made = study([UP, DOWN], searched(), ["score.0", "flops"])
    search_page.write_page(made, tmp_path)
    with (tmp_path / "trials.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == len(made.trials)
    assert list(rows[0]) == [
        "number", "state", "reference", "retry_of", "score.0", "flops", "flops <= 1.6e8", "easy_vqa.questions", "loss",
        "model.schedule", "model.slope", "model.tokens", "train.rate", "step", "steps", "wall_s", "error",
    ]  # fmt: skip
    for row, each in zip(rows, made.trials, strict=True):
        sentences = dict(zip(["score.0", "flops"], each.values or [], strict=bool(each.values)))
        sentences |= each.constraints | each.params | {"number": each.number, "state": each.state.name}
        sentences |= {name: value for name, value in each.user_attrs.items() if name != "metrics"}
        sentences |= {
            k: v for k, v in each.user_attrs.get("metrics", {}).items() if k in ("loss", "easy_vqa.questions")
        }
        assert {name: type(sentences[name])(text) for name, text in row.items() if text} == sentences


def test_a_trial_that_did_not_end_has_no_objective_in_the_table(tmp_path: Path):
    """Optuna keeps the last reported value of a pruned trial as its value."""
    search_page.write_page(study([UP], [trial([0.4], state="PRUNED", metrics={"score": 0.4})], ["score"]), tmp_path)
    assert (tmp_path / "trials.csv").read_text().splitlines()[1] == "0,PRUNED,,,,,,,"


def test_the_summary_counts_what_became_of_the_trials():
    sentences = search_page.summarize_search(study([UP, DOWN], searched(), ["score.0", "flops"]))
    assert sentences[0] == (
        "43 trials: 31 completed, 5 stopped early, 5 failed, 1 running and 1 waiting. "
        "Among them: 1 retry of a crashed trial and 1 reference."
    )
    assert sentences[-2] == (
        "All trials took 1 h 18 min in total. Early stopping saved 2,000 of 24,000 planned training steps, 8 %."
    )
    assert "has not used" in sentences[-1]


def test_the_summary_names_the_best_and_what_beats_a_reference():
    trials = [trial([value]) for value in (0.5, 0.9, 0.7)]
    trials += [trial([0.6], reference="paper"), trial([0.95], reference="llava"), trial(state="FAIL", reference="spd")]
    sentences = search_page.summarize_search(study([UP], trials, ["accuracy"]))
    assert "Best: llava with accuracy 0.95." in sentences
    assert "Reference paper (accuracy 0.6): 3 trials are better: llava, trial 1 and trial 2." in sentences
    assert "Reference llava (accuracy 0.95): no trial is better." in sentences
    assert "Reference spd has no values yet." in sentences


def test_the_summary_counts_the_front_and_leaves_out_what_breaks_a_constraint():
    trials = [trial([0.9, 3.0]), trial([0.8, 2.0]), trial([0.7, 2.5]), trial([0.7, 3.0], reference="paper")]
    broken = trial([1.0, 1.0], constraints={"size <= 1": 2.0})
    sentences = search_page.summarize_search(study([UP, DOWN], [*trials, broken], ["accuracy", "flops"]))
    assert sentences[1].startswith("2 of 4 trials are on the front")
    assert sentences[1].endswith("1 completed trial is outside the constraints (size <= 1).")
    assert "Reference paper (accuracy 0.7, flops 3): 3 trials dominate it: trial 0, trial 1 and trial 2." in sentences


EMPTY = trial(state="WAITING")
FORKED = [{"kind": ("a", CategoricalDistribution(["a", "b"]))}, {"kind": (3, IntDistribution(0, 5))}]
EDGES = {
    "nothing": ([UP, DOWN], []),
    "nothing done": ([UP], [EMPTY, trial(state="RUNNING"), trial(state="FAIL"), trial(state="PRUNED", steps=9)]),
    "one trial": ([DOWN], [trial([0.5], params={"a": (1, IntDistribution(1, 9))})]),
    "one parameter": ([UP], [trial([n / 9], params={"a": (n, IntDistribution(0, 99))}) for n in range(30)]),
    "one value": ([UP, UP], [trial([1.0, 1.0], params={"a": (n, TOKENS)}) for n in range(8, 28)]),
    "one choice": ([UP], [trial([n / 9], params={"a": ("x", CategoricalDistribution(["x"]))}) for n in range(20)]),
    "three objectives": ([UP, DOWN, UP], [trial([n, n % 5, n % 7], params={"a": (n, TOKENS)}) for n in range(8, 40)]),
    "five objectives": ([DOWN] * 5, [trial([n % 3] * 5) for n in range(12)]),
    "all infeasible": ([UP, DOWN], [trial([n, n], constraints={"a": 1.0}) for n in range(5)]),
    "references alone": ([UP, DOWN], [trial([n, n], reference=f"setting {n}") for n in range(5)]),
    "a parameter of two kinds": ([UP], [trial([n], params=FORKED[n % 2]) for n in range(24)]),
    "values far apart": ([UP, DOWN], [trial([10.0**n, 10.0**-n], params={"a": (8, TOKENS)}) for n in range(20)]),
    "infinite": ([UP, DOWN], [trial([math.inf, 1.0], params={"a": (8, TOKENS)}), trial([1.0, 2.0])]),
    "negative": ([DOWN, DOWN], [trial([-n, -n * n], params={"a": (9, TOKENS)}) for n in range(4)]),
}


@pytest.mark.parametrize("edge", EDGES)
def test_any_study_makes_a_page(edge: str, tmp_path: Path):
    directions, trials = EDGES[edge]
    page = read(study(directions, trials), tmp_path / "new")
    ids = [attributes["id"] for _, attributes in page.tags if "id" in attributes]
    assert [name for name, count in Counter(ids).items() if count > 1] == []
    assert all(drawn.get("role") == "img" and drawn.get("aria-label") for drawn in page.attributes("svg"))
    assert all(attributes.get("scope") in ("row", "col") for attributes in page.attributes("th"))
    assert len([row for row in page.rows if row and row[0][:1].isdigit()]) == len(trials)
    assert sorted(file.name for file in (tmp_path / "new").iterdir()) == ["search.html", "trials.csv"]


@pytest.mark.parametrize(("objectives", "plots"), [(1, 1), (2, 1 + 2), (3, 2 + 3), (6, 3 + 6)])
def test_the_first_objective_is_drawn_against_three_others_at_most(objectives: int, plots: int, tmp_path: Path):
    page = read(study([UP] * objectives, [trial([n] * objectives) for n in range(3)]), tmp_path)
    assert len(page.attributes("svg")) == plots


def test_the_page_lists_the_front_first_and_says_how_trials_ended(tmp_path: Path):
    made = study([UP, DOWN], searched(), ["score.0", "flops"])
    page = read(made, tmp_path)
    rows = {row[0]: row[1] for row in page.rows if row and row[0][:1].isdigit()}
    best = [each.number for each in search_page.find_front(made)]
    others = [each.number for each in made.trials if each.number not in best]
    assert list(rows) == [str(number) for number in best + others]
    assert rows["3"] == "stopped early at step 200 of 600"
    assert rows["6"] == "failed at step 100 of 600, retried as 41"
    assert rows["41"] == "running at step 10 of 600"
    assert rows["42"] == "waiting"
    table = page.words[page.words.rindex("All trials") : page.words.index("How to read it")]
    broken = sum(value > 0 for each in made.trials for value in each.constraints.values())
    sentences = {"on the front": len(best), "out of memory": 5, "retry of 6": 1, "paper": 1, "exceeded by": broken}
    assert {words: table.count(words) for words in sentences} == sentences


def test_texts_are_escaped_and_none_is_read_as_a_formula(tmp_path: Path):
    odd = f"{ATTACK}$\\frac$"
    made = optuna.create_study(study_name=odd, directions=[UP, DOWN])
    name(made, [odd, odd + "2"])
    choices = CategoricalDistribution([odd, "b"])
    params = [{odd: (choices.choices[n % 2], choices)} for n in range(24)]
    made.add_trials(trial([n % 5, n], params=params[n], constraints={odd: -1.0}) for n in range(24))
    made.add_trials([trial([2, 3], reference=odd), trial(state="FAIL", error=odd), trial(state="FAIL", reference=odd)])
    page = read(made, tmp_path)
    assert "script" not in {tag for tag, _ in page.tags}
    assert page.words.count(ATTACK) >= 20


def test_the_same_study_gives_the_same_bytes(tmp_path: Path):
    written = []
    for place in ("one", "other"):
        search_page.write_page(study([UP, DOWN], searched(), ["score.0", "flops"]), tmp_path / place)
        written.append([(tmp_path / place / name).read_bytes() for name in ("search.html", "trials.csv")])
    assert written[0] == written[1]


def shares(page: Page) -> list[dict[str, str]]:
    """Read the importance table of each objective, in the order of its rows."""
    tables: list[dict[str, str]] = []
    for row in page.rows:
        if row[:2] == ["Parameter", "Share"]:
            tables.append({})
        elif tables and len(row) == 3:
            tables[-1][row[0]] = row[1]
    return tables


def test_the_parameter_that_decides_has_the_largest_share_and_references_do_not_count(tmp_path: Path):
    made = study([UP, DOWN], searched(), ["score.0", "flops"])
    found = shares(read(made, tmp_path))
    assert [next(iter(table)) for table in found] == ["model.tokens"] * 2
    assert [len(table) for table in found] == [4, 4]
    made.add_trials([trial([number / 9, 1e9], reference=f"setting {number}") for number in range(9)])
    assert shares(read(made, tmp_path)) == found


ALIKE = [trial([1.0, 1.0], params={"a": (tokens, TOKENS)}) for tokens in range(8, 40)]


@pytest.mark.parametrize("trials", [searched()[:9], ALIKE], ids=["few", "alike"])
def test_without_enough_that_differs_the_page_says_so_instead_of_a_share(trials: list[FrozenTrial], tmp_path: Path):
    page = read(study([UP, DOWN], trials, ["score.0", "flops"]), tmp_path)
    assert page.words.count("There are too few trials for the importance") == 2
    assert not any(row and row[0] == "Parameter" for row in page.rows)


def test_axes_are_spaced_as_parameters_are_drawn_and_up_is_better():
    drawn = zip((1e-4, 1e-3, 1e-2), SCHEDULE.choices, strict=True)
    params = [{"rate": (rate, RATE), "schedule": (schedule, SCHEDULE)} for rate, schedule in drawn]
    trials = [trial([number, number], params=each) for number, each in enumerate(params)]
    made = study([UP, DOWN], [*trials, trial([0, 2], params={"rate": (1e-3, RATE)})])
    rate, schedule, up, down = search_plots.build_axes(Snapshot.from_study(made))
    assert list(rate.positions.values()) == pytest.approx([0, 0.5, 1, 0.5])
    assert schedule.positions == {0: 0, 1: 0.5, 2: 1, 3: search_plots.ABSENT_POSITION}
    assert schedule.ticks == {0: "constant", 0.5: "linear", 1: "cosine", search_plots.ABSENT_POSITION: "absent"}
    assert up.positions == {0: 0, 1: 0.5, 2: 1, 3: 0}
    assert down.positions == {0: 1, 1: 0.5, 2: 0, 3: 0}
    assert down.ticks == {0: "2", 1: "0"}


@pytest.mark.parametrize(
    ("value", "text"),
    [(0.913412, "0.9134"), (24, "24"), (9673, "9,673"), (9673.4, "9,673"), (212_345_678, "212.3 M"), (4.9e9, "4.9 G"),
     (3e-5, "3e-05"), (-2.5e12, "-2.5 T"), (True, "true"), (None, "null"), ("linear", "linear"), (math.inf, "inf")],
)  # fmt: skip
def test_numbers_are_written_with_four_digits_at_most(value: Any, text: str):
    assert format_parameter(value) == text
