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
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from http.client import HTTPConnection
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
from PIL import Image

from pipelines import cluster, shards, storage
from tests.jobs.machines import RAY, Machines, kill, lines, until

JOB = """
name: small
workers: 2
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
    global_batch: 8
    micro_batch: 2
    learning_rate: {tower: 1e-3, projector: 1e-3, language: 1e-3}
    checkpoint_every: 4
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
def bucket(ray_cluster: Any, tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    """The environment by which s3://runs is reached, where `set` is a set of 22 samples."""
    command = [sys.executable, "-u", "-m", "moto.server", "-H", "127.0.0.1", "-p", "0"]
    server = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    assert server.stdout
    port = next(int(found[1]) for line in server.stdout if (found := re.search(r"http://127\.0\.0\.1:(\d+)", line)))
    threading.Thread(target=server.stdout.read, daemon=True).start()  # a full pipe would stop it
    maker = HTTPConnection("127.0.0.1", port)
    maker.request("PUT", "/runs")
    assert maker.getresponse().status == 200
    environment = {
        "AWS_ENDPOINT_URL": f"http://127.0.0.1:{port}",
        "AWS_ACCESS_KEY_ID": "a-key-of-ours",
        "AWS_SECRET_ACCESS_KEY": f"a-secret-{secrets.token_hex(8)}",
        "AWS_DEFAULT_REGION": "us-east-1",
        "WANDB_API_KEY": f"another-{secrets.token_hex(8)}",
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN": secrets.token_hex(32),
    }
    with pytest.MonkeyPatch.context() as patch:
        made = make(tmp_path_factory.mktemp("set"))
        for name in ("AWS_ENDPOINT_URL", "AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_DEFAULT_REGION"):
            patch.setenv(name, environment[name])
        for name in storage.names(made):
            storage.write(storage.join("s3://runs/set", name), storage.read(storage.join(made, name)))
    yield environment
    server.terminate()
    server.wait()


def make(folder: Path) -> str:
    noise = np.random.default_rng(0)
    records = []
    for number in range(22):
        Image.fromarray(noise.integers(0, 256, (16, 16, 3), dtype=np.uint8)).save(folder / f"{number}.png")
        turns = [("human", f"<image>\nis shape number {number} red?"), ("gpt", ("yes", "no")[number % 2])]
        said = [{"from": who, "value": text} for who, text in turns]
        records.append({"id": str(number), "image": f"{number}.png", "conversations": said})
    shards.make(records, str(folder), str(folder / "made"), shards.Making(samples_per_shard=5))
    return str(folder / "made")


def job(folder: Path, steps: int = STEPS) -> tuple[str, ...]:
    """Words for redux, by which the job runs in folder/small."""
    path = folder / "job.yaml"
    path.write_text(JOB.replace("SIZES", SIZES).replace("STEPS", str(steps)).replace("FOLDER", folder.name))
    return "run", str(path), "--into", str(folder)


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


@pytest.fixture(scope="module")
def alone(bucket: dict[str, str]) -> Iterator[Seen]:
    folder = short()
    for name in ("ray", "tmp"):
        (folder / name).mkdir()
    machines = Machines(folder / "ray", bucket | {"TMPDIR": str(folder / "tmp"), "RAY_ADDRESS": ""})
    for name in ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN"):
        del machines.environment[name]
    machines.address = ""
    process = machines.command(*job(folder))
    try:
        until(lambda: process.poll() is not None or losses(folder))
        assert process.poll() is None, machines.log(process).read_text()
        seen = look(folder, psutil.Process(process.pid))
        assert process.wait(200) == 0, machines.log(process).read_text()
        yield seen
    finally:
        machines.close()
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
    return Seen(folder, listening, "\n".join(commands), token, dashboard)


def test_a_ray_of_its_own_listens_on_loopback_alone(alone: Seen) -> None:
    assert any("gcs_server" in name for name in alone.listening)
    assert any("RayTrainWorker" in name for name in alone.listening)
    heard = {name: {ip.removeprefix("::ffff:") for ip in ips} for name, ips in alone.listening.items()}
    assert {ip for ips in heard.values() for ip in ips} == {"127.0.0.1"}, heard


def test_a_ray_of_its_own_asks_for_a_token_and_shows_no_dashboard(alone: Seen) -> None:
    assert len(alone.token) == 64
    assert not alone.dashboard


def test_secrets_are_in_the_environment_and_nowhere_else(alone: Seen, bucket: dict[str, str]) -> None:
    hidden = [alone.token, bucket["AWS_SECRET_ACCESS_KEY"], bucket["WANDB_API_KEY"]]
    assert all(hidden)
    assert not [one for one in hidden if one in alone.commands]
    files = [path for path in alone.folder.rglob("*") if path.is_file()]
    assert any("logs" in path.parts for path in files), "Ray's session is there"
    assert alone.folder / "small" / "job.yaml" in files
    assert not [path for path in files for one in hidden if one.encode() in path.read_bytes()]


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
    monkeypatch.setattr(cluster, "_answers", lambda place: ip)
    monkeypatch.setenv("RAY_AUTH_MODE", mode)
    if not refused:
        with cluster._named("head:6379") as settings:
            assert settings == {"address": "head:6379"}
        return
    with (
        pytest.raises(ValueError, match=f"RAY_ADDRESS: head:6379 is {ip}, a public address"),
        cluster._named("head:6379"),
    ):
        pass


@pytest.mark.parametrize(("address", "why"), [("head", "got head, allowed: HOST:PORT"), ("127.0.0.1:1", "refused")])
def test_a_ray_that_is_not_there_is_told_in_one_line(
    bucket: dict[str, str], folder: Path, address: str, why: str
) -> None:
    machines = Machines(folder, bucket)
    machines.address = address
    process = machines.command(*job(folder))
    assert process.wait(60) == 2
    [line] = machines.log(process).read_text().splitlines()
    assert line.startswith("redux: RAY_ADDRESS: ")
    assert why in line


@pytest.fixture
def machines(bucket: dict[str, str], folder: Path) -> Iterator[Machines]:
    """A head and two nodes, which ask for a token."""
    with started(folder, bucket) as made:
        yield made


@contextmanager
def started(folder: Path, environment: dict[str, str]) -> Iterator[Machines]:
    made = Machines(folder, environment)
    try:
        made.start_head()
        made.add()
        made.add()
        yield made
    finally:
        made.close()


def ended(machines: Machines, process: subprocess.Popen[bytes]) -> int:
    """Its exit code; whatever happened, nothing hangs."""
    try:
        return process.wait(300)
    except subprocess.TimeoutExpired:
        raise AssertionError(machines.log(process).read_text()[-3000:]) from None


def at(machines: Machines, process: subprocess.Popen[bytes], folder: Path, step: int) -> None:
    """Wait for a step."""

    def there() -> bool:
        assert process.poll() is None, machines.log(process).read_text()[-3000:]
        return bool(losses(folder)) and losses(folder)[-1][0] >= step

    until(there)


def test_a_run_on_two_machines_is_that_of_one(alone: Seen, machines: Machines, folder: Path) -> None:
    process = machines.command(*job(folder))
    assert ended(machines, process) == 0, machines.log(process).read_text()[-3000:]
    assert losses(folder) == losses(alone.folder)
    assert consumed(folder) == consumed(alone.folder)
    assert starts(folder) == [2]


@contextmanager
def still(machines: Machines) -> Iterator[None]:
    """All workers stand still, so that the run does not end before something else has happened."""
    found = [
        one
        for machine in machines.nodes
        for one in psutil.Process(machine.pid).children(recursive=True)
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
def test_machines_that_go_and_come_do_not_show(alone: Seen, machines: Machines, folder: Path) -> None:
    words = (*job(folder), "workers=[1, 2]")
    process = machines.command(*words)
    at(machines, process, folder, 10)
    kill(machines.nodes.pop())
    until(lambda: starts(folder)[-1:] == [1])
    with still(machines):
        machines.add()
    assert ended(machines, process) == 0, machines.log(process).read_text()[-3000:]
    assert starts(folder)[0] == 2
    assert 1 in starts(folder)
    assert starts(folder)[-1] == 2
    steps, expected = zip(*losses(alone.folder), strict=True)
    assert [step for step, _ in losses(folder)] == list(steps)
    assert [loss for _, loss in losses(folder)] == pytest.approx(expected, abs=BOUND)
    assert consumed(folder) == consumed(alone.folder)


@pytest.mark.slow
def test_a_head_that_is_killed_ends_the_command_which_then_goes_on(
    alone: Seen, machines: Machines, folder: Path
) -> None:
    """Without a store of its own Ray's state is gone with the head, and so are the nodes."""
    words = job(folder)
    process = machines.command(*words)
    at(machines, process, folder, 10)
    kill(machines.head)
    assert ended(machines, process) != 0
    told_once(machines, process)
    for node in machines.nodes:
        assert node.wait(120) != 0
    machines.start_head()
    machines.add()
    machines.add()
    again = machines.command(*words)
    assert ended(machines, again) == 0, machines.log(again).read_text()[-3000:]
    same_end(alone, folder)


def told_once(machines: Machines, process: subprocess.Popen[bytes]) -> None:
    text = machines.log(process).read_text()
    assert text.count("redux: the head of the cluster at ") == 1, text[-3000:]
    assert "The same command goes on from the last checkpoint" in text
    assert "Traceback" not in text


def same_end(alone: Seen, folder: Path) -> None:
    assert losses(folder) == losses(alone.folder)
    assert consumed(folder) == consumed(alone.folder)


# The page for who operates clusters

PAGE = Path(__file__).parents[2] / "cluster" / "README.md"
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

        until(up)

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
        if (
            subprocess.run([sys.executable, "-m", "jobs.command", "submit", "--help"], capture_output=True).returncode
            == 0
        ):
            operator.does(BLOCKS["submit"])
        for shell in (node, head):
            started = psutil.Process(shell.pid).children(recursive=True)
            os.killpg(shell.pid, signal.SIGINT)
            shell.wait(60)
            assert not psutil.wait_procs(started, timeout=90)[1]
    finally:
        for shell in operator.shells:
            kill(shell)
