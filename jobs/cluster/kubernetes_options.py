"""Options of a job on Kubernetes, and checks of a job against them before anything is written (`redux manifest`).

Kubernetes would report most mistakes only when it creates the objects, or when a pod starts hours later.
"""

import ipaddress
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any

import yaml

from jobs.layout import list_paths
from jobs.schema import Job

Pair = tuple[str, str]

NAME = re.compile(r"[a-z]([-a-z0-9]{0,45}[a-z0-9])?")
"""Names of a RayJob (RFC 1035): KubeRay appends to them, and names of services have at most 63 characters."""

PASSWORD = re.compile(r"(?:([\w.-]+): )?\S*://[^/@\s]*:[^/@\s]+@")
"""A URL with a user and a password, in a line of YAML; group 1 is the key of the line, if it has one."""

TextRule = tuple[Callable[[str], object], str]
"""Check of a text as Kubernetes makes it, and the allowed texts in words."""


def _is_network(text: str) -> bool:
    try:
        ipaddress.ip_network(text)
    except ValueError:
        return False
    return True


_DNS_PATTERN = r"[a-z0-9]([-.a-z0-9]{0,251}[a-z0-9])?"
_VALUE_PATTERN = r"[A-Za-z0-9]([-_.A-Za-z0-9]{0,61}[A-Za-z0-9])?"
_ENDS_RULE = "a letter or digit at both ends"
DNS_NAME: TextRule = re.compile(_DNS_PATTERN).fullmatch, f"up to 253 of a-z, 0-9, - and ., {_ENDS_RULE}"
LABEL_VALUE: TextRule = re.compile(_VALUE_PATTERN).fullmatch, f"up to 63 letters, digits, -, _ and ., {_ENDS_RULE}"
LABEL_KEY: TextRule = (
    re.compile(f"({_DNS_PATTERN}/)?{_VALUE_PATTERN}").fullmatch,
    f"{LABEL_VALUE[1]}, optionally after a domain and a /",
)
IMAGE_NAME: TextRule = re.compile(r"\w[\w.:/@-]*").fullmatch, "the name of an image"
PORT: TextRule = lambda text: 0 < int(text) < 65536, "a port, 1 to 65535"
NETWORK: TextRule = _is_network, "a network such as 10.0.0.0/8"

RESERVED_DIRS = ("/bin", "/dev", "/etc", "/home", "/lib", "/proc", "/run", "/sbin", "/sys", "/tmp", "/usr", "/var")
"""Folders where no volume can be: it would hide files of the image, and all pods would share /tmp."""


@dataclass(frozen=True, kw_only=True)
class KubernetesOptions:
    """Options of a cluster that a job file does not hold.

    Args:
        image: container image with Redux and the same version of Ray as here.
        volume: claim of a volume that many pods can write at once, and its mount path.
        gpus_per_worker_pod: GPUs of a worker pod; each worker has one.
        worker_cpus: cores of each worker.
        worker_memory: memory of each worker in GiB.
        head_cpus: cores of the head.
        head_memory: memory of the head in GiB; the driver assembles pretrained parts in it.
        spot_label: key and value of the label, and of the taint if there is one, of spot machines.
        node_label: further labels that worker machines must have, such as the type of GPU.
        service_account: service account of the pods, for rights in the cloud.
        secret: Secret whose keys become environment variables.
        scheduler: scheduler of the queue.
        queue: queue in which the job waits until all its pods fit.
        retries: restarts of the whole job.
        deadline_s: seconds after which the job ends without another restart.
        redis: host and port of a Redis in which Ray's state outlives the head.
        redis_secret: Secret and key with the password of Redis.
        egress: networks and ports that pods may reach besides DNS, HTTPS and each other.
        operator_namespace: namespace of KubeRay, which asks the head for the status of the job.
    """

    image: str
    volume: Pair
    gpus_per_worker_pod: int
    worker_cpus: int
    worker_memory: int
    head_cpus: int
    head_memory: int
    spot_label: Pair
    node_label: Sequence[Pair]
    service_account: str | None
    secret: str | None
    scheduler: str
    queue: str | None
    retries: int
    deadline_s: int | None
    redis: Pair | None
    redis_secret: Pair | None
    egress: Sequence[Pair]
    operator_namespace: str

    @property
    def uses_kueue(self) -> bool:
        """True if Kueue starts the job."""
        return self.queue is not None and self.scheduler == "kueue"


def check_kubernetes(job: Job, options: KubernetesOptions, resolved: str) -> None:
    """Check a job with its options.

    Args:
        job: the job.
        options: options of the cluster.
        resolved: the job as YAML, which others can read in the ConfigMap.

    Raises:
        ValueError: Kubernetes would refuse an option, or the job cannot run or resume with these options.
    """
    _check_numbers(job, options)
    _check_options(options)
    _check_paths(yaml.safe_load(resolved), PurePosixPath(options.volume[1]))
    _check_passwords(resolved)


def _check_numbers(job: Job, options: KubernetesOptions) -> None:
    """Check the name of the job and its numbers of workers and actors."""
    if not NAME.fullmatch(job.name):
        # Names of jobs may hold capitals and dots, which names of services may not.
        suggestion = re.sub(r"[^a-z0-9]+", "-", job.name.lower()).lstrip("-0123456789")[:47].rstrip("-") or "job"
        raise ValueError(
            f"name: got {job.name}, allowed: up to 47 of a-z, 0-9 and -, the first is a letter and the last is not -, "
            f"such as name={suggestion}"
        )
    if job.worker_range is None:
        raise ValueError(
            "num_workers: got auto, allowed: a number or a range, such as num_workers=8, because it sets the number of "
            "pods"
        )
    (fewest, most), gpus = job.worker_range, options.gpus_per_worker_pod
    if fewest % gpus or most % gpus:
        workers = list(job.num_workers) if isinstance(job.num_workers, tuple) else job.num_workers
        raise ValueError(f"num_workers: got {workers}, allowed: multiples of {gpus}, the GPUs of a worker pod")
    if job.evaluate and isinstance(job.evaluate.num_actors, int) and job.evaluate.num_actors > fewest:
        raise ValueError(
            f"evaluate.num_actors: got {job.evaluate.num_actors}, allowed: up to {fewest}, "
            "the GPUs that the job always has"
        )
    # Kueue reserves the pods of a job before it starts, and none that the autoscaler adds later.
    if options.uses_kueue and fewest < most:
        raise ValueError(
            f"num_workers: got {[fewest, most]}, allowed: one number, because Kueue reserves a fixed number of pods"
        )


def _check_options(options: KubernetesOptions) -> None:
    """Check the options; ValueError if Kubernetes would refuse or misread one."""
    if options.redis_secret and not options.redis:
        raise ValueError("--redis-secret: got a secret without --redis, allowed: both")
    if options.scheduler != "kueue" and not options.queue:
        raise ValueError(f"--scheduler: got {options.scheduler} without --queue, allowed: both")
    if options.spot_label[0] in dict(options.node_label):
        raise ValueError(f"--node-label: got {options.spot_label[0]}, allowed: another key than that of --spot-label")
    for option, text, (is_allowed, allowed) in _list_texts(options):
        if not is_allowed(text):
            raise ValueError(f"{option}: got {text or 'nothing'}, allowed: {allowed}")


def _list_texts(options: KubernetesOptions) -> Iterator[tuple[str, str, TextRule]]:
    """List the texts of the options that are set: (option, text, rule)."""
    yield "--image", options.image, IMAGE_NAME
    yield "--volume", options.volume[0], DNS_NAME
    yield "--operator-namespace", options.operator_namespace, DNS_NAME
    if options.service_account is not None:
        yield "--service-account", options.service_account, DNS_NAME
    if options.secret is not None:
        yield "--secret", options.secret, DNS_NAME
    if options.queue is not None:
        yield "--queue", options.queue, LABEL_VALUE
    pairs: list[tuple[str, Sequence[Pair | None], tuple[TextRule, TextRule]]] = [
        ("--redis", [options.redis], (DNS_NAME, PORT)),
        ("--redis-secret", [options.redis_secret], (DNS_NAME, LABEL_VALUE)),
        ("--spot-label", [options.spot_label], (LABEL_KEY, LABEL_VALUE)),
        ("--node-label", options.node_label, (LABEL_KEY, LABEL_VALUE)),
        ("--egress", options.egress, (NETWORK, PORT)),
    ]
    for option, values, rules in pairs:
        for pair in filter(None, values):
            for text, rule in zip(pair, rules, strict=True):
                yield option, text, rule


def _check_paths(job: Mapping[str, Any], volume: PurePosixPath) -> None:
    """Check paths; ValueError if the job uses a path of this machine alone, or the volume hides a path of a pod."""
    reserved = [PurePosixPath(folder) for folder in RESERVED_DIRS]
    # In both directions: a volume at / would hide all of them.
    conflicts = [folder for folder in reserved if volume.is_relative_to(folder) or folder.is_relative_to(volume)]
    if not volume.is_absolute() or ".." in volume.parts or conflicts:
        raise ValueError(
            f"--volume: got {volume}, allowed: an absolute path outside system folders, such as /mnt/redux"
        )
    for key, url in list_paths(job):
        local = url.removeprefix("file://")
        path = PurePosixPath(local)
        if "://" not in local and (".." in path.parts or not path.is_relative_to(volume)):
            raise ValueError(
                f"{key}: got {url}, allowed: a URL, or a path in {volume}, which all pods and retries share"
            )


def _check_passwords(resolved: str) -> None:
    """Check that no URL of the job holds a secret, since others can read the ConfigMap; ValueError otherwise."""
    if match := PASSWORD.search(resolved):
        raise ValueError(
            f"{match[1] or 'the job'}: got a URL with a password, allowed: none; --service-account gives rights"
        )
