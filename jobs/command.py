"""The command line: `redux VERB …`.

Only argparse and the signal handlers are imported here. A verb imports what it needs when it is called, so that help
and wrong arguments answer at once, without loading torch and Ray.
"""

import argparse
import errno
import io
import os
import sys
from collections.abc import Sequence
from typing import Any

from jobs.cli import clusters, data, models, reference, runs
from jobs.cli.arguments import EXAMPLE_JOB
from jobs.exit_codes import EXIT_FAULT, EXIT_INTERRUPTED, EXIT_MISUSE
from jobs.former_names import FORMER_OPTIONS
from pipelines.core import interrupts


def main(argv: Sequence[str] | None = None) -> int:
    """Run one verb; returns the exit code: 0 done, 1 a fault that may pass, 2 what the user must change, 130
    interrupted, or a job's own.
    """
    arguments = _parse(argv)
    if not sys.stderr.isatty():  # a log of days, in which each refresh of a bar is a line; read when tqdm is imported
        os.environ.setdefault("TQDM_MININTERVAL", "10")
    # transformers' own bars, one a file that it reads; read when it is imported
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    _survive_lost_outputs()
    # a scheduler's SIGTERM and a closed terminal's SIGHUP are Ctrl-C by other means: all unwind the same way
    with interrupts.handle_signals():
        try:
            return arguments.verb(arguments) or 0
        except BaseException as error:
            # an interrupt may come out as another error: of an import, of a library, of a Ray that is ending
            if interrupts.was_interrupted() or isinstance(error, KeyboardInterrupt):
                print("redux: interrupted; the same command goes on from the last checkpoint", file=sys.stderr)
                return EXIT_INTERRUPTED
            code, problems = _describe(error)
            if not problems:
                raise
            for problem in problems:
                print(f"redux: {problem}", file=sys.stderr)
            return code


def _describe(error: BaseException) -> tuple[int, list[str]]:
    """Describe an error that the user can mend: the exit code, and lines, of a job file perhaps several.

    There are none for a mistake in the code, which needs its stack trace.  A fault of a disk, a store or a machine
    leaves what is finished as it is.
    """
    from pipelines.core import failures

    failure, cause = failures.classify_error(error), failures.find_cause(error)
    if failure.kind == failures.Kind.RAISED or not isinstance(cause, Exception):
        return EXIT_FAULT, []
    if isinstance(cause, ValueError | ImportError):
        return EXIT_MISUSE, [" ".join(problem.split()) for problem in getattr(cause, "problems", [failure.text])]
    code = EXIT_FAULT if failure.kind == failures.Kind.LOST else EXIT_MISUSE
    return code, [f"{failure.text}; what is finished is safe: once this is mended, the same command goes on"]


class _Output(io.FileIO):
    """A file descriptor that may lose its reader: a closed terminal, or a `tee` that Ctrl-C ended before."""

    def write(self, data: Any, /) -> int:
        try:
            return super().write(data)
        except OSError as error:
            if error.errno not in (errno.EIO, errno.EPIPE):
                raise
            return len(data)


def _survive_lost_outputs() -> None:
    """Let what is written to nobody any more be no error: it would end a run, also one that makes its checkpoint.

    Each line goes out at once, also to a file, where a run that is killed would take along what it has said.
    """
    for name, errors in {"stdout": "strict", "stderr": "backslashreplace"}.items():
        stream = getattr(sys, name)
        if stream is getattr(sys, f"__{name}__"):  # not where a test or a notebook has replaced it
            raw = io.BufferedWriter(_Output(stream.fileno(), "w", closefd=False))
            setattr(sys, name, io.TextIOWrapper(raw, stream.encoding, errors, line_buffering=True))


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = _build_parser()
    arguments, rest = parser.parse_known_args(argv)
    for word in rest:
        if new_name := FORMER_OPTIONS.get(word.partition("=")[0]):
            parser.error(f"{word}: this option is now {new_name}")
    # argparse closes a list of positionals at the first option, so overrides written after --runs-dir are left over
    if any(word.startswith("-") for word in rest) or (rest and "overrides" not in arguments):
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    if rest:
        arguments.overrides.extend(rest)
    return arguments


def _build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="redux",
        description="Train vision-language models that follow instructions, with fewer image tokens.",
        epilog=f"redux VERB --help explains a verb. To begin: redux run {EXAMPLE_JOB}",
    )
    parser.add_argument("--version", action=_Version)
    verbs = parser.add_subparsers(metavar="VERB", required=True)
    for group in (runs, data, clusters, models, reference):
        group.add_parsers(verbs)
    return parser


class _Version(argparse.Action):
    """Looks the version up only when it is asked for: the look-up costs more than the rest of the parser."""

    def __init__(self, option_strings: Sequence[str], dest: str) -> None:
        super().__init__(option_strings, dest, nargs=0, help="print the version and exit")

    def __call__(self, parser: argparse.ArgumentParser, *_: object) -> None:
        from importlib.metadata import version

        print(f"redux {version('redux-vlm')}")
        parser.exit()


if __name__ == "__main__":
    sys.exit(main())
