"""Kubernetes objects of a job file: KubeRay accepts them, and pods follow the job's workers.

KubeRay's schema is that of its resource definition. The API server drops unknown fields, so a misspelt one would have
no effect; here it is an error. Rules that only KubeRay's operator checks (names, tokens) have other tests. No cluster
is used.
"""

import gzip
import json
import math
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

from jobs import command, schema
from jobs.cluster import manifest

Tree = dict[str, Any]

JOBS = Path(__file__).parents[3] / "jobs" / "recipes"
FOLDER = Path(__file__).parent / "manifests"
AUTO = (JOBS / "quickstart.yaml", "--image", "registry/redux:0.1.0", "--volume", "runs:/mnt/redux")
COUNTS = ("num_workers=2", "evaluate.num_actors=2")
QUICKSTART = (*AUTO, *COUNTS)
LLAVA = (
    *(JOBS / "llava-1.5-13b-redux.yaml", "--image", "registry/redux:0.1.0", "--volume", "runs:/mnt/redux"),
    *("num_workers=8", "name=llava-13b-redux", "checkpoints=s3://bucket/checkpoints"),
    *("data.sets={llava-pretrain: s3://bucket/llava-pretrain, mix665k: s3://bucket/mix665k}",),
)
EVERYTHING = (
    *("--gpus-per-worker-pod", "8", "--worker-memory", "128", "--head-memory", "128", "--service-account", "redux"),
    *("--secret", "trackers", "--spot-label", "cloud.google.com/gke-spot=true"),
    *("--node-label", "cloud.google.com/gke-accelerator=nvidia-h100-80gb", "--queue", "research", "--retries", "9"),
    *("--deadline", "864000", "--redis", "redis.default:6380", "--redis-secret", "redis:password"),
    *("--egress", "10.0.0.0/8:9000", "--operator-namespace", "ray"),
)
GOLDEN = {"quickstart": (*QUICKSTART, "num_workers=[2, 8]"), "llava-13b-redux": (*LLAVA, *EVERYTHING)}

Render = Callable[..., str]


@pytest.fixture
def render(capsys: pytest.CaptureFixture[str]) -> Render:
    def call(*arguments: object) -> str:
        code = command.main(["manifest", *map(str, arguments)])
        printed = capsys.readouterr()
        if code:
            raise ValueError(printed.err)
        return printed.out

    return call


def parse(text: str) -> dict[str, Tree]:
    """Parse the documents, by kind."""
    return {tree["kind"]: tree for tree in yaml.safe_load_all(text)}


def flatten(tree: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """Iterate over the values of a tree with their dotted paths."""
    if isinstance(tree, dict | list) and tree:
        for key, value in tree.items() if isinstance(tree, dict) else enumerate(tree):
            yield from flatten(value, f"{path}.{key}" if path else str(key))
    else:
        yield path, tree


def refuse_unknown_fields(node: Tree) -> Tree:
    """Return a schema of Kubernetes in which fields that it would drop are errors."""
    result = dict(node)
    if "properties" in node:
        result["properties"] = {name: refuse_unknown_fields(field) for name, field in node["properties"].items()}
        if not node.get("x-kubernetes-preserve-unknown-fields"):
            result["additionalProperties"] = False
    for inner in ("items", "additionalProperties"):
        if isinstance(node.get(inner), dict):
            result[inner] = refuse_unknown_fields(node[inner])
    return result


@pytest.fixture(scope="module")
def definition() -> jsonschema.Draft7Validator:
    tree = json.loads(gzip.decompress((FOLDER / "rayjob.json.gz").read_bytes()))
    return jsonschema.Draft7Validator(refuse_unknown_fields(tree))


def list_pods(documents: dict[str, Tree]) -> dict[str, Tree]:
    spec = documents["RayJob"]["spec"]
    [workers] = spec["rayClusterSpec"]["workerGroupSpecs"]
    return {
        "head": spec["rayClusterSpec"]["headGroupSpec"]["template"],
        "worker": workers["template"],
        "submitter": spec["submitterPodTemplate"],
    }


@pytest.mark.parametrize("name", GOLDEN)
def test_a_manifest_equals_the_stored_one(render: Render, name: str) -> None:
    assert render(*GOLDEN[name]) == (FOLDER / f"{name}.yaml").read_text()


VARIANTS = {
    "fixed": QUICKSTART,
    "elastic": GOLDEN["quickstart"],
    "everything": GOLDEN["llava-13b-redux"],
    "volcano": (*LLAVA, "--queue", "q", "--scheduler", "volcano", "num_workers=[8, 16]"),
    "yunikorn": (*LLAVA, "--queue", "root.q", "--scheduler", "yunikorn"),
    "redis without a password": (*QUICKSTART, "--redis", "redis:6379"),
}


@pytest.mark.parametrize("arguments", VARIANTS.values(), ids=VARIANTS)
def test_kuberay_accepts_all_fields(
    render: Render, definition: jsonschema.Draft7Validator, arguments: tuple[object, ...]
) -> None:
    documents = parse(render(*arguments))
    assert list(documents) == ["ConfigMap", "NetworkPolicy", "RayJob"]
    definition.validate(documents["RayJob"])
    # The same types of Kubernetes' network policies as KubeRay has in a cluster's.
    spec = definition.schema["properties"]["spec"]["properties"]
    rules = spec["rayClusterSpec"]["properties"]["networkPolicy"]["properties"]["head"]["properties"]
    policy = documents["NetworkPolicy"]["spec"]
    assert set(policy) == {"podSelector", "policyTypes", "ingress", "egress"}
    definition.evolve(schema=rules["ingressRules"]).validate(policy["ingress"])
    definition.evolve(schema=rules["egressRules"]).validate(policy["egress"])


@pytest.mark.parametrize(
    ("place", "value"),
    [
        ("spec.backofLimit", 3),
        ("spec.backoffLimit", "3"),
        ("spec.rayClusterSpec.authOptions.mode", "tokens"),
        ("spec.rayClusterSpec.headGroupSpec.template.spec.containers.0.securityContext.privilege", False),
        ("spec.rayClusterSpec.workerGroupSpecs.0.template.spec.containers.0.resources.limits.memory", "64 GB"),
    ],
)
def test_the_schema_refuses_wrong_fields(
    render: Render, definition: jsonschema.Draft7Validator, place: str, value: object
) -> None:
    tree: Any = parse(render(*QUICKSTART))["RayJob"]
    section = tree
    *above, last = place.split(".")
    for key in above:
        section = section[int(key) if isinstance(section, list) else key]
    section[last] = value
    with pytest.raises(jsonschema.ValidationError):
        definition.validate(tree)


STAGES = ("tower", "pretrain", "instruct")
JOB = "ConfigMap.data.job.yaml"
CLUSTER = "RayJob.spec.rayClusterSpec"
WORKERS = f"{CLUSTER}.workerGroupSpecs.0"
RANGE = {
    JOB,
    f"{CLUSTER}.enableInTreeAutoscaling",
    f"{CLUSTER}.autoscalerOptions.version",
    f"{CLUSTER}.autoscalerOptions.idleTimeoutSeconds",
    f"{CLUSTER}.autoscalerOptions.securityContext.allowPrivilegeEscalation",
    f"{CLUSTER}.autoscalerOptions.securityContext.capabilities.drop.0",
    f"{CLUSTER}.headGroupSpec.template.spec.automountServiceAccountToken",
    f"{WORKERS}.maxReplicas",
}
REPLICAS = {f"{WORKERS}.{name}" for name in ("replicas", "minReplicas", "maxReplicas")}
GRACE = {
    f"{WORKERS}.template.spec.terminationGracePeriodSeconds",
    f"{WORKERS}.template.spec.containers.0.env.0.value",
}
SIZE = {
    f"{WORKERS}.template.spec.containers.0.resources.{part}.{name}"
    for part in ("requests", "limits")
    for name in ("cpu", "memory", "nvidia.com/gpu")
}


@pytest.mark.parametrize(
    ("change", "paths"),
    [
        (["seed=1"], {JOB}),
        (["recovery.restarts=9"], {JOB}),
        (["recovery.grace_s=60.5"], {JOB, *GRACE}),
        (["num_workers=4", *(f"train.{stage}.micro_batch_size=2" for stage in STAGES)], {JOB, *REPLICAS}),
        (["num_workers=[2, 8]"], RANGE),
        (["--retries", "0"], {"RayJob.spec.backoffLimit"}),
        (["--deadline", "60"], {"RayJob.spec.activeDeadlineSeconds"}),
        (["--gpus-per-worker-pod", "2"], {*REPLICAS, *SIZE}),
        (["--queue", "q"], {"RayJob.spec.suspend", "RayJob.metadata.labels.kueue.x-k8s.io/queue-name"}),
        (
            ["--scheduler", "yunikorn", "--queue", "q"],
            {
                "RayJob.metadata.labels.ray.io/gang-scheduling-enabled",
                "RayJob.metadata.labels.yunikorn.apache.org/app-id",
                "RayJob.metadata.labels.yunikorn.apache.org/queue",
            },
        ),
        (["--scheduler", "volcano", "--queue", "q"], {"RayJob.metadata.labels.volcano.sh/queue-name"}),
        (
            ["--service-account", "a"],
            {
                f"{CLUSTER}.headGroupSpec.template.spec.serviceAccountName",
                f"{WORKERS}.template.spec.serviceAccountName",
            },
        ),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_an_option_changes_its_fields_alone(render: Render, change: list[str], paths: set[str]) -> None:
    before, after = (dict(flatten(parse(render(*QUICKSTART, *more)))) for more in ([], change))
    changed = {path for path in before.keys() | after.keys() if before.get(path, ...) != after.get(path, ...)}
    assert changed == paths


@pytest.mark.parametrize(("fewest", "most", "per_pod"), [(2, 2, 1), (2, 8, 2), (8, 16, 8), (12, 12, 4)])
def test_pods_hold_all_workers_and_no_more(render: Render, fewest: int, most: int, per_pod: int) -> None:
    # Numbers of workers that divide the batches of the quickstart, or a range, whose numbers need not divide them.
    workers = f"[{fewest}, {most}]" if fewest < most else fewest
    job = (
        "train.tower.global_batch_size=384",
        "train.pretrain.global_batch_size=192",
        "train.instruct.global_batch_size=48",
    )
    documents = parse(render(*QUICKSTART, f"num_workers={workers}", *job, "--gpus-per-worker-pod", per_pod))
    cluster = documents["RayJob"]["spec"]["rayClusterSpec"]
    [group] = cluster["workerGroupSpecs"]
    limits = group["template"]["spec"]["containers"][0]["resources"]["limits"]
    assert limits["nvidia.com/gpu"] == per_pod
    assert (group["minReplicas"] * per_pod, group["maxReplicas"] * per_pod) == (fewest, most)
    assert group["replicas"] == group["minReplicas"]
    assert cluster["enableInTreeAutoscaling"] == ("autoscalerOptions" in cluster) == (fewest < most)
    head = cluster["headGroupSpec"]
    assert head["rayStartParams"] == {"num-cpus": "0"}
    assert "nvidia.com/gpu" not in head["template"]["spec"]["containers"][0]["resources"]["limits"]


@pytest.mark.parametrize("grace_s", [0, 25, 44.5, 600])
def test_the_grace_of_a_pod_exceeds_that_of_ray(render: Render, grace_s: float) -> None:
    spec = list_pods(parse(render(*QUICKSTART, f"recovery.grace_s={grace_s}")))["worker"]["spec"]
    [variable] = spec["containers"][0]["env"]
    assert variable["name"] == "RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S"
    assert float(variable["value"]) == grace_s
    assert spec["terminationGracePeriodSeconds"] >= math.ceil(grace_s) + 10


@pytest.mark.integration
def test_ray_reads_the_grace_from_the_variable_of_the_pod(render: Render) -> None:
    [variable] = list_pods(parse(render(*QUICKSTART, "recovery.grace_s=44.5")))["worker"]["spec"]["containers"][0][
        "env"
    ]
    program = "from ray._private import ray_constants as c; print(c.RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S)"
    environment = {**os.environ, variable["name"]: variable["value"]}
    printed = subprocess.run(
        [sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=True
    )
    assert float(printed.stdout) == 44.5


def test_the_config_map_has_the_complete_job(render: Render, tmp_path: Path) -> None:
    documents = parse(render(*QUICKSTART, "seed=7"))
    path = tmp_path / "job.yaml"
    path.write_text(documents["ConfigMap"]["data"]["job.yaml"])
    assert schema.load(path) == schema.load(QUICKSTART[0], [*COUNTS, "seed=7"])
    for pod in ("head", "worker"):
        spec = list_pods(documents)[pod]["spec"]
        volumes = {volume["name"]: volume for volume in spec["volumes"]}
        assert volumes["job"]["configMap"]["name"] == documents["ConfigMap"]["metadata"]["name"]
        mounts = {mount["name"]: mount for mount in spec["containers"][0]["volumeMounts"]}
        assert mounts["job"] == {"name": "job", "mountPath": "/etc/redux", "readOnly": True}
        assert (volumes["shared"]["persistentVolumeClaim"]["claimName"], mounts["shared"]["mountPath"]) == (
            "runs",
            "/mnt/redux",
        )
    assert documents["RayJob"]["spec"]["entrypoint"] == "redux run /etc/redux/job.yaml --runs-dir /mnt/redux/runs"


@pytest.mark.parametrize("arguments", VARIANTS.values(), ids=VARIANTS)
def test_pods_have_no_rights_and_a_private_network(render: Render, arguments: tuple[object, ...]) -> None:
    documents = parse(render(*arguments))
    job = documents["RayJob"]
    cluster, policy = job["spec"]["rayClusterSpec"], documents["NetworkPolicy"]["spec"]
    elastic = cluster["enableInTreeAutoscaling"]
    assert cluster["authOptions"] == {"mode": "token"}
    assert (cluster["headGroupSpec"]["serviceType"], cluster["headGroupSpec"]["enableIngress"]) == ("ClusterIP", False)
    for name, pod in list_pods(documents).items():
        spec = pod["spec"]
        assert spec["securityContext"]["runAsNonRoot"]
        assert spec["automountServiceAccountToken"] == (name == "head" and elastic)
        assert policy["podSelector"]["matchLabels"].items() <= pod["metadata"]["labels"].items()
        for container in spec["containers"]:
            assert container["securityContext"] == {
                "allowPrivilegeEscalation": False,
                "capabilities": {"drop": ["ALL"]},
            }
            assert container["resources"]["requests"] == container["resources"]["limits"]
    assert policy["policyTypes"] == ["Ingress", "Egress"]
    pod_rule, operator = policy["ingress"]
    assert pod_rule == {"from": [{"podSelector": policy["podSelector"]}]}
    assert [port["port"] for port in operator["ports"]] == [8265]
    assert set(operator["from"][0]) == {"namespaceSelector", "podSelector"}


def test_only_workers_run_on_spot_machines(render: Render) -> None:
    key, value = "cloud.google.com/gke-spot", "true"
    both = list_pods(parse(render(*QUICKSTART, "--spot-label", f"{key}={value}", "--node-label", "zone=a")))
    assert both["worker"]["spec"]["nodeSelector"] == {key: value, "zone": "a"}
    assert {"key": key, "operator": "Equal", "value": value, "effect": "NoSchedule"} in both["worker"]["spec"][
        "tolerations"
    ]
    assert "nodeSelector" not in both["head"]["spec"]
    required = both["head"]["spec"]["affinity"]["nodeAffinity"]["requiredDuringSchedulingIgnoredDuringExecution"]
    assert required["nodeSelectorTerms"] == [
        {"matchExpressions": [{"key": key, "operator": "NotIn", "values": [value]}]}
    ]


def test_secrets_are_references(render: Render) -> None:
    documents = parse(render(*LLAVA, *EVERYTHING))
    for path, value in flatten(documents["RayJob"]):
        if re.search(r"password|token|secret", path, re.IGNORECASE) and not path.endswith(
            "automountServiceAccountToken"
        ):
            assert re.search(r"secretKeyRef\.(name|key)$|secretRef\.name$", path), f"{path} = {value}"
    redis = documents["RayJob"]["spec"]["rayClusterSpec"]["gcsFaultToleranceOptions"]
    assert redis == {
        "redisAddress": "redis.default:6380",
        "redisPassword": {"valueFrom": {"secretKeyRef": {"name": "redis", "key": "password"}}},
    }
    assert {"ports": [{"protocol": "TCP", "port": 6380}]} in documents["NetworkPolicy"]["spec"]["egress"]


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["name=llava-1.5"], "name: got llava-1.5, allowed: up to 47 of a-z, 0-9 and -, .* such as name=llava-1-5$"),
        (["name=1st"], "name: got 1st, allowed: .* the first is a letter .* such as name=st$"),
        ([f"name={'a' * 48}"], "name: got a{48}, allowed: up to 47"),
        (["num_workers=[3, 8]", "--gpus-per-worker-pod", "2"], r"num_workers: got \[3, 8\], allowed: multiples of 2"),
        (["num_workers=auto"], r"num_workers: got auto, allowed: a number or a range, such as num_workers=8"),
        (["num_workers=[8, 4]"], r"num_workers: got \[8, 4\], allowed: the fewest first"),
        (["num_workers=[2, 8]", "--queue", "q"], r"num_workers: got \[2, 8\], allowed: one number, because Kueue"),
        (["evaluate.num_actors=3"], "evaluate.num_actors: got 3, allowed: up to 2"),
        (
            ["checkpoints=/data/checkpoints"],
            "checkpoints: got /data/checkpoints, allowed: a URL, or a path in /mnt/redux",
        ),
        (["checkpoints=checkpoints"], "checkpoints: got checkpoints, allowed: a URL, or"),
        (["checkpoints=/mnt/redux/../etc"], "checkpoints: got /mnt/redux/../etc, allowed"),
        (["checkpoints=file:///data"], "checkpoints: got file:///data, allowed: a URL, or"),
        (["data.sets={mine: data/mine}"], "data.sets.mine: got data/mine, allowed: a URL, or"),
        (["evaluate.tasks={gqa: {files: [q.json]}}"], "evaluate.tasks.gqa.files: got q.json, allowed: a URL, or"),
        (["evaluate.tasks={own: {file: q.json, metric: exact}}"], "evaluate.tasks.own.file: got q.json, allowed: a"),
        (["evaluate.tasks={mme: {files: ['s3://key:secret@bucket/x']}}"], "^redux: the job: got a URL with a password"),
        (["checkpoints=s3://key:secret@bucket/x"], "^redux: checkpoints: got a URL with a password, allowed: .*"),
        (["--redis-secret", "a:b"], "--redis-secret: got a secret without --redis"),
        (
            ["data.make={mine: {source: /home/me/a.json}}", "data.sets={mine: /mnt/redux/mine}"],
            "data.make.mine.source: got /h",
        ),
        (
            ["data.make={mine: {source: s3://b/a.json, images: coco}}", "data.sets={mine: /mnt/redux/mine}"],
            "data.make.mine.images: got coco, allowed: a URL, or",
        ),
        *(
            (["--volume", f"runs:{path}"], f"--volume: got {path}, allowed: an absolute path")
            for path in ("mnt", "/", "/tmp", "/etc/redux", "/home", "/mnt/../etc", "/var/x")
        ),
        (["--volume", "Bad_Claim:/mnt/redux"], "--volume: got Bad_Claim, allowed: up to 253"),
        (["--image", ""], "--image: got nothing, allowed"),
        (["--image", "a b"], "--image: got a b, allowed"),
        (["--service-account", ""], "--service-account: got nothing, allowed"),
        (["--secret", "BAD name"], "--secret: got BAD name, allowed"),
        (["--operator-namespace", "no_"], "--operator-namespace: got no_, allowed"),
        (["--queue", "Bad Queue!"], "--queue: got Bad Queue!, allowed"),
        (["--scheduler", "volcano"], "--scheduler: got volcano without --queue"),
        (["--spot-label", "a b=c"], "--spot-label: got a b, allowed"),
        (["--node-label", "a/b/c=d"], "--node-label: got a/b/c, allowed"),
        (["--node-label", "a/b=c d"], "--node-label: got c d, allowed"),
        (
            ["--node-label", "karpenter.sh/capacity-type=on-demand"],
            "--node-label: got karpenter.sh/capacity-type, allo",
        ),
        (["--redis", "a b:6379"], "--redis: got a b, allowed"),
        (["--redis", "redis:70000"], "--redis: got 70000, allowed: a port, 1 to 65535"),
        (["--egress", "10.0.0.0/8:0"], "--egress: got 0, allowed: a port"),
        (["--egress", "10.0.0.1/8:80"], "--egress: got 10.0.0.1/8, allowed: a network"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_a_job_that_cannot_run_or_resume_is_refused_in_one_line(
    render: Render, arguments: list[str], line: str
) -> None:
    with pytest.raises(ValueError, match=line) as error:
        render(*QUICKSTART, *arguments)
    assert str(error.value).count("\n") == 1
    assert "key:secret" not in str(error.value)


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["--gpus-per-worker-pod", "0"], "--gpus-per-worker-pod: got 0, allowed: a whole number >= 1"),
        (["--retries", "-1"], "--retries: "),
        (["--spot-label", "spot"], "--spot-label: got spot, allowed: KEY=VALUE"),
        (["--redis", "redis:port"], "--redis: got redis:port, allowed: HOST:PORT"),
        (["--scheduler", "none"], "--scheduler: invalid choice"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_options_are_checked_before_the_job(
    capsys: pytest.CaptureFixture[str], arguments: list[str], line: str
) -> None:
    with pytest.raises(SystemExit) as ended:
        command.main(["manifest", *map(str, QUICKSTART), *arguments])
    assert ended.value.code == 2
    assert line in capsys.readouterr().err


def test_texts_like_yaml_booleans_are_quoted(render: Render) -> None:
    text = render(*QUICKSTART, "name=y", "--node-label", "fast=N")
    assert "name: y\n" not in text.replace("    name: y", "", 1), "but in the job file, which Redux reads"
    assert 'fast: "N"' in text


@pytest.mark.parametrize("path", ["~/clip", "/home/me/clip", "./clip"])
def test_a_model_on_this_machine_is_refused(render: Render, path: str) -> None:
    with pytest.raises(ValueError, match=rf"model\.tower: got {path}, allowed: a URL, or"):
        render(*LLAVA, f"model.tower={path}")


def test_a_study_is_refused(render: Render) -> None:
    with pytest.raises(ValueError, match=r"mini\.yaml: got a study or a search, allowed: a job"):
        render(JOBS / "reproduce" / "mini.yaml", *AUTO[1:])


def test_paths_on_the_volume_and_urls_are_allowed(render: Render) -> None:
    for folder in ("/mnt/redux/checkpoints", "file:///mnt/redux/checkpoints", "gs://bucket/checkpoints"):
        assert render(*QUICKSTART, f"checkpoints={folder}")


def test_out_writes_the_printed_manifest(render: Render, tmp_path: Path) -> None:
    path = tmp_path / "quickstart.k8s.yaml"
    printed = render(*QUICKSTART, "--out", path)
    assert path.read_text() == render(*QUICKSTART)
    assert printed == f"{path}: kubectl create -f {path}\n"
    with pytest.raises(ValueError, match=r"--out: .*No such file"):
        render(*QUICKSTART, "--out", tmp_path / "none" / "a.yaml")


def test_texts_like_yaml_numbers_are_quoted(render: Render) -> None:
    text = render(*QUICKSTART, "--service-account", "1e5", "--queue", "0x1f")
    assert 'serviceAccountName: "1e5"' in text
    assert 'kueue.x-k8s.io/queue-name: "0x1f"' in text


def test_all_schedulers_of_the_command_are_supported() -> None:
    parser = command._build_parser()
    arguments = parser.parse_args(["manifest", *map(str, QUICKSTART)])
    assert arguments.scheduler in manifest.SCHEDULERS
    for name in manifest.SCHEDULERS:
        assert parser.parse_args(["manifest", *map(str, QUICKSTART), "--scheduler", name]).scheduler == name
