"""`redux submit`, `jobs` and `manifest`: jobs on a Ray cluster or on Kubernetes."""

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

from jobs.cli.arguments import (
    EXAMPLE_JOB,
    TOKEN_HELP,
    add_address,
    add_job,
    build_options,
    build_pair_parser,
    parse_count,
    parse_natural,
)
from jobs.cli.runs import load


def add_parsers(verbs: Any) -> None:
    """Add the parsers of this group."""
    _add_submit(verbs)
    _add_jobs(verbs)
    _add_manifest(verbs)


def _add_submit(verbs: Any) -> None:
    submit = verbs.add_parser(
        "submit",
        help="run a job file on an existing Ray cluster",
        description="Check a job file here and run it on a Ray cluster through Ray's Jobs API. The current folder is "
        "copied to the cluster. The copy is deleted after the job. These are not copied: data, checkpoints, run "
        "folders, links, files that .gitignore or .rayignore list, and files whose names look like keys or begin with "
        "a dot. In a clone of Redux, the job runs the code of the clone, otherwise that of the cluster. " + TOKEN_HELP,
        epilog=f"example: redux submit {EXAMPLE_JOB} --runs-dir /mnt/redux/runs --retries 3",
    )
    add_job(submit, "a job file, which may be a study or a search")
    add_address(submit)
    add = submit.add_argument
    add(
        "--runs-dir", metavar="DIR", default="~/redux/runs",
        help="the run folder is DIR/NAME on the cluster. Use a shared, persistent folder. Quote ~, or the shell "
        "replaces it with the home folder of this machine (default: %(default)s)",
    )  # fmt: skip
    add(
        "--id", metavar="ID",
        help="submission id (default: NAME; if jobs with this name exist, NAME-2, NAME-3, ...). A second "
        "submission with the same id does not start a job, but shows the existing one. Two jobs of one run folder "
        "cannot be active at the same time",
    )  # fmt: skip
    add(
        "--env", metavar="NAME", action="append", default=[],
        help="pass this environment variable to the job; repeatable. Anyone with the token of the cluster can read its "
        "value. So store keys in the cluster itself, as a Secret or a service account",
    )  # fmt: skip
    add("--wait", action="store_true", help="follow the log; the exit code is that of the job, 130 if it was stopped")
    add(
        "--retries", metavar="N", type=parse_natural, default=0,
        help="wait for the job. Submit a failed job again, up to N times; it resumes from its last checkpoint. A job "
        "that was stopped, or that ended with exit code 2, is not submitted again",
    )  # fmt: skip
    submit.set_defaults(verb=_submit)


def _submit(arguments: argparse.Namespace) -> int:
    from jobs.cluster import submit

    settings, _ = load(arguments)
    return submit.submit(build_options(submit.Submission, arguments, name=settings.name))


def _add_jobs(verbs: Any) -> None:
    jobs = verbs.add_parser(
        "jobs",
        help="list, follow or stop the jobs of a cluster",
        description="Work with the jobs of a Ray cluster, also with jobs that another program submitted. " + TOKEN_HELP,
    ).add_subparsers(metavar="ACTION", required=True)
    list_ = jobs.add_parser(
        "list", help="show a table of all jobs", description="Show all jobs of a cluster, oldest first."
    )
    list_.set_defaults(verb=_call("print_jobs"))
    status = jobs.add_parser(
        "status",
        help="show the status of a job",
        description="Show the status of a job in one line. The exit code is that of the job, 130 if it was stopped, "
        "and 0 while it is active.",
    )
    status.set_defaults(verb=_call("print_status", "id"))
    logs = jobs.add_parser("logs", help="show the log of a job", description="Show the log of a job.")
    logs.add_argument(
        "-f",
        "--follow",
        action="store_true",
        help="follow the log until the job ends. The exit code is that of the job",
    )
    logs.set_defaults(verb=_call("print_logs", "id", "follow"))
    stop = jobs.add_parser(
        "stop",
        help="stop a job after a checkpoint",
        description="Stop a job and wait until it has ended. The job gets SIGTERM and writes a checkpoint. It is "
        "killed after recovery.grace_s + 15 seconds. If it is submitted again, it resumes from the "
        "checkpoint.",
    )
    stop.set_defaults(verb=_call("stop_job", "id"))
    for parser in (status, logs, stop):
        parser.add_argument("id", metavar="ID", help="the id that submit and list show")
    for parser in (list_, status, logs, stop):
        add_address(parser)


def _call(function: str, *names: str) -> Callable[[argparse.Namespace], int]:
    """Build a handler that calls a function of jobs.cluster.remote with the address and the named arguments."""

    def call(arguments: argparse.Namespace) -> int:
        from jobs.cluster import remote

        code: int = getattr(remote, function)(arguments.address, *(getattr(arguments, name) for name in names))
        return code

    return call


def _add_manifest(verbs: Any) -> None:
    manifest = verbs.add_parser(
        "manifest",
        help="write a job as a RayJob for Kubernetes",
        description="Write the Kubernetes objects that run a job with KubeRay (1.5.1 or newer): a ConfigMap with the "
        "job file, a NetworkPolicy that blocks other pods, and a RayJob with GPU workers on spot machines. If its head "
        "is lost, the RayJob restarts and resumes. The job file sets the number of pods and their grace period.",
        epilog="example: redux manifest jobs/recipes/llava-1.5-7b-redux.yaml name=llava-redux num_workers=8 "
        "data.sets.mix665k=s3://bucket/mix665k data.sets.llava-pretrain=s3://bucket/llava-pretrain "
        "checkpoints=s3://bucket/checkpoints --image registry/redux:0.1.0 --volume runs:/mnt/redux --out job.k8s.yaml",
    )
    add_job(manifest, "a job file")
    manifest.add_argument("--out", metavar="FILE", type=Path, help="output file (default: print it)")
    _add_pods(manifest)
    _add_machines(manifest)
    _add_network(manifest)
    manifest.set_defaults(verb=_manifest)


def _add_pods(manifest: argparse.ArgumentParser) -> None:
    add = manifest.add_argument_group("pods").add_argument
    add("--image", metavar="IMAGE", required=True, help="image built from cluster/Dockerfile")
    add(
        "--volume", metavar="CLAIM:PATH", type=build_pair_parser("CLAIM:PATH"), required=True,
        help="PersistentVolumeClaim (ReadWriteMany) that all pods mount at PATH; run folders are in PATH/runs",
    )  # fmt: skip
    add(
        "--gpus-per-worker-pod", metavar="N", type=parse_count, default=1,
        help="GPUs per worker pod; each GPU has one worker (default: %(default)s)",
    )  # fmt: skip
    add("--worker-cpus", metavar="N", type=parse_count, default=8, help="CPUs per worker (default: %(default)s)")
    add("--worker-memory", metavar="GIB", type=parse_count, default=64, help="memory per worker (default: %(default)s)")
    add("--head-cpus", metavar="N", type=parse_count, default=4, help="CPUs of the head (default: %(default)s)")
    add(
        "--head-memory", metavar="GIB", type=parse_count, default=32,
        help="memory of the head, which assembles pretrained parts (default: %(default)s)",
    )  # fmt: skip
    add("--service-account", metavar="NAME", help="service account with cloud rights, for buckets without keys")
    add("--secret", metavar="NAME", help="Secret whose keys become environment variables, such as HF_TOKEN")


def _add_machines(manifest: argparse.ArgumentParser) -> None:
    add = manifest.add_argument_group("machines and faults").add_argument
    add(
        "--spot-label", metavar="KEY=VALUE", type=build_pair_parser("KEY=VALUE"),
        default=("karpenter.sh/capacity-type", "spot"),
        help="label and taint of spot machines. Only workers run on them (default: karpenter.sh/capacity-type=spot; "
        "GKE: cloud.google.com/gke-spot=true; EKS: eks.amazonaws.com/capacityType=SPOT)",
    )  # fmt: skip
    add(
        "--node-label", metavar="KEY=VALUE", type=build_pair_parser("KEY=VALUE"), action="append", default=[],
        help="further label that worker machines must have, such as the type of GPU; repeatable",
    )  # fmt: skip
    add("--queue", metavar="NAME", help="queue that starts all pods together when resources are free")
    add(
        "--scheduler", choices=("kueue", "volcano", "yunikorn"), default="kueue",
        help="scheduler of the queue; KubeRay must be configured for volcano and yunikorn (default: %(default)s)",
    )  # fmt: skip
    add(
        "--retries", metavar="N", type=parse_natural, default=3,
        help="start a new Ray cluster after a failure, up to N times (default: %(default)s)",
    )  # fmt: skip
    add(
        "--deadline", metavar="SECONDS", dest="deadline_s", type=parse_count,
        help="end the job after this time, without further retries (default: never)",
    )  # fmt: skip


def _add_network(manifest: argparse.ArgumentParser) -> None:
    add = manifest.add_argument_group("network").add_argument
    add(
        "--redis", metavar="HOST:PORT", type=build_pair_parser("HOST:PORT"),
        help="store Ray's state in Redis, so that it outlives the head. The driver is still lost, see --retries",
    )  # fmt: skip
    add(
        "--redis-secret", metavar="NAME:KEY", type=build_pair_parser("NAME:KEY"),
        help="Secret with the password of Redis",
    )  # fmt: skip
    add(
        "--egress", metavar="CIDR:PORT", type=build_pair_parser("CIDR:PORT"), action="append", default=[],
        help="address that pods may reach besides each other, DNS and HTTPS; repeatable",
    )  # fmt: skip
    add(
        "--operator-namespace", metavar="NAME", default="kuberay-system",
        help="namespace of KubeRay, which asks the head for the status of the job (default: %(default)s)",
    )  # fmt: skip


def _manifest(arguments: argparse.Namespace) -> None:
    from jobs import schema
    from jobs.cluster import manifest
    from jobs.cluster.kubernetes_options import KubernetesOptions

    job, _ = load(arguments)
    if not isinstance(job, schema.Job):
        raise ValueError(f"{arguments.job}: got a study or a search, allowed: a job; redux submit takes all three")
    text = manifest.write_manifest(job, build_options(KubernetesOptions, arguments))
    if arguments.out is None:
        print(text, end="")
        return
    try:
        arguments.out.write_text(text, encoding="utf-8")
    except OSError as error:
        raise ValueError(f"--out: got {arguments.out}, allowed: a file that can be written; {error.strerror}") from None
    print(f"{arguments.out}: kubectl create -f {arguments.out}")
