"""The command line: `redux VERB …`.

Only argparse and the signal handlers are imported here. A verb imports what it needs when it is called, so that help
and wrong arguments answer at once, without loading torch and Ray.
"""

import argparse
import errno
import gc
import io
import os
import sys
from collections.abc import Sequence
from typing import Any, NoReturn

from jobs.cli import answers, check, clusters, data, init, look, models, reference, runs
from jobs.cli.arguments import EXAMPLE_JOB
from jobs.exit_codes import EXIT_FAULT, EXIT_INTERRUPTED, EXIT_MISUSE
from jobs.former_names import FORMER_OPTIONS
from pipelines.core import interrupts

VERB_GROUPS = {
    "prepare data and job files": ("init", "shards", "look", "check"),
    "train": ("run", "best"),
    "see results": ("report", "tables"),
    "use a model": ("ask", "chat", "serve", "export"),
    "work on a cluster": ("submit", "jobs", "manifest"),
    "benchmarks and costs": ("instructions", "score", "cost"),
    "keys of job files": ("explain", "schema"),
}
"""Verbs by what the user wants to do, in the order of `redux --help`."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one verb.

    Returns:
        The exit code: 0 for success, 1 for a fault that may pass, 2 for a mistake of the user, 130 if interrupted, or
        that of a job on a cluster.
    """
    _survive_lost_outputs()
    # Imports of torch, transformers and Ray make a million objects that stay; by default, a sixth of their CPU time is
    # spent on looking for garbage among them.
    gc.set_threshold(50_000)
    arguments = _build_parser().parse_args(argv)
    if not sys.stderr.isatty():  # In a log each refresh of a bar is a line; tqdm reads this at import
        os.environ.setdefault("TQDM_MININTERVAL", "10")
    # No bar per file that transformers reads; it reads this at import.
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    # SIGTERM of a scheduler and SIGHUP of a closed terminal unwind like Ctrl-C.
    with interrupts.handle_signals():
        try:
            return arguments.verb(arguments) or 0
        except BaseException as error:
            # An interrupt may appear as another error: of an import, of a library, of a stopping Ray.
            if interrupts.was_interrupted() or isinstance(error, KeyboardInterrupt):
                resumes = getattr(arguments, "resumes", False)
                advice = "; the same command continues from the last checkpoint" if resumes else ""
                print(f"redux: interrupted{advice}", file=sys.stderr)
                return EXIT_INTERRUPTED
            code, problems = _describe(error)
            if not problems:
                raise
            for problem in problems:
                print(f"redux: {problem}", file=sys.stderr)
            return code


def _describe(error: BaseException) -> tuple[int, list[str]]:
    """Describe an error that the user can fix: the exit code, and one or more lines.

    A bug in the code has no lines, because it needs its stack trace.
    """
    from pipelines.core import failures

    failure, cause = failures.classify_error(error), failures.find_cause(error)
    if failure.kind == failures.Kind.RAISED or not isinstance(cause, Exception):
        return EXIT_FAULT, []
    if isinstance(cause, ValueError | ImportError):
        return EXIT_MISUSE, [" ".join(problem.split()) for problem in getattr(cause, "problems", [failure.text])]
    code = EXIT_FAULT if failure.kind == failures.Kind.LOST else EXIT_MISUSE
    return code, [f"{failure.text}; finished phases are safe: after a fix, the same command continues"]


class _Output(io.FileIO):
    """Output that may lose its reader: a closed terminal, or a `tee` that Ctrl-C has ended."""

    def write(self, data: Any, /) -> int:
        try:
            return super().write(data)
        except OSError as error:
            if error.errno not in (errno.EIO, errno.EPIPE):
                raise
            return len(data)


def _survive_lost_outputs() -> None:
    """Ignore outputs that nobody reads: their error would end a run, even while it writes a checkpoint.

    Each line is flushed, also to a file, so that a killed run loses no output. Characters that the terminal cannot
    show, as in a file name that is not UTF-8, are escaped.
    """
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:  # Closed by the shell, as with >&-
            setattr(sys, name, open(os.devnull, "w"))  # noqa: SIM115  open until the process ends
        elif stream is getattr(sys, f"__{name}__"):  # Not if a test or a notebook has replaced it
            raw = io.BufferedWriter(_Output(stream.fileno(), "w", closefd=False))
            setattr(sys, name, io.TextIOWrapper(raw, stream.encoding, "backslashreplace", line_buffering=True))


class VerbParser(argparse.ArgumentParser):
    """Parser of a verb, whose options may stand between its arguments, also between those of a list."""

    _is_inner_call = False

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        """Parse options, then all other words as arguments. The parser above calls this method."""
        has_actions = any(action.nargs == argparse.PARSER for action in self._actions)
        # parse_known_intermixed_args of Python 3.11 calls this method for each of its two passes.
        if has_actions or self._is_inner_call:
            return super().parse_known_args(args, namespace)
        self._is_inner_call = True
        try:
            arguments, unparsed = self.parse_known_intermixed_args(args, namespace)
        finally:
            self._is_inner_call = False
        if unparsed:
            self._refuse(unparsed)
        return arguments, []

    def format_help(self) -> str:
        """Format the help, with the defaults of arguments.

        `parse_known_intermixed_args` of Python 3.11 hides these defaults while it parses options, among them --help.
        """
        for action in self._get_positional_actions():
            action.default = getattr(action, "save_default", action.default)
        return super().format_help()

    def _refuse(self, words: Sequence[str]) -> NoReturn:
        """Refuse words that are not arguments of the verb."""
        options = [word for word in words if word.startswith("-")]
        for word in options:
            if new_name := FORMER_OPTIONS.get(word.partition("=")[0]):
                self.error(f"{word}: this option is now {new_name}")
        # The words after an unknown option are perhaps its values.
        self.error(f"unrecognized arguments: {' '.join(options or words)}")


class RootParser(argparse.ArgumentParser):
    """Parser of `redux`, whose help lists the verbs in groups."""

    def format_help(self) -> str:
        """Format the help.  argparse itself would list all verbs in one group."""
        formatter = self._get_formatter()
        formatter.add_usage(self.usage, self._actions, [])
        formatter.add_text(self.description)
        [verbs] = [action for action in self._actions if isinstance(action, argparse._SubParsersAction)]
        entries = {entry.dest: entry for entry in verbs._get_subactions()}
        for title, names in VERB_GROUPS.items():
            formatter.start_section(title)
            formatter.add_arguments([entries[name] for name in names])
            formatter.end_section()
        formatter.start_section("options")
        formatter.add_arguments([action for action in self._actions if action.option_strings])
        formatter.end_section()
        formatter.add_text(self.epilog)
        return formatter.format_help()


def _build_parser() -> argparse.ArgumentParser:
    parser = RootParser(
        prog="redux",
        description="Train vision-language models that follow instructions, with fewer image tokens.",
        epilog=f"redux VERB --help explains a verb. To begin: redux run {EXAMPLE_JOB}",
    )
    parser.add_argument("--version", action=_Version)
    verbs = parser.add_subparsers(metavar="VERB", required=True, parser_class=VerbParser)
    for group in (init, check, look, runs, answers, data, clusters, models, reference):
        group.add_parsers(verbs)
    return parser


class _Version(argparse.Action):
    """Option that looks the version up when it is used, because the look-up takes longer than the parser."""

    def __init__(self, option_strings: Sequence[str], dest: str) -> None:
        super().__init__(option_strings, dest, nargs=0, help="print the version and exit")

    def __call__(self, parser: argparse.ArgumentParser, *_: object) -> None:
        from importlib.metadata import version

        print(f"redux {version('redux-vlm')}")
        parser.exit()


if __name__ == "__main__":
    sys.exit(main())
