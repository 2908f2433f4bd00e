"""Reference of the keys of job, study and search files, read from the dataclasses that define them.

A key's meaning is its entry in the docstring of its dataclass, its type and default are those of the field, and its
example is the value in a shipped file. So the reference cannot differ from the code.
"""

import difflib
import inspect
import json
import re
import types
from collections.abc import Iterator, Mapping
from dataclasses import MISSING, Field, dataclass, fields, is_dataclass
from fractions import Fraction
from pathlib import Path
from typing import Annotated, Any, Union, get_args, get_origin, get_type_hints

from jobs import document, type_text
from jobs.schema import Job
from jobs.search_schema import Search
from jobs.study import Study

SCHEMAS: dict[str, type] = {"job": Job, "study": Study, "search": Search}

RECIPES = Path(__file__).parent / "recipes"

INTRODUCTION = """\
# Keys of job files

<!-- Written by `redux explain > jobs/REFERENCE.md`; do not edit. -->

`redux explain KEY` prints one entry, `redux schema` the JSON Schema for editors. A section is a YAML mapping of keys. A
`*` stands for a name that you choose, such as that of a stage, or for the name of a task. A key without a default is
required.
"""


@dataclass(frozen=True, kw_only=True)
class KeyEntry:
    """One key of a file.

    Args:
        path: dotted path, with * for a name that the user chooses.
        type: allowed values in words.
        default: value as JSON; None if the key is required.
        meaning: description from the docstring.
        example: value in a shipped file as JSON; None if no file has one.
    """

    path: str
    type: str
    default: str | None
    meaning: str
    example: str | None


def list_keys(file_kind: str) -> list[KeyEntry]:
    """List the keys of a kind of file, in the order of their dataclasses."""
    # A key of several classes, such as `when`, is listed once.
    return list(dict.fromkeys(_walk(SCHEMAS[file_kind], "", _load_examples(file_kind))))


def explain(key: str) -> str:
    """Describe a key, or all keys of a section, of whichever kind of file has it.

    Raises:
        ValueError: no file has such a key.
    """
    entries_by_kind = {file_kind: list_keys(file_kind) for file_kind in SCHEMAS}
    # The job inside a study or a search has the keys of a job file.
    path = re.sub(r"^job\.", "", key)
    for file_kind, entries in entries_by_kind.items():
        matches = [entry for entry in entries if _is_match(entry.path, path)]
        below = [entry for entry in entries if _is_match(entry.path.rpartition(".")[0], path)]
        if matches or below:
            parts = [f"{entry.path} ({file_kind} file)\n{_write_lines(entry)}" for entry in matches]
            parts += [f"{entry.path}\n{_write_lines(entry)}" for entry in below]
            return "\n".join(parts)
    # A search and a study have some keys of a job.
    paths = list(dict.fromkeys(entry.path for entries in entries_by_kind.values() for entry in entries))
    # By the last part, which is the name that a user remembers.
    names = list(dict.fromkeys(other.rpartition(".")[2] for other in paths))
    close = difflib.get_close_matches(path.rpartition(".")[2], names, n=3, cutoff=0.6)
    similar = [other for name in close for other in paths if other.rpartition(".")[2] == name]
    examples = ", ".join(similar[:5] or ["train.*.epochs", "model.vmtc.tokens"])
    raise ValueError(f"KEY: got {key}, allowed: a key of a file, such as {examples}")


def write_reference() -> str:
    """Write the reference of all kinds of files as Markdown."""
    parts = [INTRODUCTION]
    for file_kind in SCHEMAS:
        parts.append(f"\n## {file_kind.capitalize()} files\n")
        sections: dict[str, list[KeyEntry]] = {}
        for entry in list_keys(file_kind):
            sections.setdefault(entry.path.rpartition(".")[0], []).append(entry)
        for section, entries in sections.items():
            parts.append(f"\n### {f'`{section}`' if section else 'Top level'}\n\n{_write_table(entries)}")
    return "".join(parts)


def write_json_schema(file_kind: str) -> str:
    """Write the JSON Schema of a kind of file, with the meaning of each key as its description."""
    json_schema = document.build_json_schema(SCHEMAS[file_kind])
    for definition, cls in _find_classes(SCHEMAS[file_kind]).items():
        meanings, section = read_meanings(cls), json_schema["$defs"].get(definition, {})
        section["description"] = inspect.cleandoc(cls.__doc__ or "").partition("\n\n")[0]
        for name, key in section.get("properties", {}).items():
            key["description"] = meanings.get(name, "")
    return json.dumps(json_schema, indent=1)


def read_meanings(cls: type) -> dict[str, str]:
    """Read what the docstrings of a dataclass and its bases say of each field: entries `name: text`."""
    names = {field.name for field in fields(cls)}
    meanings: dict[str, str] = {}
    # A derived class repeats none of the entries of its bases, but may replace one.
    for base in reversed(cls.__mro__):
        current: tuple[str, ...] = ()
        for line in inspect.cleandoc(base.__dict__.get("__doc__") or "").splitlines():
            entry = re.match(r"\s*(\w+(?:, \w+)*): (.*)", line)
            if entry and names.issuperset(entry[1].split(", ")):
                current = tuple(entry[1].split(", "))
                meanings |= dict.fromkeys(current, entry[2])
            # An indented line continues the entry before.
            elif current and line.startswith(" "):
                meanings |= {name: f"{meanings[name]} {line.strip()}" for name in current}
            else:
                current = ()
    return meanings


def _walk(cls: type, prefix: str, examples: list[Any]) -> Iterator[KeyEntry]:
    """Yield an entry for each key of a dataclass, followed by those of the sections that it holds."""
    hints, meanings = get_type_hints(cls, include_extras=True), read_meanings(cls)
    for field in fields(cls):
        path, hint = f"{prefix}{field.name}", hints[field.name]
        values = [tree[field.name] for tree in examples if isinstance(tree, dict) and field.name in tree]
        yield KeyEntry(
            path=path,
            type=_describe_type(hint),
            default=_format_default(field),
            meaning=meanings.get(field.name, ""),
            example=next((_format_example(value) for value in values if value not in (None, {}, [])), None),
        )
        for member in type_text.list_members(hint):
            if is_dataclass(member) and isinstance(member, type):
                yield from _walk(member, f"{path}.", values)
            elif isinstance(origin := get_origin(member), type) and issubclass(origin, Mapping):
                # Keys that users choose have one entry, with the values of all of them as examples.
                items = [item for tree in values if isinstance(tree, dict) for item in tree.values()]
                for item_type in type_text.list_members(get_args(member)[1]):
                    if is_dataclass(item_type) and isinstance(item_type, type):
                        yield from _walk(item_type, f"{path}.*.", items)


def _describe_type(hint: Any) -> str:
    """Describe a type; sections in one word, because their keys have entries of their own."""
    return type_text.join_alternatives(_list_alternatives(hint))


def _list_alternatives(hint: Any) -> list[str]:
    origin, arguments = get_origin(hint), get_args(hint)
    if origin in (Union, types.UnionType):
        return [text for member in arguments for text in _list_alternatives(member)]
    if is_dataclass(hint):
        return ["a section"]
    if origin is Annotated and not isinstance(arguments[0], type):
        return _list_alternatives(arguments[0])
    if isinstance(origin, type) and issubclass(origin, Mapping):
        return [f"a mapping of names to {_describe_type(arguments[1])}"]
    return type_text.list_alternatives(hint)


def _format_default(field: Field[Any]) -> str | None:
    if field.default is not MISSING:
        value = field.default
    elif field.default_factory is not MISSING:
        value = field.default_factory()
    else:
        return None
    if is_dataclass(value):
        return "a section with its defaults"
    if isinstance(value, float):
        fraction = Fraction(value).limit_denominator(10)
        if fraction.denominator > 1 and float(fraction) == value and len(str(fraction)) < len(str(value)):
            return str(fraction)
    return _format_example(document.write_plain(value))


def _format_example(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 60 else f"{text[:57]}..."


def _load_examples(file_kind: str) -> list[Any]:
    """Load the shipped files of a kind, as trees."""
    trees = [document.read_tree(path) for path in sorted(RECIPES.rglob("*.yaml"))]
    distinctive_keys = {"study": "variants", "search": "space"}
    if file_kind in distinctive_keys:
        return [tree for tree in trees if distinctive_keys[file_kind] in tree]
    # A job file has no key that the others lack.
    return [tree for tree in trees if not set(distinctive_keys.values()) & tree.keys()]


def _is_match(pattern: str, path: str) -> bool:
    """Return True if a path matches a pattern, in which * stands for any name."""
    return bool(pattern) and re.fullmatch(re.escape(pattern).replace(r"\*", r"[^.]+"), path) is not None


def _find_classes(cls: type) -> dict[str, type]:
    """Find a dataclass and all that its fields hold, by class name."""
    classes = {cls.__name__: cls}
    for hint in get_type_hints(cls, include_extras=True).values():
        for member in type_text.list_members(hint):
            for inner in (member, *get_args(member)):
                for value in type_text.list_members(inner):
                    if is_dataclass(value) and isinstance(value, type) and value.__name__ not in classes:
                        classes |= _find_classes(value)
    return classes


def _write_lines(entry: KeyEntry) -> str:
    lines = {"type": entry.type, "default": entry.default or "none, required", "meaning": entry.meaning}
    if entry.example:
        lines["example"] = f"{entry.path.rpartition('.')[2]}: {entry.example}"
    return "".join(f"  {name + ':':9}{text}\n" for name, text in lines.items())


def _write_table(entries: list[KeyEntry]) -> str:
    rows = ["| key | type | default | meaning | example |", "|---|---|---|---|---|"]
    for entry in entries:
        cells = (
            f"`{entry.path.rpartition('.')[2]}`",
            entry.type,
            f"`{entry.default}`" if entry.default else "",
            entry.meaning,
            f"`{entry.example}`" if entry.example else "",
        )
        rows.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return "\n".join(rows) + "\n"
