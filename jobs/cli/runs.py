"""`redux run`, `best`, `report` and `tables`: run job files, and read what runs found."""

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

from jobs.cli.arguments import EXAMPLE_JOB, add_job, parse_natural


def add_parsers(verbs: Any) -> None:
    """Add the parsers of this group."""
    _add_run(verbs)
    _add_best(verbs)
    _add_report(verbs)
    _add_tables(verbs)


def load(arguments: argparse.Namespace) -> tuple[Any, Callable[[Any, Path, bool], None]]:
    """Load and check a job, a study or a search.

    Returns:
        Its settings, and the function that runs it: (settings, run folder, allow changes).

    Raises:
        ValueError: the file or an override is wrong.
    """
    from jobs import document

    # The file alone decides its kind, because overrides cannot make a study of a job.
    tree = document.read_tree(arguments.job)
    if isinstance(tree, dict) and "variants" in tree:
        from jobs import study

        return study.load(arguments.job, arguments.overrides), study.run_study
    if isinstance(tree, dict) and "space" in tree:
        from jobs import search_schema

        search_schema.read(arguments.job, arguments.overrides)  # Finds most mistakes before torch and Ray are imported
        from jobs import search

        return search.load(arguments.job, arguments.overrides), search.run_search
    from jobs import schema

    return schema.load(arguments.job, arguments.overrides), _run_job


def _run_job(job: Any, folder: Path, allow_changes: bool) -> None:
    from jobs.run import run

    run(job, folder, allow_changes)


def _add_run(verbs: Any) -> None:
    run = verbs.add_parser(
        "run",
        help="run a job file, from images to report",
        description="Run a job file: make shards, train, evaluate, write a report. The file may also be a study "
        "(several jobs that share their first stages) or a search for good settings. The same command resumes an "
        "interrupted run from its last checkpoint and leaves a finished run unchanged. The command starts a private "
        "Ray, or uses the cluster that the variable RAY_ADDRESS names.",
        epilog=f"example: redux run {EXAMPLE_JOB} seed=1 name=quickstart-1",
    )
    add_job(run, f"a job file, such as {EXAMPLE_JOB}")
    run.add_argument(
        "--runs-dir",
        metavar="DIR",
        type=Path,
        default=Path("runs"),
        help="the run folder is DIR/NAME (default: %(default)s)",
    )
    run.add_argument(
        "--allow-changes",
        action="store_true",
        help="resume although the job, its data or its model have changed since the start of the run",
    )
    run.add_argument(
        "--share",
        metavar="K/N",
        type=parse_study_share,
        help="run only part K of N equal parts of a study. Use the same --runs-dir for all parts, or copy their run "
        "folders into one folder; redux tables then shows the whole study",
    )
    run.set_defaults(verb=_run, resumes=True)


def parse_study_share(text: str) -> Any:
    """Parse the value of --share."""
    from jobs.study import Share

    try:
        return Share.parse(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def _run(arguments: argparse.Namespace) -> None:
    settings, execute = load(arguments)
    if arguments.share:
        from jobs import study

        if not isinstance(settings, study.Study):
            raise ValueError(f"--share: got one with {arguments.job}, allowed: a study, which has several runs")
        folder = arguments.runs_dir / settings.name
        study.run_study(settings, folder, arguments.allow_changes, arguments.share)
        return
    execute(settings, arguments.runs_dir / settings.name, arguments.allow_changes)


def _add_best(verbs: Any) -> None:
    parser = verbs.add_parser(
        "best",
        help="write the best trial of a search as a job file",
        description="Write the complete job with the settings of a trial to SEARCH/best.yaml, or the jobs of several "
        "trials to SEARCH/best-N.yaml. With one objective, the default is the best trial. With several objectives, "
        "TRIAL is required; without it, the error lists the Pareto front.",
        epilog="example: redux best runs/laptop 17 && redux run runs/laptop/best.yaml",
    )
    parser.add_argument("search", metavar="SEARCH", type=Path, help="folder of a search")
    parser.add_argument(
        "trials",
        metavar="TRIAL",
        nargs="*",
        default=[],
        type=parse_natural,
        help="number of a trial, as in search.html",
    )
    parser.set_defaults(verb=_write_best)


def _write_best(arguments: argparse.Namespace) -> None:
    from jobs import search

    for path in search.write_best_jobs(arguments.search, arguments.trials):
        print(path)


def _add_report(verbs: Any) -> None:
    report = verbs.add_parser(
        "report",
        help="write the HTML report of a run again",
        description="Write RUN/report.html from what the run folder has: scores with 95 % intervals, answers with "
        "images, kept and merged patches, cost compared with LLaVA, loss curves. The run need not be finished.",
        epilog="example: redux report runs/quickstart --examples 100",
    )
    report.add_argument("run", metavar="RUN", type=Path, help="folder of a run")
    report.add_argument(
        "--examples",
        metavar="N",
        type=parse_natural,
        help="questions of each task that are shown with their images (default: that of the job)",
    )
    report.set_defaults(verb=_report)


def _report(arguments: argparse.Namespace) -> None:
    from jobs import report

    print(report.render_again(arguments.run, arguments.examples))


def _add_tables(verbs: Any) -> None:
    tables = verbs.add_parser(
        "tables",
        help="compare finished runs in tables, also those of the paper",
        description="Print tables of finished runs as Markdown: scores with 95 % intervals, differences to LLaVA or "
        "to the first variant, costs, the tables of the paper that have rows for these runs, with the paper's "
        "numbers, and verdicts on the claims of the paper. The settings of a run decide its row. Runs that differ only "
        "in their seed share a row.",
        epilog="example: redux tables runs --out tables",
    )
    tables.add_argument(
        "runs", metavar="RUN", nargs="+", type=Path, help="folder of a run, or a folder that holds run folders"
    )
    tables.add_argument(
        "--out", metavar="DIR", type=Path, help="also write tables.md, tables.html and one CSV file per table there"
    )
    tables.add_argument(
        "--missing",
        action="store_true",
        help="also list the rows of the paper's tables that no run fills, each with the command that fills it",
    )
    tables.set_defaults(verb=_tables)


def _tables(arguments: argparse.Namespace) -> None:
    from jobs import tables

    text = tables.write_tables(arguments.runs, arguments.out, tables.find_scorer, lists_missing=arguments.missing)
    print(text, end="")
