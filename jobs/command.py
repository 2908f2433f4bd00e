"""The command line: `redux VERB …`.

Only argparse and the handlers of signals are imported here; a verb imports what it needs when it is called, so that
help and mistakes in the arguments answer at once instead of after torch and Ray have been loaded.
"""

import argparse
import errno
import io
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from pipelines.core import interrupts

EXIT_FAULT = 1  # it may pass: `redux submit --retries` tries again
EXIT_MISUSE = 2
EXIT_INTERRUPTED = 130  # 128 + SIGINT, as a shell reports it


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
    with interrupts.handled():
        try:
            return arguments.verb(arguments) or 0
        except BaseException as error:
            # an interrupt may come out as another error: of an import, of a library, of a Ray that is ending
            if interrupts.received() or isinstance(error, KeyboardInterrupt):
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

    failure, cause = failures.describe(error), failures.find_cause(error)
    if failure.kind == failures.Kind.RAISED or not isinstance(cause, Exception):
        return EXIT_FAULT, []
    if isinstance(cause, ValueError | ImportError):
        return EXIT_MISUSE, [" ".join(problem.split()) for problem in getattr(cause, "problems", [failure.text])]
    code = EXIT_FAULT if failure.kind == failures.Kind.LOST else EXIT_MISUSE
    return code, [f"{failure.text}; what is finished is safe: once this is mended, the same command goes on"]


def _run(arguments: argparse.Namespace) -> None:
    asked, do = _asked(arguments)
    do(asked, arguments.runs_dir / asked.name, arguments.allow_changes)


def _asked(arguments: argparse.Namespace) -> tuple[Any, Callable[[Any, Path, bool], None]]:
    """What a file asks for after overrides, checked: a study, a search or a job; and what does it."""
    from jobs import document

    tree = document.plain(arguments.job)
    if isinstance(tree, dict) and "variants" in tree:
        from jobs import study

        return study.load(arguments.job, arguments.overrides), study.conduct
    if isinstance(tree, dict) and "space" in tree:
        from jobs import search_schema

        search_schema.read(arguments.job, arguments.overrides)  # mistakes that are found without torch and Ray
        from jobs import search

        return search.load(arguments.job, arguments.overrides), search.conduct
    from jobs import schema

    return schema.load(arguments.job, arguments.overrides), _run_job


def _run_job(job: Any, folder: Path, changed: bool) -> None:
    from jobs.run import run

    run(job, folder, changed)


def _submit(arguments: argparse.Namespace) -> int:
    asked, _ = _asked(arguments)
    from dataclasses import fields

    from jobs.cluster import submit

    given = {one.name: getattr(arguments, one.name) for one in fields(submit.Submission) if one.name != "name"}
    return submit.submit(submit.Submission(name=asked.name, **given))


def _jobs(verb: str, *names: str) -> Callable[[argparse.Namespace], int]:
    def call(arguments: argparse.Namespace) -> int:
        from jobs.cluster import remote

        code: int = getattr(remote, verb)(arguments.address, *(getattr(arguments, name) for name in names))
        return code

    return call


def _shards(verb: str) -> Callable[[argparse.Namespace], None]:
    def call(arguments: argparse.Namespace) -> None:
        from jobs import shards

        getattr(shards, verb)(arguments)

    return call


def _cost(arguments: argparse.Namespace) -> None:
    from jobs import cost

    print(cost.table(arguments.presets, arguments.model, arguments.text))


def _score(arguments: argparse.Namespace) -> None:
    from jobs import score

    score.score(arguments)


def _instructions(arguments: argparse.Namespace) -> None:
    from jobs import instructions

    instructions.freeze(arguments)


def _tables(arguments: argparse.Namespace) -> None:
    from jobs import tables

    print(tables.tell(arguments.runs, arguments.out, tables.scorers()), end="")


def _best(arguments: argparse.Namespace) -> None:
    from jobs import search

    for path in search.best(arguments.search, arguments.trials):
        print(path)


def _manifest(arguments: argparse.Namespace) -> None:
    from dataclasses import fields

    from jobs import schema
    from jobs.cluster import manifest

    job, _ = _asked(arguments)
    if not isinstance(job, schema.Job):
        raise ValueError(f"{arguments.job}: got a study or a search, allowed: a job; redux submit takes all three")
    place = manifest.Place(**{one.name: getattr(arguments, one.name) for one in fields(manifest.Place)})
    text = manifest.write(job, place)
    if arguments.out is None:
        print(text, end="")
        return
    try:
        arguments.out.write_text(text)
    except OSError as error:
        raise ValueError(f"--out: {arguments.out}: {error.strerror}") from None
    print(f"{arguments.out}: kubectl create -f {arguments.out}")


def _export(arguments: argparse.Namespace) -> None:
    from jobs import export

    url = export.write(arguments.run, arguments.stage, arguments.step, arguments.out)
    print(f"{arguments.out}: the model of {url}")


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
    parser = _parser()
    arguments, rest = parser.parse_known_args(argv)
    # argparse closes a list of positionals at the first option, so overrides written after --runs-dir are left over
    if any(word.startswith("-") for word in rest) or (rest and "overrides" not in arguments):
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    if rest:
        arguments.overrides.extend(rest)
    return arguments


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="redux",
        description="Train vision-language models that follow instructions, by spending fewer image tokens.",
        epilog="redux VERB --help explains a verb. A first one: redux run jobs/recipes/quickstart.yaml",
    )
    parser.add_argument("--version", action=_Version)
    verbs = parser.add_subparsers(metavar="VERB", required=True)
    run = verbs.add_parser(
        "run",
        help="run a job file, from images to report",
        description="Run a job file: make shards, train, evaluate, report; or a study, several jobs that share their "
        "first stages; or a search for the best settings of one. A finished job is left as it is; an interrupted one "
        "goes on from its last checkpoint. Runs on a Ray started for the purpose, or on the cluster that the "
        "environment variable RAY_ADDRESS names.",
        epilog="example: redux run jobs/recipes/quickstart.yaml seed=1 name=quickstart-1",
    )
    run.add_argument("job", metavar="JOB", type=Path, help="a job file, such as jobs/recipes/quickstart.yaml")
    run.add_argument(
        "overrides",
        metavar="section.key=value",
        nargs="*",
        help="put another value, written as in YAML, in place of the file's",
    )
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
        help="go on although the job, its data or its model differ from those that the run was started with",
    )
    run.set_defaults(verb=_run)
    _add_submit(verbs)
    _add_jobs(verbs)
    _add_shards(verbs)
    export = verbs.add_parser(
        "export",
        help="write a checkpoint, or a model with other weight names, for from_pretrained",
        description="Write the model as it was after a step that was checkpointed, with its tokenizer, chat template "
        "and processor, to a folder or URL. Its weights are those of the checkpoint, checked, where the stage trained "
        "them, and those that the stage began with elsewhere; LoRA's adapters are merged. A model folder is written "
        "with transformers' names for weights that DDP, torch.compile, PEFT or the LLaVA repository named otherwise.",
        epilog="example: redux export runs/quickstart --stage pretrain --out pretrained",
    )
    export.add_argument("run", metavar="RUN", type=Path, help="the folder of a run or of a model")
    export.add_argument("--stage", metavar="NAME", help="default: the last one")
    export.add_argument("--step", metavar="N", type=_count, help="default: the newest one")
    export.add_argument("--out", metavar="URI", required=True, help="a folder that is empty or not there")
    export.set_defaults(verb=_export)
    best = verbs.add_parser(
        "best",
        help="write what a search found as a job file to run",
        description="Write the job of a search, whole, with the settings of a trial. Without TRIAL it is the best "
        "one's, where the search has one objective; where it has several, those are listed that no other dominates.",
        epilog="example: redux best runs/laptop 17 && redux run runs/laptop/best.yaml",
    )
    best.add_argument("search", metavar="SEARCH", type=Path, help="the folder of a search")
    best.add_argument("trials", metavar="TRIAL", nargs="*", type=int, help="number of a trial, as search.html shows it")
    best.set_defaults(verb=_best)
    cost = verbs.add_parser(
        "cost",
        help="show what the paper's configurations leave of an image, and what they cost",
        description="Show, for each preset of redux.presets, the tokens of an image, what each compressing block keeps "
        "and merges, and FLOPs and bytes of the KV cache for a prompt of one image: computed, nothing is run.",
        epilog="example: redux cost default tokens-64 --model runs/quickstart/checkpoints/instruct/model",
    )
    cost.add_argument("presets", metavar="PRESET", nargs="*", help="a name in the table (default: all)")
    cost.add_argument(
        "--model", default="7b", help="7b or 13b for LLaVA-1.5, or the folder of a LLaVA (default: %(default)s)"
    )
    cost.add_argument("--text", metavar="N", type=_count, default=64, help="text tokens (default: %(default)s)")
    cost.set_defaults(verb=_cost)
    _add_manifest(verbs)
    _add_score(verbs)
    instructions = verbs.add_parser(
        "instructions",
        help="freeze the prompts of the sixteen instructions",
        description="Put each of the sixteen instructions to questions about images and write the prompts, one a line, "
        "so that every model answers the same. A job names the file at evaluate.tasks.instructions.files.",
        epilog="example: redux instructions mm-vet.jsonl --out prompts.jsonl",
    )
    instructions.add_argument(
        "questions", metavar="FILE", nargs="?",
        help="question_id, image and text of each as LLaVA's files have them, and answer where it is known; or id, "
        "image, question (default: about easy-VQA's test images)",
    )  # fmt: skip
    instructions.add_argument("--out", metavar="FILE", type=Path, required=True, help="JSON lines")
    instructions.add_argument(
        "--per-task", metavar="N", type=_count, default=218, help="questions for each (default: %(default)s)"
    )
    instructions.add_argument("--seed", metavar="N", type=int, default=0, help="default: %(default)s")
    instructions.set_defaults(verb=_instructions)
    tables = verbs.add_parser(
        "tables",
        help="compare finished runs in the paper's tables",
        description="Show the paper's tables over finished runs, as Markdown: scores with 95 % intervals, differences "
        "to LLaVA, the paper's own numbers, and for each row without a run the command that makes one. Which row a run "
        "is follows from its settings; runs that differ only in seed are one row.",
        epilog="example: redux tables runs --out tables",
    )
    tables.add_argument(
        "runs", metavar="RUN", nargs="+", type=Path, help="the folder of a run, or a folder that holds such folders"
    )
    tables.add_argument(
        "--out", metavar="DIR", type=Path, help="also write tables.md, tables.html and a CSV file for each table there"
    )
    tables.set_defaults(verb=_tables)
    return parser


TOKEN = (
    "Where the cluster asks for a token, it is taken as Ray takes it: RAY_AUTH_MODE=token, and RAY_AUTH_TOKEN, a file "
    "that RAY_AUTH_TOKEN_PATH names, or ~/.ray/auth_token. http is for this machine and private networks only."
)


def _add_submit(verbs: Any) -> None:
    submit = verbs.add_parser(
        "submit",
        help="run a job file on a cluster that is there already",
        description="Check a job file here and have a Ray cluster run it, through Ray's Jobs API. The folder in which "
        "this is called travels with it, and is deleted after it: without data, checkpoints, run folders, links, what "
        ".gitignore and .rayignore name, and what is called like a key or begins with a dot. In a checkout of Redux "
        "its code is what runs, elsewhere the cluster's own. " + TOKEN,
        epilog="example: redux submit jobs/recipes/quickstart.yaml --runs-dir /mnt/redux/runs --retries 3",
    )
    submit.add_argument("job", metavar="JOB", type=Path, help="a job file, a study or a search")
    submit.add_argument("overrides", metavar="section.key=value", nargs="*", help="in place of the file's values")
    _add_address(submit)
    submit.add_argument(
        "--runs-dir", metavar="DIR", default="~/redux/runs",
        help="on the cluster, the run folder is DIR/NAME: where all its machines see it, if there are several, and "
        "where it outlives them (default: %(default)s; in quotes, or this machine's ~ is meant)",
    )  # fmt: skip
    submit.add_argument(
        "--id", metavar="ID",
        help="submit it once only: the same id again shows the job that has it (default: NAME, then NAME-2, …, of "
        "which one at a time may live)",
    )  # fmt: skip
    submit.add_argument(
        "--env", metavar="NAME", action="append", default=[],
        help="have the job see this variable with its value here; can be given again. Who has the cluster's token can "
        "read it by Ray's API: keys are better the cluster's own, as a Secret's or by a service account's rights",
    )  # fmt: skip
    submit.add_argument(
        "--wait", action="store_true", help="show its log to the end; the exit code is the job's, 130 where stopped"
    )
    submit.add_argument(
        "--retries", metavar="N", type=_natural, default=0,
        help="wait, and where it fails submit it again, up to N times; it goes on from its last checkpoint. Not where "
        "it was stopped, or cannot be run at all (exit code 2)",
    )  # fmt: skip
    submit.set_defaults(verb=_submit)


def _add_jobs(verbs: Any) -> None:
    jobs = verbs.add_parser(
        "jobs",
        help="list, show, follow or stop jobs on a cluster",
        description="What was submitted to a cluster, by `redux submit` or otherwise. " + TOKEN,
    ).add_subparsers(metavar="WHAT", required=True)
    listing = jobs.add_parser(
        "list", help="a table of all jobs", description="Show all jobs of a cluster, oldest first."
    )
    listing.set_defaults(verb=_jobs("listing"))
    status = jobs.add_parser(
        "status", help="how a job does", description="Show how a job does in one line. The exit code is the job's, 130 "
        "where it was stopped, and 0 while it lives.",
    )  # fmt: skip
    status.set_defaults(verb=_jobs("status", "id"))
    logs = jobs.add_parser("logs", help="what a job says", description="Show what a job has said.")
    logs.add_argument("-f", "--follow", action="store_true", help="until it has ended; the exit code is then the job's")
    logs.set_defaults(verb=_jobs("logs", "id", "follow"))
    stop = jobs.add_parser(
        "stop", help="stop a job after a checkpoint", description="Stop a job and wait until it has stopped. It gets "
        "SIGTERM, on which it makes a checkpoint, and is killed 15 s after the recovery.grace_s of its file have "
        "passed. Submitted again, it goes on from there.",
    )  # fmt: skip
    stop.set_defaults(verb=_jobs("stop", "id"))
    for parser in (status, logs, stop):
        parser.add_argument("id", metavar="ID", help="as submit and list show it")
    for parser in (listing, status, logs, stop):
        _add_address(parser)


def _add_address(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--address", metavar="URL", default=os.environ.get("RAY_API_SERVER_ADDRESS") or "http://127.0.0.1:8265",
        help="of the cluster's dashboard (default: %(default)s, which the environment's RAY_API_SERVER_ADDRESS sets)",
    )  # fmt: skip


def _add_manifest(verbs: Any) -> None:
    manifest = verbs.add_parser(
        "manifest",
        help="write a job as a RayJob for Kubernetes",
        description="Write what Kubernetes with KubeRay (1.5.1 or newer) needs to run a job: its file as a ConfigMap, "
        "a NetworkPolicy that keeps others out, and a RayJob with GPU workers on spot machines, which is started again "
        "and goes on when its head is lost. Numbers of pods, and the time they get to end, are those of the job file.",
        epilog="example: redux manifest jobs/recipes/llava-1.5-7b-redux.yaml name=llava-redux data.sets.mix665k=s3://bucket/"
        "mix665k data.sets.llava-pretrain=s3://bucket/llava-pretrain checkpoints=s3://bucket/checkpoints "
        "--image registry/redux:0.1.0 --volume runs:/mnt/redux --out job.k8s.yaml",
    )
    manifest.add_argument("job", metavar="JOB", type=Path, help="a job file")
    manifest.add_argument("overrides", metavar="section.key=value", nargs="*", help="in place of the file's values")
    manifest.add_argument("--out", metavar="FILE", type=Path, help="default: print it")
    add = manifest.add_argument_group("pods").add_argument
    add("--image", metavar="IMAGE", required=True, help="as built from cluster/Dockerfile")
    add(
        "--volume", metavar="CLAIM:PATH", type=_pair("CLAIM:PATH"), required=True,
        help="the PersistentVolumeClaim (ReadWriteMany) that all pods see at PATH; run folders are in PATH/runs",
    )  # fmt: skip
    add("--gpus-per-worker-pod", metavar="N", type=_count, default=1, help="and workers (default: %(default)s)")
    add("--worker-cpus", metavar="N", type=_count, default=8, help="of each worker (default: %(default)s)")
    add("--worker-memory", metavar="GIB", type=_count, default=64, help="of each worker (default: %(default)s)")
    add("--head-cpus", metavar="N", type=_count, default=4, help="default: %(default)s")
    add(
        "--head-memory", metavar="GIB", type=_count, default=32,
        help="pretrained parts are put together in it (default: %(default)s)",
    )  # fmt: skip
    add("--service-account", metavar="NAME", help="with rights at the cloud: buckets without keys")
    add("--secret", metavar="NAME", help="whose keys the pods have as environment, such as WANDB_API_KEY, HF_TOKEN")
    _add_place(manifest)
    manifest.set_defaults(verb=_manifest)


def _add_place(manifest: argparse.ArgumentParser) -> None:
    add = manifest.add_argument_group("machines and faults").add_argument
    add(
        "--spot-label", metavar="KEY=VALUE", type=_pair("KEY=VALUE"), default=("karpenter.sh/capacity-type", "spot"),
        help="of spot machines, for the workers alone; also their taint (default: karpenter.sh/capacity-type=spot; of "
        "GKE cloud.google.com/gke-spot=true, of EKS eks.amazonaws.com/capacityType=SPOT)",
    )  # fmt: skip
    add(
        "--node-label", metavar="KEY=VALUE", type=_pair("KEY=VALUE"), action="append", default=[],
        help="more that worker machines must have, such as the kind of GPU; can be given again",
    )  # fmt: skip
    add("--queue", metavar="NAME", help="start all pods or none, when this queue has room")
    add(
        "--scheduler", choices=("kueue", "volcano", "yunikorn"), default="kueue",
        help="whose queue it is; KubeRay must have been told of the latter two (default: %(default)s)",
    )  # fmt: skip
    add("--retries", metavar="N", type=_natural, default=3, help="of the whole job (default: %(default)s)")
    add(
        "--deadline", metavar="SECONDS", dest="deadline_s", type=_count,
        help="end a try after so long, and try no more (default: never)",
    )  # fmt: skip
    add(
        "--redis", metavar="HOST:PORT", type=_pair("HOST:PORT"),
        help="keep Ray's own state there, which then outlives its head; the job's driver does not, see --retries",
    )  # fmt: skip
    add("--redis-secret", metavar="NAME:KEY", type=_pair("NAME:KEY"), help="the Secret with its password")
    add(
        "--egress", metavar="CIDR:PORT", type=_pair("CIDR:PORT"), action="append", default=[],
        help="what pods may reach besides each other, DNS and HTTPS; can be given again",
    )  # fmt: skip
    add(
        "--operator-namespace", metavar="NAME", default="kuberay-system",
        help="KubeRay's, which may ask the head how the job does (default: %(default)s)",
    )  # fmt: skip


def _add_score(verbs: Any) -> None:
    score = verbs.add_parser(
        "score",
        help="score a file of answers to a benchmark",
        description="Score answers to a benchmark as its official scorer does, and print the scores as one line of "
        "JSON. Answers are in the benchmark's official format of results, in LLaVA's, or lines {id, response}; one to "
        "a question that is not there is an error, a missing one is wrong and counted. For instructions, answers are "
        "lines {instruction_id, kwargs, response}, and a line {strict, loose} is printed for each.",
        epilog="example: redux score vqav2 --answers merge.jsonl "
        "--questions v2_OpenEnded_mscoco_val2014_questions.json v2_mscoco_val2014_annotations.json",
    )
    score.add_argument("task", metavar="TASK", help="vqav2, gqa, textvqa, mme, mmbench or instructions")
    score.add_argument("--answers", metavar="FILE", required=True, help="path or URL; a folder for mme's official form")
    score.add_argument("--questions", metavar="FILE", nargs="+", help="the benchmark's official files")
    score.add_argument(
        "--submission", metavar="OUT", type=Path, help="also write what vqav2's server takes, for every question"
    )
    score.set_defaults(verb=_score)


def _add_shards(verbs: Any) -> None:
    shards = verbs.add_parser(
        "shards",
        help="make, index or verify WebDataset shards",
        description="Make WebDataset shards of LLaVA's JSON files, index those of others, verify what is there. "
        "Folders are local or any URL that fsspec knows, such as s3://bucket/folder.",
    ).add_subparsers(metavar="WHAT", required=True)
    make = shards.add_parser(
        "make",
        help="make shards of a JSON file and its images",
        description="Write the records of a JSON file of LLaVA's form, and their images, as shards with an index. "
        "Records that cannot be used are listed in quarantine.jsonl with a reason. An interrupted making goes on when "
        "it is started again.",
        epilog="example: redux shards make --json llava_v1_5_mix665k.json --images data --out s3://bucket/mix665k "
        "--tolerance 0.001",
    )
    source = make.add_mutually_exclusive_group(required=True)
    source.add_argument(
        "--json", metavar="FILE", help="a list of records: id, image (none for text alone), conversations"
    )
    source.add_argument("--easy-vqa", choices=("train", "test"), help="easy-VQA's conversations instead of a file")
    make.add_argument("--images", metavar="DIR", default=".", help="folder of the images (default: here)")
    make.add_argument("--out", metavar="URI", required=True, help="folder of the shards")
    make.add_argument("--samples-per-shard", metavar="N", type=_count, default=1000, help="default: %(default)s")
    make.add_argument("--words", metavar="N", type=_count, help="keep longer records out (default: keep any)")
    make.add_argument(
        "--size", metavar="N", type=_count,
        help="store images as squares of N x N pixels, which load twenty times faster; 340 kB each for 336",
    )  # fmt: skip
    make.add_argument(
        "--fit", choices=("pad", "crop"), default="pad", help="how --size makes squares (default: %(default)s)"
    )
    make.add_argument(
        "--tolerance", metavar="SHARE", type=_share, default=0.0,
        help="fail if more than this share of the records cannot be used (default: %(default)s)",
    )  # fmt: skip
    make.set_defaults(verb=_shards("make"))
    index = shards.add_parser(
        "index",
        help="write the index of tars that others made",
        description="Write the index of WebDataset tars that others made: the samples that WebDataset reads. Each "
        "needs KEY.json, LLaVA's record, and beside it KEY.jpg (or png, webp, ...) or no image. A key ends at the "
        "first dot of a file's name, and members of a sample stand together (tar --sort=name). Samples that cannot be "
        "used are listed in quarantine.jsonl with a reason; every member is counted as used, ignored or refused.",
        epilog="example: redux shards index s3://bucket/tars-of-others",
    )
    index.add_argument(
        "--tolerance", metavar="SHARE", type=_share, default=0.0,
        help="fail if more than this share of the samples cannot be used (default: %(default)s)",
    )  # fmt: skip
    verify = shards.add_parser(
        "verify",
        help="check that a set is what its index says, and what a run used of it",
        description="Check a set against its index, byte for byte. With --consumed, instead check by a run's log, "
        "consumed.jsonl, that each stage used each sample exactly once an epoch.",
        epilog="example: redux shards verify runs/quickstart/shards/captions --consumed runs/quickstart",
    )
    verify.add_argument("--decode", action="store_true", help="also decode every image")
    verify.add_argument("--consumed", metavar="RUN", type=Path, help="the folder of a run that trained on the set")
    for name, parser in (("index", index), ("verify", verify)):
        parser.add_argument("folder", metavar="URI", help="folder of the shards")
        parser.set_defaults(verb=_shards(name))


def _share(text: str) -> float:
    try:
        share = float(text)
    except ValueError:
        share = -1
    if not 0 <= share <= 1:
        raise argparse.ArgumentTypeError(f"got {text}, allowed: a number from 0 to 1")
    return share


def _count(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"got {text}, allowed: a whole number >= 1")
    return int(text)


def _natural(text: str) -> int:
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"got {text}, allowed: a whole number >= 0")
    return int(text)


def _pair(form: str) -> Callable[[str], tuple[str, str]]:
    """Two words as `form` has them, such as KEY=VALUE or HOST:PORT."""
    separator = "=" if "=" in form else ":"

    def pair(text: str) -> tuple[str, str]:
        left, _, right = text.rpartition(separator)
        if not left or not right or (form.endswith("PORT") and not right.isdecimal()):
            raise argparse.ArgumentTypeError(f"got {text}, allowed: {form}")
        return left, right

    return pair


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
