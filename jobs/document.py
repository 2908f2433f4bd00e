"""A YAML file and `section.key=value` overrides, read as one tree of plain dataclasses.

The dataclasses live beside the code they configure and know nothing of YAML or pydantic; this module alone turns text
into them, strictly: an unknown key, a bool for a number or a number in quotes is an error, since a run that silently
ignores or reinterprets a value costs days. A reader of the error has only that one line, so it names the file, the
dotted path, the value and what is allowed there.
"""

import difflib
import json
import re
import types
from collections.abc import Hashable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar, cast

import yaml
from pydantic import ConfigDict, TypeAdapter, ValidationError
from pydantic_core import ErrorDetails, to_jsonable_python

from jobs.former_names import FORMER_KEYS
from jobs.type_text import describe_type, find_type, format_value, list_field_names, list_members

T = TypeVar("T")

FORMER_KEY = "this key is now"
"""Beginning of the problem of a key that was renamed."""

# `1e-3` and `1.5e3` are text to YAML 1.1, which wants a dot and a signed exponent; to everyone else they are numbers
_EXPONENT = re.compile(r"[-+]?(?:\d+\.?\d*|\.\d+)[eE][-+]?\d+$")

_NOT_DECIMAL = re.compile(r"[-+]?0[\dxb_]|.*:")
"""Octal, hexadecimal, binary and base 60, as YAML 1.1 writes them."""

_URGENCY = {"unexpected_keyword_argument": 0, "missing": 2}  # a misspelt key is also a missing one: name it first


class JobError(ValueError):
    """A document that cannot be used. Its text is one line, fit to be shown as it is.

    problems: a line for each mistake.
    """

    def __init__(self, message: str, *more: str) -> None:
        self.problems = [" ".join(problem.split()) for problem in (message, *more)]
        super().__init__(self.problems[0] + (f" (and {len(more)} more)" if more else ""))


def read(path: Path, overrides: Sequence[str], schema: type[T]) -> T:
    """The `schema` that the YAML file at `path` describes, after `overrides` such as `train.pretrain.epochs=2`.

    Raises JobError, whose text is one line, for every way in which file or overrides can be wrong.
    """
    return build(plain(path, overrides), schema, str(path))


def plain(path: Path, overrides: Sequence[str] = ()) -> Any:
    """The YAML file's content after overrides, unchecked."""
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise JobError(f"{path}: {getattr(error, 'strerror', None) or error}") from error
    tree = _parse(text, str(path))
    for override in overrides:
        dotted, equals, value = override.partition("=")
        if not equals:
            raise JobError(f"override {override!r}: not of the form section.key=value")
        put(tree, dotted, _parse(value, f"override {override!r}"), f"override {override!r}")
    return tree


def build(tree: Any, schema: type[T], source: str) -> T:
    """The `schema` that a tree of plain values describes; an error begins with `source`."""
    try:
        # JSON is the strict form in which a list may fill a tuple and 1 a float, yet "1" or true fill neither
        return cast(T, _adapter(schema).validate_json(json.dumps([tree]), strict=True)[0])
    except ValidationError as error:
        raise JobError(*(f"{source}: {problem}" for problem in _describe(error, tree, schema))) from error


def write(value: Any) -> str:
    """YAML of every field of a dataclass tree, defaults included; `read` gives an equal tree back."""
    plain = _adapter(type(value)).dump_python((value,), mode="json")[0]
    return yaml.dump(plain, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=120)


def write_plain(value: Any) -> Any:
    """Write a dataclass tree, or a default of one, as plain values."""
    return to_jsonable_python(value)


def build_json_schema(schema: type) -> dict[str, Any]:
    """Build the JSON Schema of documents of this kind; `$defs` holds one definition per dataclass."""
    generated = _adapter(schema).json_schema()
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "$defs": generated["$defs"],
        **generated["prefixItems"][0],
    }


_ADAPTERS: dict[type, TypeAdapter[Any]] = {}
"""Made once: that takes far longer than a document does."""


def _adapter(schema: type) -> TypeAdapter[Any]:
    # pydantic takes settings for a container but not for a dataclass; from the container they reach every dataclass in
    # it, so a one-tuple around the schema makes the whole tree strict without a mark on any of its classes
    strict = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)
    if schema not in _ADAPTERS:
        container: Any = types.GenericAlias(tuple, (schema,))
        _ADAPTERS[schema] = TypeAdapter(container, config=strict)
    return _ADAPTERS[schema]


# --- YAML ------------------------------------------------------------------------------------------------------------


class _Loader(yaml.SafeLoader):
    """Safe YAML: exponents are numbers, dates are text, and repeated keys are errors.

    Numbers must be decimal, because YAML 1.1 reads 0100 as 64 and 1:40 as 100.
    """

    def construct_number(self, node: yaml.ScalarNode) -> int | float:
        if _NOT_DECIMAL.match(node.value):
            problem = f"got {node.value}, allowed: a decimal number without a leading zero, or text in quotes"
            raise yaml.constructor.ConstructorError(None, None, problem, node.start_mark)
        return self.construct_yaml_int(node) if node.tag.endswith(":int") else self.construct_yaml_float(node)

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        node = super().compose_mapping_node(anchor)
        seen: set[Hashable] = set()
        for key, _ in node.value:
            if key.tag == "tag:yaml.org,2002:merge":
                continue
            if key.tag != "tag:yaml.org,2002:str":
                raise yaml.composer.ComposerError(None, None, "a key must be text", key.start_mark)
            if key.value in seen:
                raise yaml.composer.ComposerError(None, None, f"key {key.value!r} is given twice", key.start_mark)
            seen.add(key.value)
        return node


for _kind in ("int", "float"):
    _Loader.add_constructor(f"tag:yaml.org,2002:{_kind}", _Loader.construct_number)


class _Dumper(yaml.SafeDumper):
    """Writes what `_Loader` reads: text that looks like a number to it is put in quotes."""


for _class in (_Loader, _Dumper):
    _class.add_implicit_resolver("tag:yaml.org,2002:float", _EXPONENT, list("-+.0123456789"))
_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if tag != "tag:yaml.org,2002:timestamp"]
    for first, resolvers in _Loader.yaml_implicit_resolvers.items()
}


def _parse(text: str, source: str) -> Any:
    try:
        # through JSON, so that sections which share an anchor become separate before an override changes one of them
        return json.loads(json.dumps(yaml.load(text, Loader=_Loader)))
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        where = f" line {mark.line + 1}, column {mark.column + 1}:" if mark else ""
        raise JobError(f"{source}:{where} {error.problem or error.context}") from error
    except (yaml.YAMLError, TypeError, ValueError, RecursionError) as error:
        raise JobError(f"{source}: not plain YAML: {error}") from error


def put(tree: Any, dotted: str, value: Any, source: str) -> None:
    """Put a value at a place of the tree, such as `train.pretrain.epochs`; an error begins with `source`.

    Of a list that is there the places are numbers from 0, `model.vmtc.kept.0`.  A key that is there and holds dots
    itself, as those of a search's space do, is found as a whole.
    """
    keys = dotted.split(".")
    if not all(keys):
        raise JobError(f"{source}: not of the form section.key=value")
    section, done = tree, 0
    while done < len(keys):
        key: Any = keys[done]
        if isinstance(section, list) and key.isdecimal() and int(key) < len(section):
            key, taken = int(key), 1
        elif isinstance(section, dict):
            taken = next((n for n in range(len(keys) - done, 1, -1) if ".".join(keys[done : done + n]) in section), 1)
            key = ".".join(keys[done : done + taken])
        else:
            above = ".".join(keys[:done]) or "the file"
            raise JobError(f"{source}: {above} is {format_value(section)}, it has no keys to set")
        done += taken
        if done == len(keys):
            section[key] = value
        elif isinstance(section, dict) and section.get(key) is None:
            section[key] = {}  # a section that is absent, or written without content, which YAML reads as null
        section = section[key]


def takes(schema: type, dotted: str, kind: type) -> bool:
    """Tell if a value of this type is allowed at a place of the tree, as far as its annotation says."""
    location = [int(key) if key.isdecimal() else key for key in dotted.split(".")]
    return kind in list_members(find_type(schema, location))


# --- errors ----------------------------------------------------------------------------------------------------------


def _describe(error: ValidationError, tree: Any, schema: type) -> Iterator[str]:
    """Describe each mistake in a line, the one that explains most first."""
    found: dict[tuple[str | int, ...], ErrorDetails] = {}
    for detail in sorted(_meant(error.errors(), tree), key=lambda each: _URGENCY.get(each["type"], 1)):
        # one problem for each place: a union reports every one of its members
        found.setdefault(_location(detail, tree), detail)
    for location, detail in found.items():
        problem = _problem(detail, location, schema)
        # a check of a dataclass starts with the name of one of its fields, or a place in it, which goes on the path
        of_field = detail["type"] == "value_error" and problem.partition(":")[0].partition(".")[0] in list_field_names(
            find_type(schema, location)
        )
        separator = "." if of_field else ": "
        dotted = ".".join(str(key) for key in location)
        yield f"{dotted + separator if dotted else ''}{problem}"


def _meant(details: list[ErrorDetails], tree: Any) -> list[ErrorDetails]:
    """The problems without those of a section that knows other keys, where a union has another that knows these."""
    strange = {detail["loc"][:-1] for detail in details if detail["type"] == "unexpected_keyword_argument"}
    sections = {
        detail["loc"] if detail["type"] == "value_error" else detail["loc"][:-1]
        for detail in details
        if detail["type"] == "value_error" or len(detail["loc"]) > 1
    }
    dropped = {
        loc
        for loc in strange
        if loc[-1] not in _trail(loc, tree)[-1:]  # a member's name, which pydantic adds
        and any(other[:-1] == loc[:-1] and other not in strange for other in sections)
    }
    return [detail for detail in details if not any(detail["loc"][: len(loc)] == loc for loc in dropped)]


def _location(detail: ErrorDetails, tree: Any) -> tuple[str | int, ...]:
    """Locate a problem in the document: pydantic's path without the marks it adds for union members and keys."""
    trail = _trail(detail["loc"], tree)
    return (*trail, detail["loc"][-1]) if detail["type"] == "missing" else trail


def _trail(loc: Sequence[str | int], tree: Any) -> tuple[str | int, ...]:
    """The keys of pydantic's path that are the document's."""
    trail: list[str | int] = []
    value = tree
    for key in loc[1:]:
        inside = value.keys() if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ()
        if key in inside:
            value = value[key]
            trail.append(key)
    return tuple(trail)


def _problem(detail: ErrorDetails, location: tuple[str | int, ...], schema: type) -> str:
    if detail["type"] == "unexpected_keyword_argument":
        key = str(location[-1])
        allowed = list_field_names(find_type(schema, location[:-1]))
        if (successor := FORMER_KEYS.get(key)) in allowed:
            return f"{FORMER_KEY} {successor}"
        near = difflib.get_close_matches(key, allowed, n=1)
        hint = f", did you mean {near[0]!r}?" if near else ","
        return f"unknown key{hint} got {format_value(detail['input'])}, allowed keys: {', '.join(allowed)}"
    if detail["type"] in ("value_error", "assertion_error"):
        return str(detail.get("ctx", {}).get("error", detail["msg"]))
    allowed_here = describe_type(find_type(schema, location))
    if detail["type"] == "missing":
        return f"missing, allowed: {allowed_here}"
    if detail["loc"][-1:] == ("[key]",):
        return f"key {format_value(detail['input'])} does not fit, {detail['msg']}"
    return f"got {format_value(detail['input'])}, allowed: {allowed_here}"
