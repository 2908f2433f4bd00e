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
from jobs.type_text import describe_type, find_key_type, find_type, format_value, list_field_names, list_members

ParsedDocument = TypeVar("ParsedDocument")

FORMER_KEY = "this key is now"
"""Beginning of the problem of a key that was renamed."""

# YAML 1.1 reads `1e-3` and `1.5e3` as text, because it requires a dot and a signed exponent; here they are numbers.
_EXPONENT = re.compile(r"[-+]?(?:\d+\.?\d*|\.\d+)[eE][-+]?\d+$")

_NOT_DECIMAL = re.compile(r"[-+]?0[\dxb_]|.*:")
"""Octal, hexadecimal, binary and base-60 numbers of YAML 1.1."""

# A misspelled key is often also a missing one, so unknown keys are reported first.
_PRIORITY = {"unexpected_keyword_argument": 0, "missing": 2}


class JobError(ValueError):
    """Error of a document that cannot be used. Its text is one line for the user; `problems` has a line per mistake.

    Args:
        message: the first problem.
        further: the other problems, one line each.
    """

    def __init__(self, message: str, *further: str) -> None:
        self.problems = [" ".join(problem.split()) for problem in (message, *further)]
        super().__init__(self.problems[0] + (f" (and {len(further)} more)" if further else ""))


def read(path: Path, overrides: Sequence[str], schema: type[ParsedDocument]) -> ParsedDocument:
    """Read a dataclass tree from a YAML file.

    Args:
        path: the file.
        overrides: values that replace those of the file, such as "train.pretrain.epochs=2".
        schema: class of the tree.

    Raises:
        JobError: the file or an override is wrong.
    """
    return build(read_tree(path, overrides), schema, str(path))


def read_tree(path: Path, overrides: Sequence[str] = ()) -> Any:
    """Read the content of a YAML file after overrides, without a check against a schema."""
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise JobError(f"{path}: {error}, allowed: YAML in UTF-8") from error
    except OSError as error:
        raise JobError(f"{path}: {error.strerror}, allowed: a YAML file") from error
    tree = _parse(text, str(path))
    for override in overrides:
        dotted, equals, value = override.partition("=")
        if not equals:
            raise JobError(f"override {override!r}: not of the form section.key=value")
        set_value(tree, dotted, _parse(value, f"override {override!r}"), f"override {override!r}")
    return tree


def build(tree: Any, schema: type[ParsedDocument], source: str) -> ParsedDocument:
    """Build a dataclass tree from plain values; JobError, which begins with `source`, if they do not fit."""
    try:
        # JSON mode is strict, but accepts a list for a tuple and 1 for a float; "1" and true remain errors.
        return cast(ParsedDocument, _get_adapter(schema).validate_json(json.dumps([tree]), strict=True)[0])
    except ValidationError as error:
        raise JobError(*(f"{source}: {problem}" for problem in _describe(error, tree, schema))) from error


def write(value: Any) -> str:
    """Write a dataclass tree as YAML with all defaults; `read` reads an equal tree back."""
    tree = _get_adapter(type(value)).dump_python((value,), mode="json")[0]
    return yaml.dump(tree, Dumper=_JobDumper, sort_keys=False, allow_unicode=True, width=120)


def write_plain(value: Any) -> Any:
    """Write a dataclass tree, or a default of one, as plain values."""
    return to_jsonable_python(value)


def build_json_schema(schema: type) -> dict[str, Any]:
    """Build the JSON Schema of documents of this kind; `$defs` holds one definition per dataclass."""
    generated = _get_adapter(schema).json_schema()
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "$defs": generated["$defs"],
        **generated["prefixItems"][0],
    }


_ADAPTERS: dict[type, TypeAdapter[Any]] = {}
"""Validators by class, built once: building one takes much longer than checking a document."""


def _get_adapter(schema: type) -> TypeAdapter[Any]:
    # Pydantic 2 takes a config for a container but not for a dataclass, and passes it on to all dataclasses inside. So
    # a one-tuple around the schema makes the whole tree strict without pydantic in any of its classes.
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
        keys: set[Hashable] = set()
        for key, _ in node.value:
            if key.tag == "tag:yaml.org,2002:merge":
                continue
            if key.tag != "tag:yaml.org,2002:str":
                raise yaml.composer.ComposerError(None, None, "a key must be text", key.start_mark)
            if key.value in keys:
                raise yaml.composer.ComposerError(
                    None, None, f"key {key.value!r} is given twice, allowed: once", key.start_mark
                )
            keys.add(key.value)
        return node


for _tag in ("int", "float"):
    _Loader.add_constructor(f"tag:yaml.org,2002:{_tag}", _Loader.construct_number)


class _JobDumper(yaml.SafeDumper):
    """Dumper for `_Loader`: it quotes text that `_Loader` would read as a number."""


for _class in (_Loader, _JobDumper):
    _class.add_implicit_resolver("tag:yaml.org,2002:float", _EXPONENT, list("-+.0123456789"))
_Loader.yaml_implicit_resolvers = {
    character: [(tag, pattern) for tag, pattern in resolvers if tag != "tag:yaml.org,2002:timestamp"]
    for character, resolvers in _Loader.yaml_implicit_resolvers.items()
}


def _parse(text: str, source: str) -> Any:
    """Parse YAML to plain values; an error begins with `source`."""
    try:
        # Through JSON, so that an override of one section does not change another that shares its anchor; as bytes,
        # because half of a surrogate pair could not be written again.
        return json.loads(json.dumps(yaml.load(text, Loader=_Loader), ensure_ascii=False).encode())
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        position = f" line {mark.line + 1}, column {mark.column + 1}:" if mark else ""
        # The problem of a second document begins with "but", after the context.
        words = (
            (error.context, error.problem)
            if str(error.problem).startswith("but ")
            else (error.problem or error.context,)
        )
        raise JobError(f"{source}:{position} {', '.join(filter(None, words))}") from error
    except (yaml.YAMLError, LookupError, TypeError, ValueError, RecursionError) as error:
        raise JobError(f"{source}: not plain YAML: {error}") from error


def set_value(tree: Any, dotted: str, value: Any, source: str) -> None:
    """Set a value of a tree in place.

    Args:
        tree: the tree.
        dotted: dotted path, such as "train.pretrain.epochs". Items of an existing list are numbers from 0, such as
            "model.vmtc.kept.0". Existing keys may contain dots, such as those in the space of a search.
        value: the value.
        source: beginning of an error message.
    """
    keys = dotted.split(".")
    if not all(keys):
        raise JobError(f"{source}: not of the form section.key=value")
    section, depth = tree, 0
    while depth < len(keys):
        key: Any = keys[depth]
        length = 1
        if isinstance(section, list) and key.isdecimal() and int(key) < len(section):
            key = int(key)
        elif isinstance(section, dict):
            # The longest existing key with dots, otherwise the next part of the path.
            lengths = range(len(keys) - depth, 1, -1)
            length = next((length for length in lengths if ".".join(keys[depth : depth + length]) in section), 1)
            key = ".".join(keys[depth : depth + length])
        else:
            parent = ".".join(keys[:depth]) or "the file"
            raise JobError(f"{source}: {parent} is {format_value(section)}, it has no keys to set")
        depth += length
        if depth == len(keys):
            section[key] = value
        elif isinstance(section, dict) and section.get(key) is None:
            section[key] = {}  # A missing section, or one without content, which YAML reads as null
        section = section[key]


def accepts_type(schema: type, dotted: str, value_type: type) -> bool:
    """Return True if the annotation at a dotted path allows values of a type."""
    location = [int(key) if key.isdecimal() else key for key in dotted.split(".")]
    return value_type in list_members(find_type(schema, location))


# --- errors ----------------------------------------------------------------------------------------------------------


def _describe(error: ValidationError, tree: Any, schema: type) -> Iterator[str]:
    """Describe each mistake in a line, those first that may cause others."""
    details: dict[tuple[str | int, ...], ErrorDetails] = {}
    for detail in sorted(_drop_other_members(error.errors(), tree), key=_get_priority):
        # One problem per location: a union reports an error for each of its members.
        details.setdefault(_find_location(detail, tree), detail)
    # A section with a wrong key or value is no other member of a union, either. The key or value is the problem.
    inner = [location for location, detail in details.items() if detail["type"] != "missing"]
    sections = {location[:length] for location in inner for length in range(len(location))}
    for location, detail in details.items():
        if location in sections and list_field_names(find_type(schema, location)):
            continue
        problem = _describe_problem(detail, location, schema)
        # The error of a dataclass's own check starts with the name of a field, which continues the path.
        field_name = problem.partition(":")[0].partition(".")[0]
        is_field_error = detail["type"] == "value_error" and field_name in list_field_names(find_type(schema, location))
        separator = "." if is_field_error else ": "
        dotted = ".".join(str(key) for key in location)
        yield f"{dotted + separator if dotted else ''}{problem}"


def _get_priority(detail: ErrorDetails) -> int:
    return _PRIORITY.get(detail["type"], 1)


def _drop_other_members(details: list[ErrorDetails], tree: Any) -> list[ErrorDetails]:
    """Drop the problems of a union's member with unknown keys, if another member of the union knows the keys."""
    with_unknown_keys = {detail["loc"][:-1] for detail in details if detail["type"] == "unexpected_keyword_argument"}
    sections = {
        detail["loc"] if detail["type"] == "value_error" else detail["loc"][:-1]
        for detail in details
        if detail["type"] == "value_error" or len(detail["loc"]) > 1
    }
    dropped = {
        loc
        for loc in with_unknown_keys
        if loc[-1] not in _find_trail(loc, tree)[-1:]  # The name of a member, which pydantic adds to the path
        and any(other[:-1] == loc[:-1] and other not in with_unknown_keys for other in sections)
    }
    return [detail for detail in details if not any(detail["loc"][: len(loc)] == loc for loc in dropped)]


def _find_location(detail: ErrorDetails, tree: Any) -> tuple[str | int, ...]:
    """Find the location of a problem in the document."""
    trail = _find_trail(detail["loc"], tree)
    return (*trail, detail["loc"][-1]) if detail["type"] == "missing" else trail


def _find_trail(loc: Sequence[str | int], tree: Any) -> tuple[str | int, ...]:
    """Find the keys of pydantic's path that are in the document; it adds others for union members and keys."""
    trail: list[str | int] = []
    value = tree
    for key in loc[1:]:
        keys = value.keys() if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ()
        if key in keys:
            value = value[key]
            trail.append(key)
    return tuple(trail)


def _describe_problem(detail: ErrorDetails, location: tuple[str | int, ...], schema: type) -> str:
    if detail["type"] == "unexpected_keyword_argument":
        key = str(location[-1])
        allowed = list_field_names(find_type(schema, location[:-1]))
        if (successor := FORMER_KEYS.get(key)) in allowed:
            return f"{FORMER_KEY} {successor}"
        similar = difflib.get_close_matches(key, allowed, n=1)
        hint = f", did you mean {similar[0]!r}?" if similar else ","
        return f"unknown key{hint} got {format_value(detail['input'])}, allowed keys: {', '.join(allowed)}"
    if detail["type"] in ("value_error", "assertion_error"):
        return str(detail.get("ctx", {}).get("error", detail["msg"]))
    if detail["loc"][-1:] == ("[key]",):
        allowed_key = describe_type(find_key_type(schema, location[:-1]))
        return f"key {format_value(detail['input'])}, allowed keys: {allowed_key}"
    allowed_here = describe_type(find_type(schema, location))
    if detail["type"] == "missing":
        return f"missing, allowed: {allowed_here}"
    return f"got {format_value(detail['input'])}, allowed: {allowed_here}"
