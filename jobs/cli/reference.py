"""`redux schema` and `explain`: the keys of job, study and search files."""

import argparse
from typing import Any

FILE_KINDS = ("job", "study", "search")


def add_parsers(verbs: Any) -> None:
    """Add the parsers of this group."""
    _add_schema(verbs)
    _add_explain(verbs)


def _add_schema(verbs: Any) -> None:
    schema = verbs.add_parser(
        "schema",
        help="print the JSON Schema of job files",
        description="Print the JSON Schema of job, study or search files. Editors with yaml-language-server complete "
        "and check keys with it.",
        epilog="example: redux schema job > job.schema.json",
    )
    schema.add_argument(
        "file_kind",
        metavar="KIND",
        nargs="?",
        choices=FILE_KINDS,
        default="job",
        help="job, study or search (default: job)",
    )
    schema.set_defaults(verb=_schema)


def _schema(arguments: argparse.Namespace) -> None:
    from jobs import reference

    print(reference.write_json_schema(arguments.file_kind))


def _add_explain(verbs: Any) -> None:
    explain = verbs.add_parser(
        "explain",
        help="explain a key of a job file",
        description="Print type, default and meaning of a key of a job, study or search file. A * stands for any name "
        "of a stage, a set or a task. Without KEY, print the whole reference as Markdown.",
        epilog="example: redux explain 'train.*.max_rounds'",
    )
    explain.add_argument("key", metavar="KEY", nargs="?", help="dotted path of a key or of a section")
    explain.set_defaults(verb=_explain)


def _explain(arguments: argparse.Namespace) -> None:
    from jobs import reference

    print(reference.explain(arguments.key) if arguments.key else reference.write_reference(), end="")
