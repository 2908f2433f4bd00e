"""One check for the settings of every method, so that each mistake is told in the same words."""

import math
from collections.abc import Callable
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

Rule = tuple[str, Callable[[Any], bool]]

WORDS = {bool: "True or False", int: "a whole number", float: "a number", NoneType: "None"}


def require(settings: Any, **rules: Rule) -> None:
    """ValueError naming the first field of a dataclass that has a value it may not have, and what is allowed.

    Every field is checked against its type, strictly: True is no number and NaN neither.  `rules` gives for some of
    them what else is asked, in words and as a function of the value; None, where it is allowed, breaks no rule.
    """
    for name, hint in get_type_hints(type(settings)).items():
        value, (asked, keeps) = getattr(settings, name), rules.get(name, ("", lambda _: True))
        if not _is(value, hint):
            raise ValueError(f"{name}: got {value!r}, allowed: {_words(hint)}")
        if value is not None and not keeps(value):
            raise ValueError(f"{name}: got {value!r}, allowed: {asked}")


def _is(value: Any, hint: Any) -> bool:
    if get_origin(hint) is Literal:
        return isinstance(value, str) and value in get_args(hint)
    if get_origin(hint) in (Union, UnionType):
        return any(_is(value, member) for member in get_args(hint))
    if get_origin(hint) is tuple:
        return isinstance(value, tuple) and all(_is(each, get_args(hint)[0]) for each in value)
    if isinstance(value, bool) or hint is not float:
        return type(value) is hint
    return isinstance(value, int | float) and math.isfinite(value)


def _words(hint: Any) -> str:
    if get_origin(hint) is Literal:
        return " or ".join(map(repr, get_args(hint)))
    if get_origin(hint) in (Union, UnionType):
        return " or ".join(_words(member) for member in get_args(hint))
    if get_origin(hint) is tuple:
        return f"a tuple, of each {_words(get_args(hint)[0])}"
    return WORDS[hint]
