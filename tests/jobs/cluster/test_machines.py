"""`redux run` on several machines, also while some are lost or added: same losses. Its open ports, and its secrets.

Shards and checkpoints are in a bucket; the machines are those of machines.py.
"""

import os
import re
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import ray
import trustme
from PIL import Image

from pipelines.core import cluster
from pipelines.data import shard_writer
from pipelines.data.options import ShardOptions
from tests.jobs.command_line import run_command
from tests.jobs.machines import (
    FAST_FAILURE_DETECTION,
    Cluster,
    Network,
    Process,
    can_use_namespaces,
    kill,
    open_network,
    read_lines,
    wait_until,
)

pytestmark = pytest.mark.integration

JOB = """
name: small
num_workers: 2
checkpoints: s3://runs/FOLDER
data: {source: null, sets: {set: "s3://runs/set"}}
recovery: {resize_s: 1}
model:
  tower: {image_size: 16, patch_size: 4, num_hidden_layers: 4, SIZES}
  language: {num_hidden_layers: 2, SIZES}
train:
  pretrain:
    objective: language
    data: set
    template: vicuna_bare
    steps: STEPS
    global_batch_size: 8
    micro_batch_size: 2
    learning_rate: {tower: 1e-3, projector: 1e-3, language: 1e-3}
    save_steps: 4
evaluate: null
"""
SIZES = "hidden_size: 16, num_attention_heads: 2, intermediate_size: 16"
STEPS = 20
LONG_STEPS = 60
"""Steps of the runs in which a fault happens after step 10."""

LOSS_TOLERANCE = 1e-5
"""Difference of losses between runs with other numbers of workers."""


@pytest.fixture
def folder() -> Iterator[Path]:
    path = make_short_folder()
    yield path
    shutil.rmtree(path)


def make_short_folder() -> Path:
    """Make a folder with a short path, since Ray's sockets lie in it."""
    return Path(tempfile.mkdtemp(prefix="m-", dir="/tmp"))


@pytest.fixture(scope="module")
def shards(ray_cluster: Any, tmp_path_factory: pytest.TempPathFactory) -> str:
    """A set of 22 samples."""
    return make_shards(tmp_path_factory.mktemp("set"))


SECRETS = {
    name: f"secret-{secrets.token_hex(16)}" for name in ("AWS_SECRET_ACCESS_KEY", "WANDB_API_KEY", "RAY_AUTH_TOKEN")
}


@contextmanager
def serve_bucket(network: Network, shards: str) -> Iterator[dict[str, str]]:
    """Serve s3://runs, with the shards as `set`, and yield the environment by which machines reach it."""
    settings = {"AWS_ACCESS_KEY_ID": "a-key-of-ours", "AWS_DEFAULT_REGION": "us-east-1", **SECRETS}
    command = network.at_gateway([sys.executable, "-m", "tests.jobs.bucket", network.gateway, shards])
    pipe, environment = subprocess.PIPE, {**os.environ, **settings}
    with (
        (network.folder / "bucket.log").open("wb") as log,
        subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=log, env=environment, text=True) as server,
    ):  # it ends with stdin
        assert server.stdout
        url = server.stdout.readline().strip()
        assert url, "the bucket is not there"
        yield {"AWS_ENDPOINT_URL": url, "RAY_AUTH_MODE": "token", **settings}


def make_shards(folder: Path) -> str:
    noise = np.random.default_rng(0)
    records = []
    for number in range(22):
        Image.fromarray(noise.integers(0, 256, (16, 16, 3), dtype=np.uint8)).save(folder / f"{number}.png")
        turns = [("human", f"<image>\nis shape number {number} red?"), ("gpt", ("yes", "no")[number % 2])]
        conversation = [{"from": role, "value": text} for role, text in turns]
        records.append({"id": str(number), "image": f"{number}.png", "conversations": conversation})
    shard_writer.make_shards(records, str(folder), str(folder / "made"), ShardOptions(samples_per_shard=5))
    return str(folder / "made")


def list_words(folder: Path, steps: int = LONG_STEPS) -> tuple[str, ...]:
    """Write the job, and list the words by which redux runs it in folder/small."""
    path = folder / "job.yaml"
    path.write_text(JOB.replace("SIZES", SIZES).replace("STEPS", str(steps)).replace("FOLDER", folder.name))
    return "run", str(path), "--runs-dir", str(folder)


def read_losses(folder: Path) -> list[tuple[int, float]]:
    return [(line["step"], line["loss"]) for line in read_lines(folder / "small" / "metrics.jsonl")]


def read_consumed(folder: Path) -> str:
    return (folder / "small" / "consumed.jsonl").read_text()


def read_starts(folder: Path) -> list[int]:
    """Read the number of workers at each start."""
    return [line["workers"] for line in read_lines(folder / "small" / "ledger.jsonl") if line["event"] == "start"]


# A private Ray


@dataclass(frozen=True)
class PrivateRun:
    """A run on a private Ray, and what other users of its machine can see of it.

    Args:
        folder: the folder of runs, and of all temporary files.
        listening: addresses on which each process listens.
        commands: all command lines.
        token: the token of Ray.
        dashboard: True if a process of the dashboard runs.
        files: the content of all files during the run.
    """

    folder: Path
    listening: dict[str, set[str]]
    commands: str
    token: str
    dashboard: bool
    files: dict[Path, bytes]


@pytest.fixture(scope="module")
def private_run(shards: str) -> Iterator[PrivateRun]:
    """A finished run on a private Ray."""
    with run_on_private_ray(shards, STEPS) as run:
        yield run


@pytest.fixture(scope="module")
def long_run(shards: str) -> Iterator[PrivateRun]:
    """A finished run with the steps of the runs with faults."""
    with run_on_private_ray(shards, LONG_STEPS) as run:
        yield run


@contextmanager
def run_on_private_ray(shards: str, steps: int) -> Iterator[PrivateRun]:
    """Run the job on a private Ray, and inspect it after the first step."""
    folder = make_short_folder()
    (folder / "tmp").mkdir()
    try:
        with open_network(folder, has_namespaces=False) as network, serve_bucket(network, shards) as environment:
            machine = network.add_machine()
            environment = {**os.environ, **FAST_FAILURE_DETECTION, **environment, "TMPDIR": str(folder / "tmp")}
            for name in ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_ADDRESS"):
                environment.pop(name, None)
            words = [sys.executable, "-m", "jobs.command", *list_words(folder, steps)]
            process = machine.start(words, environment)
            wait_until(lambda: process.poll() is not None or read_losses(folder), 600)
            assert process.poll() is None, network.read_log(process)
            inspected = inspect_run(folder, psutil.Process(process.pid))
            assert process.wait(200) == 0, network.read_log(process)
            yield inspected
    finally:
        shutil.rmtree(folder)


def inspect_run(folder: Path, driver: psutil.Process) -> PrivateRun:
    """Inspect the processes and files of a run."""
    listening: dict[str, set[str]] = {}
    commands, token = [], ""
    for process in (driver, *driver.children(recursive=True)):
        try:
            words = process.cmdline()
            connections = process.net_connections("inet")
            token = process.environ().get("RAY_AUTH_TOKEN") or token
        except psutil.Error:
            continue
        addresses = {str(found.laddr.ip) for found in connections if found.status == psutil.CONN_LISTEN}
        listening[f"{process.pid} {Path(words[0]).name if words else process.name()}"] = addresses
        commands += words
    dashboard = any(word.endswith("dashboard/dashboard.py") for word in commands)
    return PrivateRun(folder, listening, "\n".join(commands), token, dashboard, read_files(folder))


def read_files(folder: Path) -> dict[Path, bytes]:
    """Read all files. Those in Ray's folder exist only during the run."""
    found = {}
    for path in folder.rglob("*"):
        with suppress(OSError):  # a file may have been deleted
            if path.is_file():
                found[path] = path.read_bytes()
    return found


def test_a_private_ray_listens_on_loopback_alone(private_run: PrivateRun) -> None:
    assert any("gcs_server" in name for name in private_run.listening)
    assert any("RayTrainWorker" in name for name in private_run.listening)
    addresses = {ip.removeprefix("::ffff:") for ips in private_run.listening.values() for ip in ips}
    assert addresses == {"127.0.0.1"}, private_run.listening


def test_a_private_ray_requires_a_token_and_shows_no_dashboard(private_run: PrivateRun) -> None:
    assert len(private_run.token) == 64
    assert not private_run.dashboard


def test_secrets_are_in_the_environment_alone(private_run: PrivateRun) -> None:
    hidden = [private_run.token, SECRETS["AWS_SECRET_ACCESS_KEY"], SECRETS["WANDB_API_KEY"]]
    assert all(hidden)
    assert not [secret for secret in hidden if secret in private_run.commands]
    assert any("logs" in path.parts for path in private_run.files), "Ray's folder existed"
    files_after = read_files(private_run.folder)
    assert private_run.folder / "small" / "job.yaml" in files_after
    files = [*private_run.files.items(), *files_after.items()]
    assert not [path for path, data in files for secret in hidden if secret.encode() in data]


# Named clusters


@pytest.mark.parametrize(
    ("ip", "mode", "refused"),
    [
        ("8.8.8.8", "", True),
        ("2001:4860:4860::8888", "disabled", True),
        ("8.8.8.8", "token", False),
        ("10.0.0.4", "", False),
        ("192.168.1.4", "", False),
        ("127.0.0.1", "", False),
        ("fd00::2", "", False),
    ],
)
def test_a_public_address_needs_a_token(monkeypatch: pytest.MonkeyPatch, ip: str, mode: str, refused: bool) -> None:
    monkeypatch.setattr(cluster, "_resolve_peer", lambda endpoint: ip)
    monkeypatch.setattr(cluster, "_check_protocol", lambda address, endpoint: None)
    monkeypatch.setenv("RAY_AUTH_MODE", mode)
    if not refused:
        with cluster._cluster_settings("head:6379") as settings:
            assert settings == {"address": "head:6379"}
        return
    with (
        pytest.raises(ValueError, match=f"RAY_ADDRESS: head:6379 is {ip}, a public address"),
        cluster._cluster_settings("head:6379"),
    ):
        pass


@pytest.mark.parametrize(("address", "why"), [("head", "got head, allowed: HOST:PORT"), ("127.0.0.1:1", "refused")])
def test_a_cluster_that_cannot_be_reached_is_named_in_one_line(
    folder: Path, monkeypatch: pytest.MonkeyPatch, address: str, why: str
) -> None:
    monkeypatch.setenv("RAY_ADDRESS", address)
    monkeypatch.setattr(ray, "is_initialized", lambda: False)  # the Ray that tests share may run in this process
    refused = run_command("run", "jobs/recipes/quickstart.yaml", "--runs-dir", folder)
    assert refused.code == 2
    [line] = (refused.out + refused.err).splitlines()
    assert line.startswith("redux: RAY_ADDRESS: ")
    assert why in line


@pytest.fixture
def two_machines(shards: str, folder: Path) -> Iterator[Cluster]:
    """A head with a CPU and a node, which require a token, and a bucket."""
    with open_network(folder, can_use_namespaces()) as network, serve_bucket(network, shards) as environment:
        cluster = Cluster(network, environment, head_cpus=1)
        cluster.start(nodes=1)
        yield cluster


@pytest.fixture
def three_machines(shards: str, folder: Path) -> Iterator[Cluster]:
    """A head without CPUs and two nodes, which require a token, and a bucket."""
    with open_network(folder, can_use_namespaces()) as network, serve_bucket(network, shards) as environment:
        cluster = Cluster(network, environment)
        cluster.start()
        yield cluster


def wait_for_end(cluster: Cluster, process: Process) -> int:
    """Wait for the exit code of a command, for ten minutes at most."""
    try:
        return process.wait(600)
    except subprocess.TimeoutExpired:
        raise AssertionError(cluster.network.read_log(process)[-3000:]) from None


def assert_success(cluster: Cluster, process: Process) -> None:
    assert wait_for_end(cluster, process) == 0, cluster.network.read_log(process)[-3000:]


def wait_for_step(cluster: Cluster, process: Process, folder: Path, step: int) -> None:
    """Wait until a run has finished a step."""

    def has_step() -> bool:
        assert process.poll() is None, cluster.network.read_log(process)[-3000:]
        return bool(read_losses(folder)) and read_losses(folder)[-1][0] >= step

    wait_until(has_step)


def test_a_run_on_two_machines_equals_a_run_on_one(
    private_run: PrivateRun, two_machines: Cluster, folder: Path
) -> None:
    assert_success(two_machines, two_machines.start_redux(*list_words(folder, STEPS)))
    assert_same_run(private_run, folder)
    assert read_starts(folder) == [2]


@contextmanager
def suspend_workers(cluster: Cluster) -> Iterator[None]:
    """Suspend all workers, so that the run does not end before something else has happened."""
    workers = [
        process
        for machine in cluster.nodes
        for process in machine.list_processes()
        if "RayTrainWorker" in process.name() + "".join(process.cmdline())
    ]
    for worker in workers:
        worker.suspend()
    try:
        yield
    finally:
        for worker in workers:
            with suppress(psutil.NoSuchProcess):
                worker.resume()


@pytest.mark.slow
def test_lost_and_added_machines_do_not_change_the_losses(
    long_run: PrivateRun, three_machines: Cluster, folder: Path
) -> None:
    process = three_machines.start_redux(*list_words(folder), "num_workers=[1, 2]")
    wait_for_step(three_machines, process, folder, 10)
    three_machines.nodes.pop().lose()
    wait_until(lambda: read_starts(folder)[-1:] == [1])
    with suspend_workers(three_machines):
        three_machines.add_node()
    assert_success(three_machines, process)
    assert read_starts(folder)[0] == 2
    assert 1 in read_starts(folder)
    assert read_starts(folder)[-1] == 2
    steps, expected = zip(*read_losses(long_run.folder), strict=True)
    assert [step for step, _ in read_losses(folder)] == list(steps)
    assert [loss for _, loss in read_losses(folder)] == pytest.approx(expected, abs=LOSS_TOLERANCE)
    assert read_consumed(folder) == read_consumed(long_run.folder)


@pytest.mark.slow
def test_a_killed_head_ends_the_command_and_the_same_command_resumes(
    long_run: PrivateRun, three_machines: Cluster, folder: Path
) -> None:
    """Without a store, Ray's state is lost with the head, and so are the nodes."""
    process = three_machines.start_redux(*list_words(folder))
    wait_for_step(three_machines, process, folder, 10)
    kill(three_machines.head)
    assert wait_for_end(three_machines, process) != 0
    assert_head_reported_once(three_machines, process)
    for node in three_machines.nodes:
        assert node.processes[0].wait(120) != 0
    three_machines.start()
    assert_success(three_machines, three_machines.start_redux(*list_words(folder)))
    assert_same_run(long_run, folder)


@contextmanager
def keep_state(network: Network, store: str) -> Iterator[dict[str, str]]:
    """Yield the environment of a head whose state outlives it."""
    if store == "rocksdb":
        yield {"RAY_gcs_storage": "rocksdb", "RAY_gcs_storage_path": str(network.folder / "state")}
        return
    server = ["redis-server", "--port", "6390", "--bind", network.gateway, "--save", "", "--protected-mode", "no"]
    with subprocess.Popen(network.at_gateway(server), stdout=subprocess.DEVNULL) as running:
        try:
            yield {"RAY_REDIS_ADDRESS": f"{network.gateway}:6390"}
        finally:
            running.terminate()


@pytest.fixture(
    params=[
        "rocksdb",
        pytest.param("redis", marks=pytest.mark.skipif(not shutil.which("redis-server"), reason="no redis-server")),
    ]
)
def cluster_with_a_store(request: pytest.FixtureRequest, shards: str, folder: Path) -> Iterator[Cluster]:
    """A head whose state outlives it, two nodes that wait for it, and a bucket."""
    if not can_use_namespaces():
        pytest.skip("Ray starts no second head on a machine with nodes of the first")
    with (
        open_network(folder, has_namespaces=True) as network,
        serve_bucket(network, shards) as environment,
        keep_state(network, request.param) as state,
    ):
        patient = {"RAY_gcs_rpc_server_reconnect_timeout_s": "120"}
        cluster = Cluster(network, environment | state | patient, has_dashboard=True)
        cluster.start()
        yield cluster


@pytest.mark.slow
def test_a_run_continues_while_a_head_with_kept_state_restarts(
    long_run: PrivateRun, cluster_with_a_store: Cluster, folder: Path
) -> None:
    process = cluster_with_a_store.start_redux(*list_words(folder))
    wait_for_step(cluster_with_a_store, process, folder, 10)
    kill(cluster_with_a_store.head)
    cluster_with_a_store.start_head()
    assert_success(cluster_with_a_store, process)
    assert_same_run(long_run, folder)
    assert read_starts(folder) == [2]


@pytest.mark.slow
def test_a_submission_is_retried_after_its_head_restarts(
    long_run: PrivateRun, cluster_with_a_store: Cluster, folder: Path
) -> None:
    process = cluster_with_a_store.start_redux_on_head(*list_submit_words(cluster_with_a_store, folder))
    wait_for_step(cluster_with_a_store, process, folder, 10)
    kill(cluster_with_a_store.head)
    cluster_with_a_store.start_head()
    assert_success(cluster_with_a_store, process)
    assert "small is FAILED" in cluster_with_a_store.network.read_log(process)
    assert_same_run(long_run, folder)
    assert read_starts(folder) == [2, 2]


@pytest.mark.slow
def test_a_submission_that_its_cluster_has_lost_is_submitted_again(
    long_run: PrivateRun, shards: str, folder: Path
) -> None:
    with open_network(folder, can_use_namespaces()) as network, serve_bucket(network, shards) as environment:
        cluster = Cluster(network, environment, has_dashboard=True)
        cluster.start()
        process = cluster.start_redux_on_head(*list_submit_words(cluster, folder))
        wait_for_step(cluster, process, folder, 10)
        kill(cluster.head)
        for node in cluster.nodes:
            assert node.processes[0].wait(120) != 0
        cluster.start()
        assert_success(cluster, process)
        assert "small is lost" in network.read_log(process)
    assert_same_run(long_run, folder)
    assert read_starts(folder) == [2, 2]


def list_submit_words(cluster: Cluster, folder: Path) -> tuple[str, ...]:
    return "submit", *list_words(folder)[1:], "--retries", "1", "--address", cluster.dashboard


def assert_head_reported_once(cluster: Cluster, process: Process) -> None:
    text = cluster.network.read_log(process)
    assert text.count("redux: the head of the cluster at ") == 1, text[-3000:]
    assert "The same command continues from the last checkpoint" in text
    assert "Traceback" not in text


def assert_same_run(expected: PrivateRun, folder: Path) -> None:
    assert read_losses(folder) == read_losses(expected.folder)
    assert read_consumed(folder) == read_consumed(expected.folder)


TLS = ("RAY_TLS_CA_CERT", "RAY_TLS_SERVER_CERT", "RAY_TLS_SERVER_KEY")


def write_certificates(folder: Path, *hosts: str) -> dict[str, str]:
    """Write certificates of a new authority for these hosts, and return the environment that names them."""
    folder.mkdir()
    authority = trustme.CA()
    certificate = authority.issue_cert(*hosts)
    parts = (authority.cert_pem, certificate.cert_chain_pems[0], certificate.private_key_pem)
    for name, part in zip(TLS, parts, strict=True):
        part.write_to_path(folder / name)
    return {"RAY_USE_TLS": "1", **{name: str(folder / name) for name in TLS}}


@pytest.mark.parametrize("name", TLS)
def test_tls_without_one_of_its_files_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    for variable, path in (
        write_certificates(tmp_path / "files", "127.0.0.1") | {name: str(tmp_path / "none")}
    ).items():
        monkeypatch.setenv(variable, path)
    with pytest.raises(ValueError, match=r"RAY_USE_TLS: got .*allowed: with RAY_TLS_CA_CERT"):
        cluster._check_tls("head:6379", ("127.0.0.1", 9))


def test_tls_to_a_cluster_without_tls_is_refused(
    ray_cluster: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    address = ray_cluster.get_runtime_context().gcs_address
    host, _, port = address.rpartition(":")
    cluster._check_tls(address, (host, int(port)))
    for name, value in write_certificates(tmp_path / "files", host).items():
        monkeypatch.setenv(name, value)
    with pytest.raises(
        ValueError, match=f"RAY_ADDRESS: {address} and RAY_USE_TLS=1 here: .*allowed: TLS on both sides"
    ):
        cluster._check_tls(address, (host, int(port)))


@pytest.mark.slow
def test_a_run_with_tls_is_the_same_and_other_certificates_are_refused(
    long_run: PrivateRun, shards: str, folder: Path
) -> None:
    with open_network(folder, can_use_namespaces()) as network, serve_bucket(network, shards) as environment:
        trusted = write_certificates(folder / "own", *(network.find_address(number) for number in range(1, 4)))
        secured = Cluster(network, environment | trusted)
        secured.start()
        assert_success(secured, secured.start_redux(*list_words(folder)))
        assert_same_run(long_run, folder)
        for name in trusted:
            del secured.environment[name]
        foreign = write_certificates(folder / "foreign", network.find_address(2))
        one_sided = foreign | {TLS[0]: trusted[TLS[0]]}  # trusts the cluster, which does not trust it
        for changes, message in (
            ({}, "asks for TLS"),
            (foreign, "verify failed"),
            (one_sided, "closed the connection"),
        ):
            secured.environment |= changes
            process = secured.start_redux(*list_words(folder), "name=other")
            assert wait_for_end(secured, process) == 2
            [line] = network.read_log(process).splitlines()
            assert line.startswith(f"redux: RAY_ADDRESS: {secured.address} ")
            assert message in line


# The page for operators of clusters

PAGE = Path(__file__).parents[3] / "cluster" / "README.md"
BLOCKS = dict(re.findall(r"^```sh ?(\w*)\n(.*?)^```", PAGE.read_text(), re.MULTILINE | re.DOTALL))


class Operator:
    """Shells that run blocks of the page as printed, in a home and a folder of their own."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.shells = folder, list[subprocess.Popen[bytes]]()
        for name in ("home", "ray", "bin"):
            (folder / name).mkdir()
        (folder / "jobs").symlink_to(PAGE.parents[1] / "jobs")
        redux = folder / "bin" / "redux"
        redux.write_text(f'#!/bin/sh\nexec "{sys.executable}" -m jobs.command "$@"\n')
        redux.chmod(0o755)
        environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
        path = os.pathsep.join([str(redux.parent), sysconfig.get_path("scripts"), environment["PATH"]])
        self.environment = environment | {
            "HOME": str(folder / "home"), "PATH": path, "RAY_TMPDIR": str(folder / "ray"),
            "PYTHONPATH": str(PAGE.parents[1]),
        }  # fmt: skip

    def start(self, block: str) -> subprocess.Popen[bytes]:
        with self.find_log(len(self.shells)).open("wb") as log:
            shell = subprocess.Popen(
                ["bash", "-ec", block], cwd=self.folder, env=self.environment, stdin=subprocess.DEVNULL,
                stdout=log, stderr=log, start_new_session=True, preexec_fn=accept_ctrl_c,
            )  # fmt: skip
        self.shells.append(shell)
        return shell

    def find_log(self, number: int) -> Path:
        return self.folder / f"shell-{number}.log"

    def wait_for_ray(self, shell: subprocess.Popen[bytes]) -> None:
        log = self.find_log(self.shells.index(shell))

        def has_started() -> bool:
            assert shell.poll() is None, log.read_text()
            return "Ray runtime started" in log.read_text()

        wait_until(has_started)

    def run(self, block: str) -> str:
        shell = self.start(block)
        code, output = shell.wait(500), self.find_log(self.shells.index(shell)).read_text()
        assert code == 0, output[-3000:]
        return output


def accept_ctrl_c() -> None:
    """Reset SIGINT: a background job, such as the tests may be, and its children ignore it."""
    signal.signal(signal.SIGINT, signal.default_int_handler)


def is_used(port: int) -> bool:
    with socket.socket() as client:
        return client.connect_ex(("127.0.0.1", port)) == 0


def test_the_page_has_these_blocks() -> None:
    assert list(BLOCKS) == ["", "head", "node", "run", "submit"]


@pytest.mark.slow
def test_the_page_works_as_printed(folder: Path) -> None:
    assert not is_used(6399)
    assert not is_used(8265)
    operator = Operator(folder)
    try:
        output, token = operator.run(BLOCKS[""]), folder / "home" / ".ray" / "auth_token"
        assert token.read_text() not in output
        assert token.stat().st_mode & 0o777 == 0o600
        head = operator.start(BLOCKS["head"])
        operator.wait_for_ray(head)
        node = operator.start(BLOCKS["node"])
        operator.wait_for_ray(node)
        assert "two-nodes is finished" in operator.run(BLOCKS["run"])
        operator.run(BLOCKS["submit"])
        for shell in (node, head):
            children = psutil.Process(shell.pid).children(recursive=True)
            os.killpg(shell.pid, signal.SIGINT)
            shell.wait(60)
            assert not psutil.wait_procs(children, timeout=90)[1]
    finally:
        for shell in operator.shells:
            kill(shell)
