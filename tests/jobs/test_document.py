"""Text to typed values: values are equal after writing and reading, and a mistake is one line."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

import pytest
from annotated_types import Ge, Gt, Interval
from pydantic import StringConstraints

from jobs import document


@dataclass(frozen=True, kw_only=True)
class Stage:
    epochs: Annotated[float, Gt(0)]
    rate: float = 1e-3
    freeze: tuple[str, ...] = ()
    precision: Literal["fp32", "bf16"] = "fp32"
    steps: Annotated[int, Ge(1)] | None = None
    share: Annotated[float, Interval(ge=0, le=1)] = 1.0
    window: int | Literal["auto"] = "auto"
    shuffle: bool = True

    def __post_init__(self) -> None:
        if self.precision == "bf16" and not self.freeze:
            raise ValueError("precision: got 'bf16' with nothing frozen,\nallowed: 'fp32'")


@dataclass(frozen=True, kw_only=True, slots=True)
class Mixture:
    weights: dict[str, float] = field(default_factory=dict)
    sizes: tuple[int, int] = (64, 64)


@dataclass(frozen=True, kw_only=True)
class Plan:
    name: Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")]
    train: dict[str, Stage]
    data: Mixture = Mixture()
    text: str = ""
    variants: dict[Annotated[str, StringConstraints(pattern=r"^[a-z]+$")], int] = field(default_factory=dict)


ONE_LINE = r"^[^\n]+$(?!\n)"
GOOD = "name: a\ntrain:\n  pretrain: {epochs: 2}\n"


def read(folder: Path, text: str, *overrides: str) -> Plan:
    path = folder / "job.yaml"
    path.write_text(text)
    return document.read(path, overrides, Plan)


def read_error(folder: Path, text: str, *overrides: str) -> str:
    with pytest.raises(ValueError, match=ONE_LINE) as caught:
        read(folder, text, *overrides)
    return str(caught.value).replace(f"{folder}/", "")


def test_missing_keys_have_defaults(tmp_path: Path) -> None:
    assert read(tmp_path, GOOD) == Plan(name="a", train={"pretrain": Stage(epochs=2.0)})


@pytest.mark.parametrize("text", ["1e-3", "1E-3", "1.e-3", "1.0e-3", ".1e-2", "10e-4", "0.001", "+1e-3"])
def test_all_notations_of_a_number_are_read(tmp_path: Path, text: str) -> None:
    assert read(tmp_path, f"name: a\ntrain: {{s: {{epochs: 1, rate: {text}}}}}").train["s"].rate == 1e-3


@pytest.mark.parametrize("text", ["1e", "e3", "1e-3x", "v1e3", "2024-11-21", "1.2.3"])
def test_other_text_stays_text(tmp_path: Path, text: str) -> None:
    assert read(tmp_path, f"{GOOD}text: {text}").text == text


def test_overrides_set_nested_values_in_order(tmp_path: Path) -> None:
    plan = read(
        tmp_path,
        GOOD,
        "train.pretrain.epochs=3",
        "train.pretrain.epochs=0.5",
        "train.second.epochs=1",
        "train.second.freeze=[tower, projector]",
        "data.weights.caption=1e-1",
        "text=a=b",
    )
    assert plan.train["pretrain"].epochs == 0.5
    assert plan.train["second"] == Stage(epochs=1, freeze=("tower", "projector"))
    assert list(plan.train) == ["pretrain", "second"]
    assert plan.data.weights == {"caption": 0.1}
    assert plan.text == "a=b"


def test_list_items_and_keys_with_dots_can_be_set() -> None:
    tree = {"a": {"b": [1, [2, 3]]}, "space": {"a.b.0": {"low": 1}, "a": {"b": 5}}}
    document.set_value(tree, "a.b.1.0", 9, "x")
    document.set_value(tree, "space.a.b.0.low", 7, "x")
    document.set_value(tree, "space.a.b", 6, "x")
    assert tree == {"a": {"b": [1, [9, 3]]}, "space": {"a.b.0": {"low": 7}, "a": {"b": 6}}}
    for place in ("a.b.2", "a.b.x", "a.b.0.c"):
        with pytest.raises(ValueError, match=r"x: a\.b(\.0)? is .*, it has no keys to set"):
            document.set_value(tree, place, 1, "x")


def test_an_override_changes_one_of_two_sections_that_share_an_anchor(tmp_path: Path) -> None:
    text = "name: a\ntrain: {a: &a {epochs: 1}, b: *a, c: {<<: *a, rate: 2, epochs: 4}}"
    plan = read(tmp_path, text, "train.b.epochs=2")
    assert [stage.epochs for stage in plan.train.values()] == [1, 2, 4]


@pytest.mark.parametrize(
    ("override", "problem"),
    [
        ("train.pretrain.epochs=many", "train.pretrain.epochs: got 'many', allowed: a number > 0"),
        ("train.pretrain.epochs=0", "train.pretrain.epochs: got 0, allowed: a number > 0"),
        ("train.pretrain.epochs='2'", "train.pretrain.epochs: got '2', allowed: a number > 0"),
        ("train.pretrain.epochs=true", "train.pretrain.epochs: got true, allowed: a number > 0"),
        ("train.pretrain.epochs=.nan", "train.pretrain.epochs: got NaN, allowed: a number > 0"),
        ("train.pretrain.epochs=", "train.pretrain.epochs: got null, allowed: a number > 0"),
        ("train.pretrain.share=2", "train.pretrain.share: got 2, allowed: a number from 0 to 1"),
        ("train.pretrain.steps=true", "train.pretrain.steps: got true, allowed: a whole number >= 1 or null"),
        ("train.pretrain.steps=1.0", "train.pretrain.steps: got 1.0, allowed: a whole number >= 1 or null"),
        ("train.pretrain.steps=0", "train.pretrain.steps: got 0, allowed: a whole number >= 1 or null"),
        ("train.pretrain.shuffle=1", "train.pretrain.shuffle: got 1, allowed: true or false"),
        ("train.pretrain.precision=fp8", "train.pretrain.precision: got 'fp8', allowed: 'fp32' or 'bf16'"),
        ("train.pretrain.window=big", "train.pretrain.window: got 'big', allowed: a whole number or 'auto'"),
        ("train.pretrain.freeze=tower", "train.pretrain.freeze: got 'tower', allowed: a list of text"),
        ("train.pretrain.freeze=[tower, 1]", "train.pretrain.freeze.1: got 1, allowed: text"),
        ("data.weights.caption=x", "data.weights.caption: got 'x', allowed: a number"),
        ("data.weights=3", "data.weights: got 3, allowed: a mapping of names to a number"),
        ("data=3", "data: got 3, allowed: a section with the keys weights, sizes"),
        ("text=1", "text: got 1, allowed: text"),
        ("name=../up", "name: got '../up', allowed: text that matches ^[A-Za-z0-9][A-Za-z0-9._-]*$"),
        ("name=.hidden", "name: got '.hidden', allowed: text that matches ^[A-Za-z0-9][A-Za-z0-9._-]*$"),
    ],
)
def test_a_wrong_value_is_named_with_what_is_allowed(tmp_path: Path, override: str, problem: str) -> None:
    assert read_error(tmp_path, GOOD, override) == f"job.yaml: {problem}"


@pytest.mark.parametrize("name", ["a/b", "a\\b", "-a", "a b", "''", '"a\\n"', "..", "é"])
def test_a_name_cannot_leave_its_folder(tmp_path: Path, name: str) -> None:
    assert read_error(tmp_path, GOOD, f"name={name}").startswith("job.yaml: name: got ")


@pytest.mark.parametrize(
    ("override", "problem"),
    [
        ("nmae=b", "nmae: unknown key, did you mean 'name'? got 'b', allowed keys: name, train, data, text, variants"),
        ("data.zzz=1", "data.zzz: unknown key, got 1, allowed keys: weights, sizes"),
        ("train.pretrain.epoch=1", "train.pretrain.epoch: unknown key, did you mean 'epochs'? got 1, allowed keys: "),
    ],
)
def test_an_unknown_key_is_refused_at_every_depth(tmp_path: Path, override: str, problem: str) -> None:
    assert read_error(tmp_path, GOOD, override).startswith(f"job.yaml: {problem}")


def test_a_key_that_a_user_chooses_is_checked_as_well(tmp_path: Path) -> None:
    assert read_error(tmp_path, GOOD, "variants={a b: 1}") == (
        "job.yaml: variants.a b: key 'a b', allowed keys: text that matches ^[a-z]+$"
    )


@pytest.mark.parametrize("text", ["\ufeffname: b\ntrain: {}\n", "name: b\r\ntrain: {}\r\n"])
def test_files_of_windows_editors_are_read(tmp_path: Path, text: str) -> None:
    (tmp_path / "job.yaml").write_bytes(text.encode())
    assert document.read(tmp_path / "job.yaml", (), Plan) == Plan(name="b", train={})


def test_a_missing_key_is_named(tmp_path: Path) -> None:
    assert read_error(tmp_path, "name: a\ntrain: {s: {rate: 1}}") == (
        "job.yaml: train.s.epochs: missing, allowed: a number > 0"
    )


def test_a_misspelt_key_is_reported_before_a_missing_one(tmp_path: Path) -> None:
    message = read_error(tmp_path, "name: a\ntrain: {s: {epoch: 1, window: x}}")
    assert message.startswith("job.yaml: train.s.epoch: unknown key, did you mean 'epochs'?")
    assert message.endswith(" (and 2 more)")


def test_a_wrong_value_is_reported_before_a_missing_key(tmp_path: Path) -> None:
    message = read_error(tmp_path, "train: {s: {epochs: many}}")
    assert message == "job.yaml: train.s.epochs: got 'many', allowed: a number > 0 (and 1 more)"


def test_an_error_of_a_dataclass_keeps_its_text_and_gets_the_path(tmp_path: Path) -> None:
    assert read_error(tmp_path, GOOD, "train.pretrain.precision=bf16") == (
        "job.yaml: train.pretrain.precision: got 'bf16' with nothing frozen, allowed: 'fp32'"
    )


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("", "got null, allowed: a section with the keys name, train, data, text, variants (needed: name, train)"),
        ("- 1", "got [1], allowed: a section with the keys name, train, data, text, variants (needed: name, train)"),
        ("a: 1\nb: [", "line 2, column 5: "),
        ("a: 1\nb: {c: 1, c: 2}", "line 2, column 11: key 'c' is given twice, allowed: once"),
        ("a: 1\n---\na: 2", "line 2, column 1: expected a single document in the stream, but found another document"),
        ("a: !!bool b", "not plain YAML: "),
        ("a: !!int ''", "not plain YAML: "),
        ("a: !!float b", "not plain YAML: "),
        ('a: "\\ud800"', "not plain YAML: "),
        ("[" * 3000, "not plain YAML: maximum recursion depth exceeded"),
        ("1: a", "line 1, column 1: a key must be text"),
        ("a: 0100", "line 1, column 4: got 0100, allowed: a decimal number without a leading zero"),
        ("a: -0x10", "line 1, column 4: got -0x10, allowed: a decimal number"),
        ("a: 1:40", "line 1, column 4: got 1:40, allowed: a decimal number"),
        ("a: 1:40.5", "line 1, column 4: got 1:40.5, allowed: a decimal number"),
        ("a: *b", "line 1, column 4: found undefined alias 'b'"),
        ("a: !!python/object:os.system {}", "line 1, column 4: could not determine a constructor"),
        ("a: &a [*a]", "not plain YAML: Circular reference detected"),
        ("a: !!binary aGk=", "not plain YAML: "),
        ("a: \x01", "not plain YAML: "),
    ],
)
def test_a_text_that_is_no_job_is_refused_with_its_position(tmp_path: Path, text: str, problem: str) -> None:
    assert read_error(tmp_path, text).startswith(f"job.yaml: {problem}")


@pytest.mark.parametrize(
    ("override", "problem"),
    [
        ("name", "override 'name': not of the form section.key=value"),
        ("=1", "override '=1': not of the form section.key=value"),
        ("data..sizes=1", "override 'data..sizes=1': not of the form section.key=value"),
        ("name.first=1", "override 'name.first=1': name is 'a', it has no keys to set"),
        ("data.sizes=[", "override 'data.sizes=[': line 1, column 2: "),
    ],
)
def test_a_wrong_override_is_quoted(tmp_path: Path, override: str, problem: str) -> None:
    assert read_error(tmp_path, GOOD, override).startswith(problem)


def test_a_file_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    (tmp_path / "bytes.yaml").write_bytes(b"\xff\xfe\xff")
    for name, problem in [
        ("none.yaml", "No such file or directory, allowed: a YAML file"),
        (".", "Is a directory, allowed: a YAML file"),
        (
            "bytes.yaml",
            "'utf-8' codec can't decode byte 0xff in position 0: invalid start byte, allowed: YAML in UTF-8",
        ),
    ]:
        path = tmp_path / name
        with pytest.raises(ValueError, match=ONE_LINE) as caught:
            document.read(path, [], Plan)
        assert str(caught.value).startswith(f"{path}: {problem}")


@pytest.mark.parametrize(
    "plan",
    [
        Plan(name="a", train={}),
        Plan(name="1e5", train={"on": Stage(epochs=1e-7, rate=1e22, freeze=("1e-3", "no", "2024-11-21", "1:30"))}),
        Plan(name="a", train={"s": Stage(epochs=1 / 3, steps=4, window=7, shuffle=False)}, text="a: b\n# ünï\n'\""),
        Plan(name="a", train={}, data=Mixture(weights={"1": 0.1, "null": 2}, sizes=(1, 2))),
    ],
)
def test_values_are_equal_after_writing_and_reading_with_all_defaults(tmp_path: Path, plan: Plan) -> None:
    text = document.write(plan)
    again = read(tmp_path, text)
    assert again == plan
    assert document.write(again) == text
    assert "sizes:" in text
    assert ("shuffle:" in text) == bool(plan.train)


def test_the_schema_is_any_dataclass() -> None:
    @dataclass(frozen=True)
    class Plain:
        value: Any = None

    assert document.write(Plain()) == "value: null\n"
