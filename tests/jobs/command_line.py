"""The command line called in the test's process, which imports torch and Ray once for all calls."""

import contextlib
import io
from typing import NamedTuple

from jobs import command


class CommandResult(NamedTuple):
    """Exit code and output of a command.

    Args:
        code: the exit code.
        out: standard output.
        err: standard error.
    """

    code: int
    out: str
    err: str


def run_command(*words: object) -> CommandResult:
    """Run `redux WORDS...` in this process. With an initialised Ray, the command uses that."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            code = command.main(list(map(str, words)))
        except SystemExit as ended:  # argparse, after help or a wrong argument
            code = int(ended.code or 0)
    return CommandResult(code, out.getvalue(), err.getvalue())
