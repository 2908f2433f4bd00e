"""Type hints of settings in words: allowed values, keys of sections, and the type at a dotted path."""

import json
import types
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import MISSING, fields, is_dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

import annotated_types

_MAX_CHARS = 80  # Longer values are cut, so that an error stays one line of a terminal

_NAMES = {
    int: "a whole number",
    float: "a number",
    str: "text",
    bool: "true or false",
    type(None): "null",
    Any: "anything",
    Path: "a path",
}
_LIMITS = {
    annotated_types.Gt: (">", "gt"),
    annotated_types.Ge: (">=", "ge"),
    annotated_types.Lt: ("<", "lt"),
    annotated_types.Le: ("<=", "le"),
}
_BOUNDS = {
    annotated_types.MultipleOf: ("a multiple of", "multiple_of"),
    annotated_types.MinLen: ("of length >=", "min_length"),
    annotated_types.MaxLen: ("of length <=", "max_length"),
}


def format_value(value: Any) -> str:
    """Format a value for an error message, cut to one line."""
    text = repr(value) if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    return text if len(text) <= _MAX_CHARS else text[: _MAX_CHARS - 1] + "…"


def find_type(hint: Any, location: Sequence[str | int]) -> Any:
    """Find the annotation at a location (keys and list indices) inside a type; Any if it has none."""
    if not location:
        return hint
    key, *remaining = location
    for member in list_members(hint):
        if is_dataclass(member):
            hints = get_type_hints(member, include_extras=True)
            if isinstance(key, str) and key in hints:
                return find_type(hints[key], remaining)
        arguments = get_args(member)
        origin = get_origin(member)
        if isinstance(origin, type) and issubclass(origin, Mapping):
            return find_type(arguments[1], remaining)
        if origin in (list, tuple) and isinstance(key, int):
            # tuple[A, B] has a type per item, tuple[A, ...] one for all.
            fixed = origin is tuple and arguments[-1] is not Ellipsis
            return find_type(arguments[key if fixed and key < len(arguments) else 0], remaining)
    return Any


def find_key_type(hint: Any, location: Sequence[str | int]) -> Any:
    """Find the annotation of the keys of the mapping at a location inside a type; Any if there is none."""
    for member in list_members(find_type(hint, location)):
        origin = get_origin(member)
        if isinstance(origin, type) and issubclass(origin, Mapping):
            return get_args(member)[0]
    return Any


def list_members(hint: Any) -> Iterator[Any]:
    """List the members of a union, without their annotations; of another type, itself."""
    if get_origin(hint) is Annotated:
        yield from list_members(get_args(hint)[0])
    elif get_origin(hint) in (Union, types.UnionType):
        for member in get_args(hint):
            yield from list_members(member)
    else:
        yield hint


def list_field_names(hint: Any) -> list[str]:
    """List the keys of a section of this type."""
    sections = [member for member in list_members(hint) if is_dataclass(member)]
    names = (field.name for section in sections for field in fields(section) if field.init)
    return list(dict.fromkeys(names))


def join_alternatives(alternatives: Sequence[str]) -> str:
    """Join alternatives, each named once: "A", "A or B", "A, B or C"."""
    *first, last = dict.fromkeys(alternatives)
    return f"{', '.join(first)} or {last}" if first else last


def list_alternatives(hint: Any) -> list[str]:
    """Describe each value of a Literal, or each member of a union; of another type, the type itself."""
    origin, arguments = get_origin(hint), get_args(hint)
    if origin is Literal:
        return [format_value(value) for value in arguments]
    if origin in (Union, types.UnionType):
        return [text for member in arguments for text in list_alternatives(member)]
    return [describe_type(hint)]


def describe_type(hint: Any) -> str:
    """Describe the values that a type allows, such as 'a whole number >= 1', "'a' or 'b'" or 'a list of text'."""
    origin, arguments = get_origin(hint), get_args(hint)
    if origin is Annotated:
        return " ".join([describe_type(arguments[0]), *_describe_bounds(arguments[0], arguments[1:])])
    if origin in (Literal, Union, types.UnionType):
        return join_alternatives(list_alternatives(hint))
    if origin in (list, tuple):
        members = ", ".join(dict.fromkeys(describe_type(member) for member in arguments if member is not Ellipsis))
        if origin is tuple and ... not in arguments:
            return f"a list of {len(arguments)} values (each {members})"
        return f"a list of values (each {members})" if members.startswith("a ") else f"a list of {members}"
    if isinstance(origin, type) and issubclass(origin, Mapping):
        return f"a mapping of names to {describe_type(arguments[1])}"
    if is_dataclass(hint):
        required = [field.name for field in fields(hint) if field.default is field.default_factory is MISSING]
        return f"a section with the keys {', '.join(list_field_names(hint))}" + (
            f" (needed: {', '.join(required)})" if required else ""
        )
    return _NAMES.get(hint, getattr(hint, "__name__", str(hint)))


def _describe_bounds(hint: Any, marks: Sequence[Any]) -> Iterator[str]:
    # Interval(ge=0, le=1) stands for two bounds.
    flat: list[Any] = []
    for mark in marks:
        flat.extend(mark if isinstance(mark, annotated_types.GroupedMetadata) else [mark])
    limits = {}
    for mark in flat:
        if type(mark) in _LIMITS:
            sign, attribute = _LIMITS[type(mark)]
            limits[sign] = getattr(mark, attribute)
    # Whole numbers below 10 are those up to 9.
    if hint is int and "<" in limits:
        limits["<="] = limits.pop("<") - 1
    if limits.keys() == {">=", "<="}:
        yield f"from {limits['>=']} to {limits['<=']}"
    elif limits:
        yield " and ".join(f"{sign} {value}" for sign, value in limits.items())
    for mark in flat:
        if getattr(mark, "pattern", None):
            yield f"that matches {mark.pattern}"
        elif type(mark) in _BOUNDS:
            phrase, attribute = _BOUNDS[type(mark)]
            yield f"{phrase} {getattr(mark, attribute)}"
