"""Write a job as Kubernetes objects for KubeRay, which creates a Ray cluster and starts the job (`redux manifest`).

The objects are a ConfigMap with the resolved job, a NetworkPolicy, and a RayJob that runs `redux run` on the ConfigMap.
What the job file says is derived, not configured again: workers become pods, recovery.grace_s becomes the grace period
of a pod. Options hold only what depends on the cluster: its volume, queue and labels.

A retry is a new Ray cluster with the same job, so results must be stored where it finds them: the run folder on a
volume that all pods share, checkpoints there or at a URL. Only workers run on spot machines: if the head were lost, the
driver would be lost with it.

This module never contacts a cluster. Fields are those of KubeRay 1.7's RayJob (ray.io/v1); all exist since 1.5.1, the
first version with token authentication. Secrets are named, never written.
"""

import importlib.metadata
import ipaddress
import math
import re
import shlex
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import yaml

from jobs import schema
from jobs.schema import Job

Tree = dict[str, Any]
Pair = tuple[str, str]

NAME = re.compile(r"[a-z]([-a-z0-9]{0,45}[a-z0-9])?")
"""What KubeRay takes as a RayJob's name (RFC 1035): it appends to it for services, whose names end at 63 characters."""

PASSWORD = re.compile(r"(?:([\w.-]+): )?\S*://[^/@\s]*:[^/@\s]+@")
"""In a line of YAML: its key if it has one, and a URL that says who comes and with which password."""

Shape = tuple[Callable[[str], object], str]
"""Whether Kubernetes takes a text for something, and what it takes in words."""


def _is_network(text: str) -> bool:
    try:
        ipaddress.ip_network(text)
    except ValueError:
        return False
    return True


_DNS, _VALUE = r"[a-z0-9]([-.a-z0-9]{0,251}[a-z0-9])?", r"[A-Za-z0-9]([-_.A-Za-z0-9]{0,61}[A-Za-z0-9])?"
_ENDS = "at both ends a letter or digit"
DNS: Shape = re.compile(_DNS).fullmatch, f"up to 253 of a-z, 0-9, - and ., {_ENDS}"
VALUE: Shape = re.compile(_VALUE).fullmatch, f"up to 63 letters, digits, -, _ and ., {_ENDS}"
LABEL_KEY: Shape = re.compile(f"({_DNS}/)?{_VALUE}").fullmatch, f"{VALUE[1]}, perhaps behind a domain and a /"
IMAGE_NAME: Shape = re.compile(r"\w[\w.:/@-]*").fullmatch, "an image's name"
PORT: Shape = lambda text: 0 < int(text) < 65536, "a port, 1 to 65535"
NETWORK: Shape = _is_network, "a network such as 10.0.0.0/8"

RESERVED_DIRS = ("/bin", "/dev", "/etc", "/home", "/lib", "/proc", "/run", "/sbin", "/sys", "/tmp", "/usr", "/var")
"""Folders of an image and of Ray that a volume would hide or, of /tmp, have all pods share."""

JOB_MOUNT = "/etc/redux"
"""Where a pod finds the job: Kubernetes mounts folders, of a ConfigMap one file for each key."""

LABEL = "redux-job"
"""On every pod of a job.  KubeRay's own label has the name of the Ray, another one for every retry."""

USER = 1000
"""The image's, whose group may write on the volume."""

STOP_MARGIN_S = 15
"""How much longer than the grace a pod has to end."""

KEPT_S = 600
"""How long a finished job's pods stay, for their logs."""

IDLE_S = 300
"""After how long without work the autoscaler takes a worker away: longer than workers take to start again."""

SCHEDULERS: dict[str, Callable[[str, str], dict[str, str]]] = {
    "kueue": lambda name, queue: {"kueue.x-k8s.io/queue-name": queue},
    "volcano": lambda name, queue: {"volcano.sh/queue-name": queue},
    "yunikorn": lambda name, queue: {
        "ray.io/gang-scheduling-enabled": "true",
        "yunikorn.apache.org/app-id": name,
        "yunikorn.apache.org/queue": queue,
    },
}
"""Labels that have all pods of a job start together or none, by scheduler, for a job's name and a queue."""


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
        deadline_s: seconds after which a try ends without another one.
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
    def kueue(self) -> bool:
        return self.queue is not None and self.scheduler == "kueue"


def write(job: Job, place: KubernetesOptions) -> str:
    """Write the manifest as YAML with three documents; ValueError if the job cannot run or resume this way."""
    _check(job, place)
    resolved = schema.dump(job)
    _check_passwords(resolved)
    documents = [_config_map(job.name, resolved), _network_policy(job, place), _ray_job(job, place)]
    return yaml.dump_all(documents, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=120)


# --- what cannot be ---------------------------------------------------------------------------------------------------


def _check(job: Job, place: KubernetesOptions) -> None:
    if not NAME.fullmatch(job.name):
        fit = re.sub(r"[^a-z0-9]+", "-", job.name.lower()).lstrip("-0123456789")[:47].rstrip("-") or "job"
        raise ValueError(
            f"name: got {job.name}, allowed: up to 47 of a-z, 0-9 and -, of which the first is a letter and the last "
            f"none but -, such as name={fit}"
        )
    if job.worker_range is None:
        raise ValueError(
            "num_workers: got auto, allowed: a number or a range, such as num_workers=8: pods are made for them"
        )
    (fewest, most), gpus = job.worker_range, place.gpus_per_worker_pod
    if fewest % gpus or most % gpus:
        workers = list(job.num_workers) if isinstance(job.num_workers, tuple) else job.num_workers
        raise ValueError(f"num_workers: got {workers}, allowed: multiples of {gpus}, the GPUs of a worker pod")
    if job.evaluate and isinstance(job.evaluate.num_actors, int) and job.evaluate.num_actors > fewest:
        raise ValueError(
            f"evaluate.num_actors: got {job.evaluate.num_actors}, allowed: up to {fewest}, "
            "the GPUs that are certain to be there"
        )
    if place.kueue and fewest < most:
        raise ValueError(f"num_workers: got {[fewest, most]}, allowed: one number, as Kueue sets room aside for all")
    _check_place(place)
    _check_folders(job, PurePosixPath(place.volume[1]))


def _check_place(place: KubernetesOptions) -> None:
    """Check the options; ValueError if Kubernetes would refuse or misread one."""
    if place.redis_secret and not place.redis:
        raise ValueError("--redis-secret: got one without --redis, allowed: both")
    if place.scheduler != "kueue" and not place.queue:
        raise ValueError(f"--scheduler: got {place.scheduler} without --queue, allowed: both")
    if place.spot_label[0] in dict(place.node_label):
        raise ValueError(f"--node-label: got {place.spot_label[0]}, allowed: another key than that of --spot-label")
    for option, text, (takes, what) in _asked(place):
        if not takes(text):
            raise ValueError(f"{option}: got {text or 'nothing'}, allowed: {what}")


def _asked(place: KubernetesOptions) -> Iterator[tuple[str, str, Shape]]:
    """List the options that are set, each with the pattern of its text."""
    yield "--image", place.image, IMAGE_NAME
    yield "--volume", place.volume[0], DNS
    yield "--operator-namespace", place.operator_namespace, DNS
    if place.service_account is not None:
        yield "--service-account", place.service_account, DNS
    if place.secret is not None:
        yield "--secret", place.secret, DNS
    if place.queue is not None:
        yield "--queue", place.queue, VALUE
    pairs: list[tuple[str, Sequence[Pair | None], tuple[Shape, Shape]]] = [
        ("--redis", [place.redis], (DNS, PORT)),
        ("--redis-secret", [place.redis_secret], (DNS, VALUE)),
        ("--spot-label", [place.spot_label], (LABEL_KEY, VALUE)),
        ("--node-label", place.node_label, (LABEL_KEY, VALUE)),
        ("--egress", place.egress, (NETWORK, PORT)),
    ]
    for option, given, shapes in pairs:
        for pair in filter(None, given):
            for text, shape in zip(pair, shapes, strict=True):
                yield option, text, shape


def _check_folders(job: Job, volume: PurePosixPath) -> None:
    """Check paths; ValueError if the job uses a path of this machine alone, or the volume hides a path of a pod."""
    taken = [
        one for one in map(PurePosixPath, RESERVED_DIRS) if volume.is_relative_to(one) or one.is_relative_to(volume)
    ]
    if not volume.is_absolute() or ".." in volume.parts or taken:
        raise ValueError(f"--volume: got {volume}, allowed: a folder of its own, from the root on, such as /mnt/redux")
    for where, folder in _folders(job):
        local = folder.removeprefix("file://")
        path = PurePosixPath(local)
        if "://" not in local and (".." in path.parts or not path.is_relative_to(volume)):
            raise ValueError(
                f"{where}: got {folder}, allowed: a URL, or a path in {volume}, which all pods and a retry find again"
            )


def _folders(job: Job) -> Iterator[Pair]:
    """List the folders and files of a job, with their keys. A model may also be a hub id, which is not listed."""
    if job.checkpoints:
        yield "checkpoints", job.checkpoints
    for name, folder in job.data.sets.items():
        yield f"data.sets.{name}", folder
    for name, make in job.data.make.items():
        yield f"data.make.{name}.json", make.json
        if make.images != type(make).images:
            yield f"data.make.{name}.images", make.images
    for part in ("tower", "language", "checkpoint"):
        named = getattr(job.model, part)
        if isinstance(named, str) and (named.startswith(("/", ".", "~", "file:")) or Path(named).is_dir()):
            yield f"model.{part}", named
    for task, asking in job.evaluate.tasks.items() if job.evaluate else ():
        for file in asking.files:
            yield f"evaluate.tasks.{task}.files", file
        if asking.images:
            yield f"evaluate.tasks.{task}.images", asking.images


def _check_passwords(resolved: str) -> None:
    """Check that no URL of the job holds a secret, since others can read the ConfigMap; ValueError otherwise."""
    if found := PASSWORD.search(resolved):
        raise ValueError(
            f"{found[1] or 'the job'}: a URL with a password, allowed: one without, and rights by --service-account"
        )


# --- the three objects ------------------------------------------------------------------------------------------------


def _config_map(name: str, resolved: str) -> Tree:
    return {"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": name}, "data": {"job.yaml": resolved}}


def _network_policy(job: Job, place: KubernetesOptions) -> Tree:
    """Allow traffic among the pods of the job, from the operator to the dashboard, and out to DNS, HTTPS and egress."""
    own = {"podSelector": {"matchLabels": {LABEL: job.name}}}
    operator = {
        "namespaceSelector": {"matchLabels": {"kubernetes.io/metadata.name": place.operator_namespace}},
        "podSelector": {"matchLabels": {"app.kubernetes.io/component": "kuberay-operator"}},
    }
    return {
        "apiVersion": "networking.k8s.io/v1",
        "kind": "NetworkPolicy",
        "metadata": {"name": job.name},
        "spec": {
            **own,
            "policyTypes": ["Ingress", "Egress"],
            "ingress": [{"from": [own]}, {"from": [operator], "ports": _ports("TCP", 8265)}],
            "egress": [
                {"to": [own]},
                {"ports": [*_ports("UDP", 53), *_ports("TCP", 53)]},
                # buckets, hubs, and the API server, which the autoscaler asks; some have it at 6443
                {"ports": _ports("TCP", 443, 6443)},
                *({"ports": _ports("TCP", int(port))} for _, port in filter(None, [place.redis])),
                *(
                    {"to": [{"ipBlock": {"cidr": net}}], "ports": _ports("TCP", int(port))}
                    for net, port in place.egress
                ),
            ],
        },
    }


def _ports(protocol: str, *ports: int) -> list[Tree]:
    return [{"protocol": protocol, "port": port} for port in ports]


def _ray_job(job: Job, place: KubernetesOptions) -> Tree:
    into = PurePosixPath(place.volume[1]) / "runs"
    labels = SCHEDULERS[place.scheduler](job.name, place.queue) if place.queue else {}
    return {
        "apiVersion": "ray.io/v1",
        "kind": "RayJob",
        "metadata": {"name": job.name, **({"labels": labels} if labels else {})},
        "spec": _given(
            suspend=place.kueue or None,  # until Kueue has room for it
            entrypoint=f"redux run {JOB_MOUNT}/job.yaml --runs-dir {shlex.quote(str(into))}",
            submissionMode="K8sJobMode",
            backoffLimit=place.retries,
            activeDeadlineSeconds=place.deadline_s,
            shutdownAfterJobFinishes=True,
            ttlSecondsAfterFinished=KEPT_S,
            submitterPodTemplate=_submitter(job, place),
            rayClusterSpec=_ray_cluster(job, place),
        ),
    }


def _ray_cluster(job: Job, place: KubernetesOptions) -> Tree:
    assert job.worker_range  # _check has seen to it
    fewest, most = job.worker_range
    elastic = fewest < most
    return _given(
        rayVersion=importlib.metadata.version("ray"),
        authOptions={"mode": "token"},
        enableInTreeAutoscaling=elastic,
        autoscalerOptions={"version": "v2", "idleTimeoutSeconds": IDLE_S, "securityContext": _confined()}
        if elastic
        else None,
        gcsFaultToleranceOptions=_redis(place) if place.redis else None,
        headGroupSpec={
            "serviceType": "ClusterIP",
            "enableIngress": False,
            "rayStartParams": {"num-cpus": "0"},  # the driver is there, and no task that could crowd it out
            "template": _head(job, place),
        },
        workerGroupSpecs=[
            {
                "groupName": "gpu",
                "replicas": fewest // place.gpus_per_worker_pod,
                "minReplicas": fewest // place.gpus_per_worker_pod,
                "maxReplicas": most // place.gpus_per_worker_pod,
                "rayStartParams": {},
                "template": _worker(job, place),
            }
        ],
    )


def _redis(place: KubernetesOptions) -> Tree:
    assert place.redis
    password = None
    if place.redis_secret:
        name, key = place.redis_secret
        password = {"valueFrom": {"secretKeyRef": {"name": name, "key": key}}}
    return _given(redisAddress=":".join(place.redis), redisPassword=password)


# --- pods -------------------------------------------------------------------------------------------------------------


def _head(job: Job, place: KubernetesOptions) -> Tree:
    """Build the head pod, on any machine that is not labelled as spot."""
    key, value = place.spot_label
    other = {"nodeSelectorTerms": [{"matchExpressions": [{"key": key, "operator": "NotIn", "values": [value]}]}]}
    container = {
        "name": "ray-head",
        **_container(place, cpu=place.head_cpus, memory=f"{place.head_memory}Gi"),
        # without Ray Client's, which nothing here needs
        "ports": [{"containerPort": 6379, "name": "gcs-server"}, {"containerPort": 8265, "name": "dashboard"}],
    }
    assert job.worker_range  # _check has seen to it
    fewest, most = job.worker_range
    return _pod(
        job,
        place,
        container,
        # the autoscaler is a container of this pod and asks Kubernetes for workers
        automountServiceAccountToken=fewest < most,
        affinity={"nodeAffinity": {"requiredDuringSchedulingIgnoredDuringExecution": other}},
    )


def _worker(job: Job, place: KubernetesOptions) -> Tree:
    key, value = place.spot_label
    gpus, grace_s = place.gpus_per_worker_pod, job.recovery.grace_s
    container = {
        "name": "ray-worker",
        **_container(
            place,
            cpu=gpus * place.worker_cpus,
            memory=f"{gpus * place.worker_memory}Gi",
            **{"nvidia.com/gpu": gpus},
        ),
        # on SIGTERM Ray tells the workers of a preemption and keeps them running so long; its own is 30
        "env": [{"name": "RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S", "value": f"{grace_s:g}"}],
    }
    return _pod(
        job,
        place,
        container,
        automountServiceAccountToken=False,
        terminationGracePeriodSeconds=math.ceil(grace_s) + STOP_MARGIN_S,
        nodeSelector={key: value, **dict(place.node_label)},
        tolerations=[
            {"key": key, "operator": "Equal", "value": value, "effect": "NoSchedule"},
            {"key": "nvidia.com/gpu", "operator": "Exists", "effect": "NoSchedule"},
        ],
    )


def _submitter(job: Job, place: KubernetesOptions) -> Tree:
    """Build the pod that submits the job to the head and follows its log; KubeRay sets its command."""
    container = {
        "name": "ray-job-submitter",
        "image": place.image,
        "resources": _resources(cpu=1, memory="1Gi"),
        "securityContext": _confined(),
    }
    return {
        "metadata": {"labels": {LABEL: job.name}},
        "spec": {
            "restartPolicy": "Never",
            "automountServiceAccountToken": False,
            "securityContext": _user(),
            "containers": [container],
        },
    }


def _pod(job: Job, place: KubernetesOptions, container: Tree, **spec: Any) -> Tree:
    """Build a pod of Ray with the job and the volume, without rights on its machine."""
    claim, _ = place.volume
    return {
        "metadata": {"labels": {LABEL: job.name}},
        "spec": _given(
            serviceAccountName=place.service_account,
            securityContext=_user(),
            **spec,
            containers=[container],
            volumes=[
                {"name": "job", "configMap": {"name": job.name}},
                {"name": "shared", "persistentVolumeClaim": {"claimName": claim}},
            ],
        ),
    }


def _container(place: KubernetesOptions, **resources: Any) -> Tree:
    return _given(
        image=place.image,
        resources=_resources(**resources),
        securityContext=_confined(),
        envFrom=[{"secretRef": {"name": place.secret}}] if place.secret else None,
        volumeMounts=[
            {"name": "job", "mountPath": JOB_MOUNT, "readOnly": True},
            {"name": "shared", "mountPath": place.volume[1]},
        ],
    )


def _resources(**resources: Any) -> Tree:
    """Request exactly the limits: a pod that exceeds its memory would evict others on the machine."""
    return {"requests": resources, "limits": resources}


def _user() -> Tree:
    return {
        "runAsNonRoot": True,
        "fsGroup": USER,
        "fsGroupChangePolicy": "OnRootMismatch",
        "seccompProfile": {"type": "RuntimeDefault"},
    }


def _confined() -> Tree:
    return {"allowPrivilegeEscalation": False, "capabilities": {"drop": ["ALL"]}}


def _given(**values: Any) -> Tree:
    """Drop keys whose value is None."""
    return {name: value for name, value in values.items() if value is not None}


# --- YAML -------------------------------------------------------------------------------------------------------------


class _Dumper(yaml.SafeDumper):
    """Write texts of several lines as blocks, and quote what some YAML reader takes for a number or a boolean."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


def _text(dumper: _Dumper, text: str) -> yaml.ScalarNode:
    other = text[:1] in set("+-.0123456789") or text.lower() in ("y", "n")
    style = "|" if "\n" in text else '"' if other else None
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style=style)


_Dumper.add_representer(str, _text)
