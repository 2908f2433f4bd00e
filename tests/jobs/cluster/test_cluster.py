"""`redux run` where several machines are, and where they come and go: the same losses; and what others see of it.

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
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import trustme
from PIL import Image

from pipelines.core import cluster
from pipelines.data import shard_writer
from pipelines.data.options import ShardOptions
from tests.jobs.machines import QUICK, RAY, Cluster, Network, Process, apart, kill, lines, network, wait_until

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
STEPS = 60
BOUND = 1e-5
"""Of the loss, by which runs of other numbers of workers differ."""


@pytest.fixture
def folder() -> Iterator[Path]:
    made = short()
    yield made
    shutil.rmtree(made)


def short() -> Path:
    """A folder with a short name, since Ray's sockets lie in it."""
    return Path(tempfile.mkdtemp(prefix="m-", dir="/tmp"))


@pytest.fixture(scope="module")
def made(ray_cluster: Any, tmp_path_factory: pytest.TempPathFactory) -> str:
    """A set of 22 samples."""
    return make(tmp_path_factory.mktemp("set"))


SECRETS = {
    name: f"secret-{secrets.token_hex(16)}" for name in ("AWS_SECRET_ACCESS_KEY", "WANDB_API_KEY", "RAY_AUTH_TOKEN")
}


@contextmanager
def bucket(network: Network, made: str) -> Iterator[dict[str, str]]:
    """The environment by which s3://runs is reached on a network, where `set` is the set that was made."""
    settings = {"AWS_ACCESS_KEY_ID": "a-key-of-ours", "AWS_DEFAULT_REGION": "us-east-1", **SECRETS}
    command = network.besides([sys.executable, "-m", "tests.jobs.bucket", network.gateway, made])
    pipe, environment = subprocess.PIPE, {**os.environ, **settings}
    with (
        (network.folder / "bucket.log").open("wb") as log,
        subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=log, env=environment, text=True) as server,
    ):  # it ends with stdin
        assert server.stdout
        url = server.stdout.readline().strip()
        assert url, "the bucket is not there"
        yield {"AWS_ENDPOINT_URL": url, "RAY_AUTH_MODE": "token", **settings}


def make(folder: Path) -> str:
    noise = np.random.default_rng(0)
    records = []
    for number in range(22):
        Image.fromarray(noise.integers(0, 256, (16, 16, 3), dtype=np.uint8)).save(folder / f"{number}.png")
        turns = [("human", f"<image>\nis shape number {number} red?"), ("gpt", ("yes", "no")[number % 2])]
        said = [{"from": who, "value": text} for who, text in turns]
        records.append({"id": str(number), "image": f"{number}.png", "conversations": said})
    shard_writer.make_shards(records, str(folder), str(folder / "made"), ShardOptions(samples_per_shard=5))
    return str(folder / "made")


def job(folder: Path, steps: int = STEPS) -> tuple[str, ...]:
    """Words for redux, by which the job runs in folder/small."""
    path = folder / "job.yaml"
    path.write_text(JOB.replace("SIZES", SIZES).replace("STEPS", str(steps)).replace("FOLDER", folder.name))
    return "run", str(path), "--runs-dir", str(folder)


def losses(folder: Path) -> list[tuple[int, float]]:
    return [(one["step"], one["loss"]) for one in lines(folder / "small" / "metrics.jsonl")]


def consumed(folder: Path) -> str:
    return (folder / "small" / "consumed.jsonl").read_text()


def starts(folder: Path) -> list[int]:
    """How many workers there were, each time that they were started."""
    return [one["workers"] for one in lines(folder / "small" / "ledger.jsonl") if one["event"] == "start"]


# A Ray of its own


@dataclass(frozen=True)
class Seen:
    """A run on a Ray of its own, and what others on its machine could see of it."""

    folder: Path
    listening: dict[str, set[str]]  # processes to addresses
    commands: str
    token: str
    dashboard: bool
    files: dict[Path, bytes]


@pytest.fixture(scope="module")
def alone(made: str) -> Iterator[Seen]:
    folder = short()
    (folder / "tmp").mkdir()
    try:
        with network(folder, apart=False) as here, bucket(here, made) as environment:
            machine = here.add()
            environment = {**os.environ, **QUICK, **environment, "TMPDIR": str(folder / "tmp")}
            for name in ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_ADDRESS"):
                environment.pop(name, None)
            process = machine.starts([sys.executable, "-m", "jobs.command", *job(folder)], environment)
            wait_until(lambda: process.poll() is not None or losses(folder))
            assert process.poll() is None, here.said(process)
            seen = look(folder, psutil.Process(process.pid))
            assert process.wait(200) == 0, here.said(process)
            yield seen
    finally:
        shutil.rmtree(folder)


def look(folder: Path, driver: psutil.Process) -> Seen:
    listening: dict[str, set[str]] = {}
    commands, token = [], ""
    for one in (driver, *driver.children(recursive=True)):
        try:
            words = one.cmdline()
            open_ = {str(each.laddr.ip) for each in one.net_connections("inet") if each.status == psutil.CONN_LISTEN}
            token = one.environ().get("RAY_AUTH_TOKEN") or token
        except psutil.Error:
            continue
        listening[f"{one.pid} {Path(words[0]).name if words else one.name()}"] = open_
        commands += words
    dashboard = "--disable-frontend" not in commands
    return Seen(folder, listening, "\n".join(commands), token, dashboard, contents(folder))


def contents(folder: Path) -> dict[Path, bytes]:
    """Each file's bytes; those of Ray's own folder are there only while it runs."""
    found = {}
    for path in folder.rglob("*"):
        with suppress(OSError):  # it comes and goes
            if path.is_file():
                found[path] = path.read_bytes()
    return found


def test_a_ray_of_its_own_listens_on_loopback_alone(alone: Seen) -> None:
    assert any("gcs_server" in name for name in alone.listening)
    assert any("RayTrainWorker" in name for name in alone.listening)
    heard = {name: {ip.removeprefix("::ffff:") for ip in ips} for name, ips in alone.listening.items()}
    assert {ip for ips in heard.values() for ip in ips} == {"127.0.0.1"}, heard


def test_a_ray_of_its_own_asks_for_a_token_and_shows_no_dashboard(alone: Seen) -> None:
    assert len(alone.token) == 64
    assert not alone.dashboard


def test_secrets_are_in_the_environment_and_nowhere_else(alone: Seen) -> None:
    hidden = [alone.token, SECRETS["AWS_SECRET_ACCESS_KEY"], SECRETS["WANDB_API_KEY"]]
    assert all(hidden)
    assert not [one for one in hidden if one in alone.commands]
    assert any("logs" in path.parts for path in alone.files), "Ray's session is there"
    written = contents(alone.folder)
    assert alone.folder / "small" / "job.yaml" in written
    both = [*alone.files.items(), *written.items()]
    assert not [path for path, data in both for one in hidden if one.encode() in data]


# Named ones


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
def test_a_ray_that_is_not_there_is_told_in_one_line(folder: Path, address: str, why: str) -> None:
    command = [sys.executable, "-m", "jobs.command", "run", "jobs/recipes/quickstart.yaml", "--runs-dir", str(folder)]
    ended = subprocess.run(command, env={**os.environ, "RAY_ADDRESS": address}, capture_output=True, text=True)
    assert ended.returncode == 2
    [line] = (ended.stdout + ended.stderr).splitlines()
    assert line.startswith("redux: RAY_ADDRESS: ")
    assert why in line


@pytest.fixture
def cluster_of_two(made: str, folder: Path) -> Iterator[Cluster]:
    """A head and two nodes, which ask for a token, and a bucket."""
    with network(folder, apart()) as machines, bucket(machines, made) as environment:
        cluster = Cluster(machines, environment)
        cluster.start()
        yield cluster


def ended(cluster: Cluster, process: Process) -> int:
    """Its exit code; whatever happened, nothing hangs."""
    try:
        return process.wait(600)
    except subprocess.TimeoutExpired:
        raise AssertionError(cluster.network.said(process)[-3000:]) from None


def finishes(cluster: Cluster, process: Process) -> None:
    assert ended(cluster, process) == 0, cluster.network.said(process)[-3000:]


def at(cluster: Cluster, process: Process, folder: Path, step: int) -> None:
    """Wait for a step."""

    def there() -> bool:
        assert process.poll() is None, cluster.network.said(process)[-3000:]
        return bool(losses(folder)) and losses(folder)[-1][0] >= step

    wait_until(there)


def test_a_run_on_two_machines_is_that_of_one(alone: Seen, cluster_of_two: Cluster, folder: Path) -> None:
    finishes(cluster_of_two, cluster_of_two.runs(*job(folder)))
    same_end(alone, folder)
    assert starts(folder) == [2]


@contextmanager
def still(cluster: Cluster) -> Iterator[None]:
    """All workers stand still, so that the run does not end before something else has happened."""
    found = [
        one
        for machine in cluster.nodes
        for one in machine.processes()
        if "RayTrainWorker" in one.name() + "".join(one.cmdline())
    ]
    for one in found:
        one.suspend()
    try:
        yield
    finally:
        for one in found:
            with suppress(psutil.NoSuchProcess):
                one.resume()


@pytest.mark.slow
def test_machines_that_go_and_come_do_not_show(alone: Seen, cluster_of_two: Cluster, folder: Path) -> None:
    process = cluster_of_two.runs(*job(folder), "num_workers=[1, 2]")
    at(cluster_of_two, process, folder, 10)
    cluster_of_two.nodes.pop().lose()
    wait_until(lambda: starts(folder)[-1:] == [1])
    with still(cluster_of_two):
        cluster_of_two.add()
    finishes(cluster_of_two, process)
    assert starts(folder)[0] == 2
    assert 1 in starts(folder)
    assert starts(folder)[-1] == 2
    steps, expected = zip(*losses(alone.folder), strict=True)
    assert [step for step, _ in losses(folder)] == list(steps)
    assert [loss for _, loss in losses(folder)] == pytest.approx(expected, abs=BOUND)
    assert consumed(folder) == consumed(alone.folder)


@pytest.mark.slow
def test_a_head_that_is_killed_ends_the_command_which_then_goes_on(
    alone: Seen, cluster_of_two: Cluster, folder: Path
) -> None:
    """Without a store of its own Ray's state is gone with the head, and so are the nodes."""
    process = cluster_of_two.runs(*job(folder))
    at(cluster_of_two, process, folder, 10)
    kill(cluster_of_two.head)
    assert ended(cluster_of_two, process) != 0
    told_once(cluster_of_two, process)
    for node in cluster_of_two.nodes:
        assert node.running[0].wait(120) != 0
    cluster_of_two.start()
    finishes(cluster_of_two, cluster_of_two.runs(*job(folder)))
    same_end(alone, folder)


@contextmanager
def kept(machines: Network, store: str) -> Iterator[dict[str, str]]:
    """A head's environment by which what Ray knows outlives it."""
    if store == "rocksdb":
        yield {"RAY_gcs_storage": "rocksdb", "RAY_gcs_storage_path": str(machines.folder / "state")}
        return
    server = ["redis-server", "--port", "6390", "--bind", machines.gateway, "--save", "", "--protected-mode", "no"]
    with subprocess.Popen(machines.besides(server), stdout=subprocess.DEVNULL) as running:
        try:
            yield {"RAY_REDIS_ADDRESS": f"{machines.gateway}:6390"}
        finally:
            running.terminate()


@pytest.fixture(
    params=[
        "rocksdb",
        pytest.param("redis", marks=pytest.mark.skipif(not shutil.which("redis-server"), reason="no redis-server")),
    ]
)
def cluster_with_a_store(request: pytest.FixtureRequest, made: str, folder: Path) -> Iterator[Cluster]:
    """A head whose state outlives it, two nodes that wait for it, and a bucket."""
    if not apart():
        pytest.skip("Ray starts no second head where it sees nodes of the first")
    with (
        network(folder, apart=True) as machines,
        bucket(machines, made) as environment,
        kept(machines, request.param) as state,
    ):
        patient = {"RAY_gcs_rpc_server_reconnect_timeout_s": "120"}
        cluster = Cluster(machines, environment | state | patient, dashboard=True)
        cluster.start()
        yield cluster


@pytest.mark.slow
def test_a_head_whose_state_is_kept_comes_back_to_a_run_that_went_on(
    alone: Seen, cluster_with_a_store: Cluster, folder: Path
) -> None:
    process = cluster_with_a_store.runs(*job(folder))
    at(cluster_with_a_store, process, folder, 10)
    kill(cluster_with_a_store.head)
    cluster_with_a_store.start_head()
    finishes(cluster_with_a_store, process)
    same_end(alone, folder)
    assert starts(folder) == [2]


@pytest.mark.slow
def test_a_submission_outlives_the_head_on_which_it_runs(
    alone: Seen, cluster_with_a_store: Cluster, folder: Path
) -> None:
    process = cluster_with_a_store.runs_at_the_head(*submit(cluster_with_a_store, folder))
    at(cluster_with_a_store, process, folder, 10)
    kill(cluster_with_a_store.head)
    cluster_with_a_store.start_head()
    finishes(cluster_with_a_store, process)
    assert "small is FAILED" in cluster_with_a_store.network.said(process)
    same_end(alone, folder)
    assert starts(folder) == [2, 2]


@pytest.mark.slow
def test_a_submission_that_its_cluster_forgot_is_made_again(alone: Seen, made: str, folder: Path) -> None:
    with network(folder, apart()) as machines, bucket(machines, made) as environment:
        cluster = Cluster(machines, environment, dashboard=True)
        cluster.start()
        process = cluster.runs_at_the_head(*submit(cluster, folder))
        at(cluster, process, folder, 10)
        kill(cluster.head)
        for node in cluster.nodes:
            assert node.running[0].wait(120) != 0
        cluster.start()
        finishes(cluster, process)
        assert "small is lost" in machines.said(process)
    same_end(alone, folder)
    assert starts(folder) == [2, 2]


def submit(cluster: Cluster, folder: Path) -> tuple[str, ...]:
    return "submit", *job(folder)[1:], "--retries", "1", "--address", cluster.dashboard


def told_once(cluster: Cluster, process: Process) -> None:
    text = cluster.network.said(process)
    assert text.count("redux: the head of the cluster at ") == 1, text[-3000:]
    assert "The same command continues from the last checkpoint" in text
    assert "Traceback" not in text


def same_end(alone: Seen, folder: Path) -> None:
    assert losses(folder) == losses(alone.folder)
    assert consumed(folder) == consumed(alone.folder)


TLS = ("RAY_TLS_CA_CERT", "RAY_TLS_SERVER_CERT", "RAY_TLS_SERVER_KEY")


def certified(folder: Path, *hosts: str) -> dict[str, str]:
    """The environment of machines that an authority of their own has certified."""
    folder.mkdir()
    authority = trustme.CA()
    certificate = authority.issue_cert(*hosts)
    parts = (authority.cert_pem, certificate.cert_chain_pems[0], certificate.private_key_pem)
    for name, part in zip(TLS, parts, strict=True):
        part.write_to_path(folder / name)
    return {"RAY_USE_TLS": "1", **{name: str(folder / name) for name in TLS}}


@pytest.mark.parametrize("name", TLS)
def test_tls_without_a_file_of_it_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    for each, path in (certified(tmp_path / "files", "127.0.0.1") | {name: str(tmp_path / "none")}).items():
        monkeypatch.setenv(each, path)
    with pytest.raises(ValueError, match=r"RAY_USE_TLS: got .*allowed: with RAY_TLS_CA_CERT"):
        cluster._check_tls("head:6379", ("127.0.0.1", 9))


def test_tls_where_the_cluster_has_none_is_told(
    ray_cluster: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    address = ray_cluster.get_runtime_context().gcs_address
    host, _, port = address.rpartition(":")
    cluster._check_tls(address, (host, int(port)))
    for name, value in certified(tmp_path / "files", host).items():
        monkeypatch.setenv(name, value)
    with pytest.raises(
        ValueError, match=f"RAY_ADDRESS: {address} and RAY_USE_TLS=1 here: .*allowed: TLS on both sides"
    ):
        cluster._check_tls(address, (host, int(port)))


@pytest.mark.slow
def test_with_tls_a_run_is_the_same_and_who_is_not_certified_is_refused(alone: Seen, made: str, folder: Path) -> None:
    with network(folder, apart()) as machines, bucket(machines, made) as environment:
        own = certified(folder / "own", *(machines.address(number) for number in range(1, 4)))
        secured = Cluster(machines, environment | own)
        secured.start()
        finishes(secured, secured.runs(*job(folder)))
        same_end(alone, folder)
        for name in own:
            del secured.environment[name]
        foreign = certified(folder / "foreign", machines.address(2))
        half = foreign | {TLS[0]: own[TLS[0]]}  # trusts the cluster, which does not trust it
        for given, told in (({}, "asks for TLS"), (foreign, "verify failed"), (half, "closed the connection")):
            secured.environment |= given
            process = secured.runs(*job(folder), "name=other")
            assert ended(secured, process) == 2
            [line] = machines.said(process).splitlines()
            assert line.startswith(f"redux: RAY_ADDRESS: {secured.address} ")
            assert told in line


# The page for who operates clusters

PAGE = Path(__file__).parents[3] / "cluster" / "README.md"
BLOCKS = dict(re.findall(r"^```sh ?(\w*)\n(.*?)^```", PAGE.read_text(), re.MULTILINE | re.DOTALL))


class Operator:
    """Shells in which blocks of the page are typed as they are printed, in a home and a folder of their own."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.shells = folder, list[subprocess.Popen[bytes]]()
        for name in ("home", "ray", "bin"):
            (folder / name).mkdir()
        (folder / "jobs").symlink_to(PAGE.parents[1] / "jobs")
        redux = folder / "bin" / "redux"
        redux.write_text(f'#!/bin/sh\nexec "{sys.executable}" -m jobs.command "$@"\n')
        redux.chmod(0o755)
        kept = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
        path = os.pathsep.join([str(redux.parent), str(Path(RAY).parent), kept["PATH"]])
        self.environment = kept | {
            "HOME": str(folder / "home"), "PATH": path, "RAY_TMPDIR": str(folder / "ray"),
            "PYTHONPATH": str(PAGE.parents[1]),
        }  # fmt: skip

    def types(self, block: str) -> subprocess.Popen[bytes]:
        with self.log(len(self.shells)).open("wb") as log:
            shell = subprocess.Popen(
                ["bash", "-ec", block], cwd=self.folder, env=self.environment, stdin=subprocess.DEVNULL,
                stdout=log, stderr=log, start_new_session=True, preexec_fn=ctrl_c,
            )  # fmt: skip
        self.shells.append(shell)
        return shell

    def log(self, number: int) -> Path:
        return self.folder / f"shell-{number}.log"

    def serves(self, shell: subprocess.Popen[bytes]) -> None:
        log = self.log(self.shells.index(shell))

        def up() -> bool:
            assert shell.poll() is None, log.read_text()
            return "Ray runtime started" in log.read_text()

        wait_until(up)

    def does(self, block: str) -> str:
        shell = self.types(block)
        code, said = shell.wait(500), self.log(self.shells.index(shell)).read_text()
        assert code == 0, said[-3000:]
        return said


def ctrl_c() -> None:
    """A background job, such as the suite may be, ignores Ctrl-C, and so do those that it starts."""
    signal.signal(signal.SIGINT, signal.default_int_handler)


def taken(port: int) -> bool:
    with socket.socket() as tried:
        return tried.connect_ex(("127.0.0.1", port)) == 0


def test_the_page_has_these_blocks() -> None:
    assert list(BLOCKS) == ["", "head", "node", "run", "submit"]


@pytest.mark.slow
def test_the_page_works_as_printed(folder: Path) -> None:
    assert not taken(6399)
    assert not taken(8265)
    operator = Operator(folder)
    try:
        said, token = operator.does(BLOCKS[""]), folder / "home" / ".ray" / "auth_token"
        assert token.read_text() not in said
        assert token.stat().st_mode & 0o777 == 0o600
        head = operator.types(BLOCKS["head"])
        operator.serves(head)
        node = operator.types(BLOCKS["node"])
        operator.serves(node)
        assert "two-nodes is finished" in operator.does(BLOCKS["run"])
        operator.does(BLOCKS["submit"])
        for shell in (node, head):
            started = psutil.Process(shell.pid).children(recursive=True)
            os.killpg(shell.pid, signal.SIGINT)
            shell.wait(60)
            assert not psutil.wait_procs(started, timeout=90)[1]
    finally:
        for shell in operator.shells:
            kill(shell)
