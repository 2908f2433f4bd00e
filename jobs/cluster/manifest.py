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
import math
import shlex
from collections.abc import Callable
from pathlib import PurePosixPath
from typing import Any

import yaml

from jobs import schema
from jobs.cluster.kubernetes_options import KubernetesOptions, check_kubernetes
from jobs.schema import Job

Tree = dict[str, Any]

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


def write_manifest(job: Job, options: KubernetesOptions) -> str:
    """Write the manifest as YAML with three documents.

    Raises:
        ValueError: Kubernetes would refuse an option, or the job cannot run or resume with these options.
    """
    resolved = schema.dump(job)
    check_kubernetes(job, options, resolved)
    documents = [
        _build_config_map(job.name, resolved),
        _build_network_policy(job, options),
        _build_ray_job(job, options),
    ]
    return yaml.dump_all(documents, Dumper=_ManifestDumper, sort_keys=False, allow_unicode=True, width=120)


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
                # Buckets, hubs, and the API server for the autoscaler; on some clusters it has port 6443.
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
    assert job.worker_range  # check_kubernetes refuses None
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
            "rayStartParams": {"num-cpus": "0"},  # No tasks on the head: they would compete with the driver
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
        # Without the port of Ray Client, which is not used.
        "ports": [{"containerPort": 6379, "name": "gcs-server"}, {"containerPort": 8265, "name": "dashboard"}],
    }
    assert job.worker_range  # check_kubernetes refuses None
    fewest, most = job.worker_range
    return _build_pod(
        job,
        options,
        container,
        # The autoscaler is a container of this pod and asks Kubernetes for workers.
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
        # After SIGTERM, Ray reports a preemption to the workers and keeps them for this time; its default is 30.
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


class _ManifestDumper(yaml.SafeDumper):
    """Dumper that writes texts of several lines as blocks, and quotes texts that look like numbers or booleans."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


def _represent_text(dumper: _ManifestDumper, text: str) -> yaml.ScalarNode:
    # Go's and YAML 1.1's readers take more texts for numbers and booleans than PyYAML quotes.
    is_ambiguous = text[:1] in set("+-.0123456789") or text.lower() in ("y", "n")
    style = "|" if "\n" in text else '"' if is_ambiguous else None
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style=style)


_ManifestDumper.add_representer(str, _represent_text)
