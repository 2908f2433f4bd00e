"""Write a job as Kubernetes objects for KubeRay, which creates a Ray cluster and starts the job (`redux manifest`).

The objects are a ConfigMap with the resolved job, a NetworkPolicy, and a RayJob that runs `redux run` on the ConfigMap.
Values of the job file are not configured again: workers become pods, and recovery.grace_s becomes the grace period of a
pod. Options hold only what depends on the cluster: its volume, queue and labels.

A retry is a new Ray cluster with the same job, so results must outlive the pods: the run folder is on a volume that
all pods share, checkpoints are there or at a URL. Only workers run on spot machines: if the head were lost, the driver
would be lost with it.

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

JOB_MOUNT = "/etc/redux"
"""Folder in a pod with the file of the job: Kubernetes mounts a ConfigMap as a folder with one file per key."""

LABEL = "redux-job"
"""Label of every pod of a job. KubeRay's label changes with every retry, because it names the Ray cluster."""

USER = 1000
"""User id of the image; its group may write to the volume."""

STOP_MARGIN_S = 15
"""Seconds that a pod has to end after the grace period of the job."""

FINISHED_TTL_S = 600
"""Seconds that the pods of a finished job stay, for their logs."""

IDLE_S = 300
"""Seconds without work after which the autoscaler removes a worker: longer than a restart of workers."""

SCHEDULERS: dict[str, Callable[[str, str], dict[str, str]]] = {
    "kueue": lambda name, queue: {"kueue.x-k8s.io/queue-name": queue},
    "volcano": lambda name, queue: {"volcano.sh/queue-name": queue},
    "yunikorn": lambda name, queue: {
        "ray.io/gang-scheduling-enabled": "true",
        "yunikorn.apache.org/app-id": name,
        "yunikorn.apache.org/queue": queue,
    },
}
"""Functions from the name of a job and a queue to the labels that start all its pods together, by scheduler."""


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


def write_manifest(job: Job, options: KubernetesOptions) -> str:
    """Write the manifest as YAML with three documents.

    Raises:
        ValueError: Kubernetes would refuse an option, or the job cannot run or resume with these options.
    """
    _check_job(job, options)
    _check_options(options)
    _check_paths(job, PurePosixPath(options.volume[1]))
    resolved = schema.dump(job)
    _check_passwords(resolved)
    documents = [
        _build_config_map(job.name, resolved),
        _build_network_policy(job, options),
        _build_ray_job(job, options),
    ]
    return yaml.dump_all(documents, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=120)


# --- checks -----------------------------------------------------------------------------------------------------------


def _check_job(job: Job, options: KubernetesOptions) -> None:
    """Check the name of the job and its numbers of workers and actors."""
    if not NAME.fullmatch(job.name):
        suggestion = re.sub(r"[^a-z0-9]+", "-", job.name.lower()).lstrip("-0123456789")[:47].rstrip("-") or "job"
        raise ValueError(
            f"name: got {job.name}, allowed: up to 47 of a-z, 0-9 and -, the first is a letter and the last is not -, "
            f"such as name={suggestion}"
        )
    if job.worker_range is None:
        raise ValueError(
            "num_workers: got auto, allowed: a number or a range, such as num_workers=8, as it sets the number of pods"
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
    if options.uses_kueue and fewest < most:
        raise ValueError(
            f"num_workers: got {[fewest, most]}, allowed: one number, as Kueue reserves a fixed number of pods"
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


def _check_paths(job: Job, volume: PurePosixPath) -> None:
    """Check paths; ValueError if the job uses a path of this machine alone, or the volume hides a path of a pod."""
    reserved = [PurePosixPath(folder) for folder in RESERVED_DIRS]
    conflicts = [folder for folder in reserved if volume.is_relative_to(folder) or folder.is_relative_to(volume)]
    if not volume.is_absolute() or ".." in volume.parts or conflicts:
        raise ValueError(
            f"--volume: got {volume}, allowed: an absolute path outside system folders, such as /mnt/redux"
        )
    for key, url in _list_paths(job):
        local = url.removeprefix("file://")
        path = PurePosixPath(local)
        if "://" not in local and (".." in path.parts or not path.is_relative_to(volume)):
            raise ValueError(
                f"{key}: got {url}, allowed: a URL, or a path in {volume}, which all pods and retries share"
            )


def _list_paths(job: Job) -> Iterator[Pair]:
    """List (key, path or URL) of the folders and files of a job. A hub id of a model is not listed."""
    if job.checkpoints:
        yield "checkpoints", job.checkpoints
    for name, folder in job.data.sets.items():
        yield f"data.sets.{name}", folder
    for name, source in job.data.make.items():
        yield f"data.make.{name}.json", source.json
        if source.images != type(source).images:
            yield f"data.make.{name}.images", source.images
    for part in ("tower", "language", "checkpoint"):
        source_model = getattr(job.model, part)
        # a hub id may look like a relative path; it is a path if it exists here
        if isinstance(source_model, str) and (
            source_model.startswith(("/", ".", "~", "file:")) or Path(source_model).is_dir()
        ):
            yield f"model.{part}", source_model
    for task, settings in job.evaluate.tasks.items() if job.evaluate else ():
        for file in settings.files:
            yield f"evaluate.tasks.{task}.files", file
        if settings.images:
            yield f"evaluate.tasks.{task}.images", settings.images


def _check_passwords(resolved: str) -> None:
    """Check that no URL of the job holds a secret, since others can read the ConfigMap; ValueError otherwise."""
    if match := PASSWORD.search(resolved):
        raise ValueError(
            f"{match[1] or 'the job'}: got a URL with a password, allowed: none; --service-account gives rights"
        )


# --- objects ----------------------------------------------------------------------------------------------------------


def _build_config_map(name: str, resolved: str) -> Tree:
    return {"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": name}, "data": {"job.yaml": resolved}}


def _build_network_policy(job: Job, options: KubernetesOptions) -> Tree:
    """Allow traffic among the pods of the job, from the operator to the dashboard, and to DNS, HTTPS and egress."""
    job_pods = {"podSelector": {"matchLabels": {LABEL: job.name}}}
    operator = {
        "namespaceSelector": {"matchLabels": {"kubernetes.io/metadata.name": options.operator_namespace}},
        "podSelector": {"matchLabels": {"app.kubernetes.io/component": "kuberay-operator"}},
    }
    return {
        "apiVersion": "networking.k8s.io/v1",
        "kind": "NetworkPolicy",
        "metadata": {"name": job.name},
        "spec": {
            **job_pods,
            "policyTypes": ["Ingress", "Egress"],
            "ingress": [{"from": [job_pods]}, {"from": [operator], "ports": _build_ports("TCP", 8265)}],
            "egress": [
                {"to": [job_pods]},
                {"ports": [*_build_ports("UDP", 53), *_build_ports("TCP", 53)]},
                # buckets, hubs, and the API server for the autoscaler; on some clusters it has port 6443
                {"ports": _build_ports("TCP", 443, 6443)},
                *({"ports": _build_ports("TCP", int(port))} for _, port in filter(None, [options.redis])),
                *(
                    {"to": [{"ipBlock": {"cidr": net}}], "ports": _build_ports("TCP", int(port))}
                    for net, port in options.egress
                ),
            ],
        },
    }


def _build_ports(protocol: str, *ports: int) -> list[Tree]:
    return [{"protocol": protocol, "port": port} for port in ports]


def _build_ray_job(job: Job, options: KubernetesOptions) -> Tree:
    runs_dir = PurePosixPath(options.volume[1]) / "runs"
    labels = SCHEDULERS[options.scheduler](job.name, options.queue) if options.queue else {}
    return {
        "apiVersion": "ray.io/v1",
        "kind": "RayJob",
        "metadata": {"name": job.name, **({"labels": labels} if labels else {})},
        "spec": _drop_none(
            suspend=options.uses_kueue or None,  # Kueue sets this to false when the queue has room
            entrypoint=f"redux run {JOB_MOUNT}/job.yaml --runs-dir {shlex.quote(str(runs_dir))}",
            submissionMode="K8sJobMode",
            backoffLimit=options.retries,
            activeDeadlineSeconds=options.deadline_s,
            shutdownAfterJobFinishes=True,
            ttlSecondsAfterFinished=FINISHED_TTL_S,
            submitterPodTemplate=_build_submitter(job, options),
            rayClusterSpec=_build_ray_cluster(job, options),
        ),
    }


def _build_ray_cluster(job: Job, options: KubernetesOptions) -> Tree:
    assert job.worker_range  # _check_job refuses None
    fewest, most = job.worker_range
    elastic = fewest < most
    return _drop_none(
        rayVersion=importlib.metadata.version("ray"),
        authOptions={"mode": "token"},
        enableInTreeAutoscaling=elastic,
        autoscalerOptions={
            "version": "v2",
            "idleTimeoutSeconds": IDLE_S,
            "securityContext": _build_container_security(),
        }
        if elastic
        else None,
        gcsFaultToleranceOptions=_build_redis(options) if options.redis else None,
        headGroupSpec={
            "serviceType": "ClusterIP",
            "enableIngress": False,
            "rayStartParams": {"num-cpus": "0"},  # no tasks on the head: they would compete with the driver
            "template": _build_head(job, options),
        },
        workerGroupSpecs=[
            {
                "groupName": "gpu",
                "replicas": fewest // options.gpus_per_worker_pod,
                "minReplicas": fewest // options.gpus_per_worker_pod,
                "maxReplicas": most // options.gpus_per_worker_pod,
                "rayStartParams": {},
                "template": _build_worker(job, options),
            }
        ],
    )


def _build_redis(options: KubernetesOptions) -> Tree:
    assert options.redis
    password = None
    if options.redis_secret:
        name, key = options.redis_secret
        password = {"valueFrom": {"secretKeyRef": {"name": name, "key": key}}}
    return _drop_none(redisAddress=":".join(options.redis), redisPassword=password)


# --- pods -------------------------------------------------------------------------------------------------------------


def _build_head(job: Job, options: KubernetesOptions) -> Tree:
    """Build the head pod, on any machine that is not labelled as spot."""
    key, value = options.spot_label
    not_spot = {"nodeSelectorTerms": [{"matchExpressions": [{"key": key, "operator": "NotIn", "values": [value]}]}]}
    container = {
        "name": "ray-head",
        **_build_container(options, cpu=options.head_cpus, memory=f"{options.head_memory}Gi"),
        # without the port of Ray Client, which is not used
        "ports": [{"containerPort": 6379, "name": "gcs-server"}, {"containerPort": 8265, "name": "dashboard"}],
    }
    assert job.worker_range  # _check_job refuses None
    fewest, most = job.worker_range
    return _build_pod(
        job,
        options,
        container,
        # the autoscaler is a container of this pod and asks Kubernetes for workers
        automountServiceAccountToken=fewest < most,
        affinity={"nodeAffinity": {"requiredDuringSchedulingIgnoredDuringExecution": not_spot}},
    )


def _build_worker(job: Job, options: KubernetesOptions) -> Tree:
    """Build a worker pod, on spot machines only; Ray restarts lost workers."""
    key, value = options.spot_label
    gpus, grace_s = options.gpus_per_worker_pod, job.recovery.grace_s
    container = {
        "name": "ray-worker",
        **_build_container(
            options,
            cpu=gpus * options.worker_cpus,
            memory=f"{gpus * options.worker_memory}Gi",
            **{"nvidia.com/gpu": gpus},
        ),
        # after SIGTERM, Ray reports a preemption to the workers and keeps them for this time; its default is 30
        "env": [{"name": "RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S", "value": f"{grace_s:g}"}],
    }
    return _build_pod(
        job,
        options,
        container,
        automountServiceAccountToken=False,
        terminationGracePeriodSeconds=math.ceil(grace_s) + STOP_MARGIN_S,
        nodeSelector={key: value, **dict(options.node_label)},
        tolerations=[
            {"key": key, "operator": "Equal", "value": value, "effect": "NoSchedule"},
            {"key": "nvidia.com/gpu", "operator": "Exists", "effect": "NoSchedule"},
        ],
    )


def _build_submitter(job: Job, options: KubernetesOptions) -> Tree:
    """Build the pod that submits the job to the head and follows its log; KubeRay sets its command."""
    container = {
        "name": "ray-job-submitter",
        "image": options.image,
        "resources": _build_resources(cpu=1, memory="1Gi"),
        "securityContext": _build_container_security(),
    }
    return {
        "metadata": {"labels": {LABEL: job.name}},
        "spec": {
            "restartPolicy": "Never",
            "automountServiceAccountToken": False,
            "securityContext": _build_pod_security(),
            "containers": [container],
        },
    }


def _build_pod(job: Job, options: KubernetesOptions, container: Tree, **spec: Any) -> Tree:
    """Build a pod of Ray with the job and the volume, without rights on its machine."""
    claim, _ = options.volume
    return {
        "metadata": {"labels": {LABEL: job.name}},
        "spec": _drop_none(
            serviceAccountName=options.service_account,
            securityContext=_build_pod_security(),
            **spec,
            containers=[container],
            volumes=[
                {"name": "job", "configMap": {"name": job.name}},
                {"name": "shared", "persistentVolumeClaim": {"claimName": claim}},
            ],
        ),
    }


def _build_container(options: KubernetesOptions, **resources: Any) -> Tree:
    return _drop_none(
        image=options.image,
        resources=_build_resources(**resources),
        securityContext=_build_container_security(),
        envFrom=[{"secretRef": {"name": options.secret}}] if options.secret else None,
        volumeMounts=[
            {"name": "job", "mountPath": JOB_MOUNT, "readOnly": True},
            {"name": "shared", "mountPath": options.volume[1]},
        ],
    )


def _build_resources(**resources: Any) -> Tree:
    """Request exactly the limits: a pod that exceeds its memory would evict others on the machine."""
    return {"requests": resources, "limits": resources}


def _build_pod_security() -> Tree:
    return {
        "runAsNonRoot": True,
        "fsGroup": USER,
        "fsGroupChangePolicy": "OnRootMismatch",
        "seccompProfile": {"type": "RuntimeDefault"},
    }


def _build_container_security() -> Tree:
    return {"allowPrivilegeEscalation": False, "capabilities": {"drop": ["ALL"]}}


def _drop_none(**values: Any) -> Tree:
    """Drop keys whose value is None."""
    return {name: value for name, value in values.items() if value is not None}


# --- YAML -------------------------------------------------------------------------------------------------------------


class _Dumper(yaml.SafeDumper):
    """Dumper that writes texts of several lines as blocks, and quotes texts that look like numbers or booleans."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


def _represent_text(dumper: _Dumper, text: str) -> yaml.ScalarNode:
    # Go's and YAML 1.1's readers take more texts for numbers and booleans than PyYAML quotes
    is_ambiguous = text[:1] in set("+-.0123456789") or text.lower() in ("y", "n")
    style = "|" if "\n" in text else '"' if is_ambiguous else None
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style=style)


_Dumper.add_representer(str, _represent_text)
