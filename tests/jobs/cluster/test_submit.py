"""A job on a cluster: what is uploaded, who may submit, and how a run continues after a kill and ends after a stop.

One head on loopback that requires a token serves all tests. The command line runs in a second process, since Ray reads
only once whether there are tokens. Most tests submit a checkout whose `jobs.command` prints its arguments and ends as
the name of the job says, so that they cost no training.
"""

import asyncio
import contextlib
import json
import multiprocessing
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import psutil
import pytest

from jobs.cluster import package, submit
from redux.extras import write_install_command
from tests.forks import ForkedCommand
from tests.jobs.command_line import CommandResult, run_command

pytestmark = pytest.mark.integration

ROOT = Path(__file__).parents[3]

JOB = """
name: small
num_workers: 1
data: {source: easy-vqa}
model:
  tower:
    image_size: 32
    patch_size: 16
    hidden_size: 16
    num_hidden_layers: 4
    num_attention_heads: 2
    intermediate_size: 16
  language: {hidden_size: 16, num_hidden_layers: 2, num_attention_heads: 2, intermediate_size: 16}
  vmtc: null
train:
  instruct:
    objective: language
    data: captions
    template: vicuna_bare
    steps: 2000
    global_batch_size: 4
    micro_batch_size: 4
    learning_rate: {projector: 1e-3, language: 1e-3}
    save_steps: 5
"""

CHECKOUT = '''
"""Stands in for Redux."""
import json, os, pathlib, signal, sys
name = next((word.removeprefix("name=") for word in sys.argv if word.startswith("name=")), "")
files = sorted(str(path) for path in pathlib.Path().rglob("*") if path.is_file() and path.suffix != ".pyc")
print(json.dumps({"argv": sys.argv[1:], "files": files, "greeting": os.environ.get("GREETING")}))
if name.startswith("waits"):
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("a checkpoint"))
    print("ready", flush=True)
    signal.pause()
sys.exit(3 if name.startswith("fails") else 2 if name.startswith("misused") else 0)
'''

SECRETS = (
    *(".env", ".env.local", ".netrc", ".aws/credentials", ".ssh/id_ed25519", ".git/config", ".kube/config"),
    *("server.pem", "conf/tls.key", "conf/id_rsa", "credentials.json", "conf/Credentials", "kubeconfig", "hub.token"),
    *("service-account.json", "secrets.yaml", "auth_token", "prod.env", "link.txt", "hf-token.txt", "rootkey.csv"),
    *("client_secret.apps.json", "a-project-0123456789ab.json", "my.env.local", "ssh_key", "passwords.txt", "keys/a"),
)
EXCLUDED_DIRS = (
    "data/a.txt",
    "runs/x/metrics.jsonl",
    "checkpoints/x",
    "wandb/x",
    "conf/__pycache__/x.py",
    "w.safetensors",
    "a.tar",
)
IGNORED = ("ignored.txt", "conf/notes.txt", "unwanted/x.txt")
PROJECT = '[project]\nname = "redux-vlm"\n'
TRAVEL = (
    ".gitignore",
    "keyboard.md",
    "conf/tokenizer.json",
    "conf/auth.py",
    ".rayignore",
    "conf/data/table.py",
    "conf/tokens.py",
    "jobs/__init__.py",
    "readme.md",
)


class Head(NamedTuple):
    address: str
    environment: dict[str, str]


def free_ports(count: int) -> list[int]:
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for server in sockets:
            server.bind(("127.0.0.1", 0))
        return [server.getsockname()[1] for server in sockets]


@pytest.fixture(scope="module")
def head() -> Iterator[Head]:
    """A Ray with a token, on loopback. It ends with the module."""
    folder = Path(tempfile.mkdtemp(prefix="r", dir="/tmp"))  # sockets are in it, and their paths must be short
    token = folder / "token"
    token.write_text("0123456789abcdef" * 4)
    dashboard, agent, client = free_ports(3)
    environment = os.environ | {
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN_PATH": str(token),
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        "HOME": str(folder),  # the default of --runs-dir
        "DS_ACCELERATOR": "cpu",
        "TQDM_MININTERVAL": "0.1",  # bars as on a terminal
    }
    for name in ("RAY_ADDRESS", "RAY_API_SERVER_ADDRESS", "RAY_AUTH_TOKEN"):
        environment.pop(name, None)
    options = [
        *("start", "--head", "--block", "--disable-usage-stats"),
        *("--node-ip-address=127.0.0.1", "--dashboard-host=127.0.0.1", "--port=0", f"--dashboard-port={dashboard}"),
        *(f"--dashboard-agent-listen-port={agent}", f"--ray-client-server-port={client}"),
        *("--num-cpus=2", "--num-gpus=0", f"--temp-dir={folder}/ray"),
    ]
    with (folder / "output").open("wb") as output:
        process = ForkedCommand("ray.scripts.scripts", options, environment, output.fileno())
    try:
        _wait_for_dashboard(dashboard, process)
        yield Head(f"http://127.0.0.1:{dashboard}", environment)
    finally:
        _end(process)
        shutil.rmtree(folder, ignore_errors=True)


def _wait_for_dashboard(port: int, process: ForkedCommand) -> None:
    import requests
    import tenacity

    for attempt in tenacity.Retrying(stop=tenacity.stop_after_delay(120), wait=tenacity.wait_fixed(0.5), reraise=True):
        with attempt:
            assert process.poll() is None
            requests.get(f"http://127.0.0.1:{port}/api/gcs_healthz", timeout=5).raise_for_status()


def _end(process: ForkedCommand) -> None:
    """End Ray's processes and their descendants."""
    with contextlib.suppress(psutil.NoSuchProcess):
        processes = [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]
        process.terminate()
        _, alive = psutil.wait_procs(processes, timeout=20)
        for survivor in alive:
            with contextlib.suppress(psutil.NoSuchProcess):
                survivor.kill()
    process.wait()


def call(words: list[str], folder: str, environment: dict[str, str]) -> CommandResult:
    """Run the command line in this process, in a folder and with further variables."""
    os.chdir(folder)
    with mock.patch.dict(os.environ, environment):
        return run_command(*words)


@contextlib.contextmanager
def process(environment: dict[str, str]) -> Iterator[ProcessPoolExecutor]:
    """Start a process that has this environment from its start."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        with mock.patch.dict(os.environ, environment, clear=True):
            pool.submit(os.getpid).result()
        yield pool


Redux = Callable[..., CommandResult]


@pytest.fixture(scope="module")
def redux(head: Head, checkout: Path) -> Iterator[Redux]:
    """`redux WORDS…` of a user with the token, in the folder of the checkout."""
    with process(head.environment) as pool:

        def run(
            *words: object, folder: Path = checkout, address: str = head.address, **environment: str
        ) -> CommandResult:
            future: Future[CommandResult] = pool.submit(
                call, [*map(str, words), "--address", address], str(folder), environment
            )
            return future.result()

        yield run


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that counts as a checkout of Redux, with many files that must not be uploaded."""
    folder = tmp_path_factory.mktemp("checkout")
    for name in (*SECRETS, *EXCLUDED_DIRS, *IGNORED, *TRAVEL, "pyproject.toml", "jobs/command.py", "job.yaml"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("# secret\n")
    (folder / "pyproject.toml").write_text(PROJECT)
    (folder / "link.txt").unlink()
    (folder / "link.txt").symlink_to(folder / ".netrc")
    (folder / ".gitignore").write_text("ignored.txt\n/unwanted\n")
    (folder / "conf" / ".rayignore").write_text("notes.txt\n")
    (folder / "jobs" / "command.py").write_text(CHECKOUT)
    (folder / "job.yaml").write_text(JOB)
    return folder


def jobs_api(head: Head, path: str) -> Any:
    import requests

    token = Path(head.environment["RAY_AUTH_TOKEN_PATH"]).read_text()
    answer = requests.get(head.address + path, headers={"Authorization": f"Bearer {token}"}, timeout=30)
    answer.raise_for_status()
    return answer.json()


def read_arguments(text: str) -> dict[str, Any]:
    """Read the line in which the stand-in prints its arguments, files and variable."""
    [line] = [line for line in text.splitlines() if line.startswith("{")]
    found: dict[str, Any] = json.loads(line)
    return found


# --- what is uploaded -------------------------------------------------------------------------------------------------


def test_a_package_has_code_without_secrets_and_data_and_the_job_gets_named_variables(redux: Redux) -> None:
    words = ("submit", "job.yaml", "name=travels", "--env", "GREETING", "--retries", 2)
    ended = redux(*words, GREETING="hello", OTHER="x")
    assert ended.code == 0, ended
    assert list_submissions(ended.out, tries=3) == ["travels"], "a success is not tried again"
    given = read_arguments(ended.out)
    assert given["greeting"] == "hello"
    assert "hello" not in ended.out.replace(json.dumps(given), "")
    assert given["argv"][:3] == ["run", "job.yaml", "name=travels"]
    assert given["argv"][-1].endswith("/redux/runs")
    assert set(given["files"]) == {"job.yaml", "pyproject.toml", "jobs/command.py", *TRAVEL} - {
        ".gitignore",
        ".rayignore",
    }
    assert redux("submit", "job.yaml", "name=travels", "--wait").out.count('"greeting": null') == 1


def test_a_job_file_outside_the_folder_is_packed(checkout: Path, tmp_path: Path) -> None:
    for job in (checkout / "runs" / "best.yaml", tmp_path / "elsewhere.yaml"):
        job.write_text(JOB)
        name = package.write_package(checkout, job, tmp_path / "package.zip")
        with zipfile.ZipFile(tmp_path / "package.zip") as archive:
            assert archive.read(name).decode() == JOB


def test_all_of_redux_is_packed() -> None:
    """No file of the repository has a name like a key or like data."""
    listed = ["git", "ls-files", "-z", "redux", "pipelines", "jobs", "pyproject.toml"]
    tracked = subprocess.run(listed, cwd=ROOT, capture_output=True, text=True, check=True).stdout.split("\0")
    travel = {path.relative_to(ROOT).as_posix() for path in package.list_files(ROOT)}
    assert {name for name in tracked if name and (ROOT / name).exists()} <= travel


def test_the_same_files_give_the_same_package(checkout: Path, tmp_path: Path) -> None:
    for name in ("a.zip", "b.zip"):
        package.write_package(checkout, checkout / "job.yaml", tmp_path / name)
        os.utime(checkout / "job.yaml", (0, 10**9))
    assert (tmp_path / "a.zip").read_bytes() == (tmp_path / "b.zip").read_bytes()


def test_a_folder_that_is_too_large_is_refused_with_its_largest_files(tmp_path: Path) -> None:
    for name, size in {
        "job.yaml": 9,
        "small.txt": 5,
        "large.bin": package.MAX_PACKAGE_BYTES,
        "larger.bin": 2 * package.MAX_PACKAGE_BYTES,
    }.items():
        with (tmp_path / name).open("wb") as file:
            file.truncate(size)
    with pytest.raises(ValueError, match=r"got 300 MiB .*larger.bin \(200 MiB\), large.bin \(100 MiB\)"):
        package.write_package(tmp_path, tmp_path / "job.yaml", tmp_path / "package.zip")
    assert not (tmp_path / "package.zip").exists()


KEYS = {
    "tls": "-----BEGIN {} PRIVATE KEY-----".format("EC"),
    "google": '{{"private_key": "-----BEGIN {}KEY"}}'.format("PRIVATE "),
    "aws": "key = AKIA{}".format("ABCDEFGH12345678"),
    "hub": "login('hf_{}')".format("a" * 34),
}


@pytest.mark.parametrize("key", KEYS)
def test_a_file_with_a_key_in_it_is_refused(checkout: Path, tmp_path: Path, key: str) -> None:
    (tmp_path / "here").mkdir()
    (tmp_path / "here" / "notes.py").write_text(KEYS[key])
    with pytest.raises(ValueError, match=r"notes.py: got a file with a key in it, allowed: none; a .rayignore"):
        package.write_package(tmp_path / "here", checkout / "job.yaml", tmp_path / "package.zip")
    (tmp_path / "here" / ".rayignore").write_text("notes.py\n")
    package.write_package(tmp_path / "here", checkout / "job.yaml", tmp_path / "package.zip")


def test_a_home_folder_is_not_uploaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    with pytest.raises(ValueError, match="would be uploaded"):
        package.write_package(tmp_path, tmp_path / "job.yaml", tmp_path / "package.zip")


def test_a_name_that_is_not_utf8_is_told_with_its_file(checkout: Path, tmp_path: Path) -> None:
    (tmp_path / "here").mkdir()
    (tmp_path / "here" / os.fsdecode(b"caf\xe9.py")).touch()
    with pytest.raises(ValueError, match=r"here/caf.*\.py: got a name that is not UTF-8, allowed: UTF-8; a .rayignore"):
        package.write_package(tmp_path / "here", checkout / "job.yaml", tmp_path / "package.zip")


@pytest.mark.parametrize(
    ("content", "message"), [(b"[project", "pyproject.toml: "), (b"\xff", "pyproject.toml: "), (b"project = 3", "")]
)
def test_a_project_file_that_is_none_is_named(tmp_path: Path, content: bytes, message: str) -> None:
    (tmp_path / "pyproject.toml").write_bytes(content)
    if message:
        with pytest.raises(ValueError, match=rf"{message}.*, allowed: TOML"):
            submit._is_redux(tmp_path)
    else:
        assert not submit._is_redux(tmp_path)


# --- who may submit, and what -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(("words", "message"), [
    (("learning=1",), "learning"),
    (("--runs-dir", "runs"), "--runs-dir: got runs"),
    (("--id", "a/b"), "--id: got a/b"),
    (("--env", "NOT_SET_ANYWHERE"), "--env: got NOT_SET_ANYWHERE, which is not set"),
    (("--env", "DOLLAR"), "--env: DOLLAR has a $ in its value"),
    (("--env", "KEY=hunter2"), "--env: got KEY=…"),
    (("checkpoints=here",), "checkpoints: got here"),
    (("data.sets={a: here}",), "data.sets.a: got here"),
    (("model={checkpoint: ./here}",), "model.checkpoint: got ./here"),
    (("data.make={a: {source: 's3://b/a', images: here}}",), "data.make.a.images: got here"),
    (("evaluate={tasks: {own: {file: q.jsonl, metric: exact}}}",), "evaluate.tasks.own.file: got q.jsonl"),
    (("data.sets={a: 's3://me:hunter2@host/a'}",), "a URL with a password"),
])  # fmt: skip
def test_a_wrong_submission_is_refused_before_a_connection(redux: Redux, words: tuple[str, ...], message: str) -> None:
    ended = redux("submit", "job.yaml", *words, address="http://127.0.0.1:9", DOLLAR="hunter2$HOME")
    assert (ended.code, ended.out, ended.err.count("\n")) == (2, "", 1)
    assert message in ended.err
    assert "hunter2" not in ended.err


VERBS = (
    ("submit", "job.yaml", "name=nobody"),
    ("jobs", "list"),
    *(("jobs", verb, "travels") for verb in ("status", "logs", "stop")),
    ("jobs", "logs", "-f", "travels"),
)


@pytest.mark.parametrize(("change", "token"), [
    ({"RAY_AUTH_TOKEN": "wrong"}, "another token than that of the cluster"),
    ({"RAY_AUTH_MODE": "disabled"}, "no token"),
    ({"RAY_AUTH_TOKEN_PATH": ""}, "no token"),
], ids=["wrong", "off", "missing"])  # fmt: skip
def test_without_the_token_every_verb_is_refused(
    head: Head, checkout: Path, change: dict[str, str], token: str
) -> None:
    before = jobs_api(head, "/api/jobs/")
    environment = {name: value for name, value in (head.environment | change).items() if value}
    with process(environment) as pool:
        for words in VERBS:
            ended = pool.submit(call, [*words, "--address", head.address], str(checkout), {}).result()
            assert (ended.code, ended.out, ended.err.count("\n")) == (2, "", 1), words
            assert f"refused, got {token}, allowed: RAY_AUTH_MODE=token" in ended.err
    assert jobs_api(head, "/api/jobs/") == before


@pytest.mark.parametrize(("address", "message"), [
    ("http://127.0.0.1:9", "no Ray answers here"),
    ("http://8.8.8.8:8265", "others could read the token"),
    ("10.0.0.1:8265", "allowed: http://HOST:PORT or https://HOST:PORT"),
    ("http://10.0.0.1:8265/#/overview", "allowed: http://HOST:PORT or https://HOST:PORT"),
    ("http://[::1", "allowed: http://HOST:PORT or https://HOST:PORT"),
    ("http://10.0.0.1:99999", "allowed: http://HOST:PORT or https://HOST:PORT"),
    ("http://a..b:8265", "no Ray answers here"),
    ("http://me:hunter2@10.0.0.1:8265", "got a password in it"),
])  # fmt: skip
def test_a_wrong_address_is_refused_in_one_line(redux: Redux, address: str, message: str) -> None:
    ended = redux("jobs", "list", address=address)
    assert (ended.code, ended.out, ended.err.count("\n")) == (2, "", 1)
    assert message in ended.err
    assert "hunter2" not in ended.err


def test_without_tokens_a_public_address_is_refused(redux: Redux) -> None:
    ended = redux("submit", "job.yaml", address="http://8.8.8.8:8265", RAY_AUTH_MODE="disabled")
    assert (ended.code, ended.out, ended.err.count("\n")) == (2, "", 1)
    assert "others could read the token and the variables of a job" in ended.err


def test_no_proxy_receives_the_token(redux: Redux) -> None:
    proxy = {"http_proxy": "http://127.0.0.1:9", "no_proxy": "", "NO_PROXY": ""}
    assert redux("jobs", "list", **proxy).code == 0


@pytest.mark.parametrize("id", ["", "a?b", "../version", "a b"])
@pytest.mark.parametrize("verb", ["status", "logs", "stop"])
def test_a_wrong_id_is_refused_in_one_line(redux: Redux, verb: str, id: str) -> None:
    ended = redux("jobs", verb, id)
    assert (ended.code, ended.out) == (2, "")
    assert ended.err == f"redux: ID: got {id or 'nothing'}, allowed: an id that redux jobs list shows\n"


@pytest.mark.parametrize("words", [["submit"], ["jobs", "logs"], ["jobs", "stop"]])
def test_help_loads_nothing_heavy(words: list[str]) -> None:
    program = (
        f"import sys\nfrom jobs.command import main\ntry: main({[*words, '--help']})\n"
        "except SystemExit: print('LOADED', *sys.modules)"
    )
    ended = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True)
    loaded = set(ended.stdout.partition("LOADED")[2].split())
    assert "argparse" in loaded
    assert not loaded & {"ray", "torch", "pydantic", "yaml"}


def test_a_missing_extra_is_named_in_one_line(tmp_path: Path) -> None:
    program = (
        "import sys; sys.modules['aiohttp'] = None; from jobs.command import main; sys.exit(main(['jobs', 'list']))"
    )
    ended = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True)
    assert (ended.returncode, ended.stderr.count("\n")) == (2, 1)
    assert write_install_command("cluster") in ended.stderr


# --- one at a time ----------------------------------------------------------------------------------------------------


def test_a_run_has_one_active_submission_that_stops_within_its_grace(redux: Redux, head: Head) -> None:
    first = redux("submit", "job.yaml", "name=waits", "recovery.grace_s=7")
    assert first.out.startswith("waits is submitted")
    wait_for_log(head, "waits", "ready")
    for words in ((), ("--id", "another")):
        second = redux("submit", "job.yaml", "name=waits", *words)
        assert second.code == 2
        assert "waits is RUNNING, allowed: one submission of a run at a time" in second.err
    assert redux("jobs", "status", "waits").code == 0
    stopped = redux("jobs", "stop", "waits")
    assert stopped.code == 0
    assert "up to 22 s" in stopped.out
    assert "waits is STOPPED" in stopped.out
    assert "a checkpoint" in redux("jobs", "logs", "waits").out
    assert redux("jobs", "status", "waits").code == 130
    assert "waits is STOPPED" in redux("jobs", "stop", "waits").out
    assert redux("submit", "job.yaml", "name=waits").out.startswith("waits-2 is submitted")
    listed = redux("jobs", "list").out
    assert re.search(r"^waits +waits +STOPPED ", listed, re.MULTILINE)
    assert re.search(r"^waits-2 +waits +(PENDING|RUNNING) ", listed, re.MULTILINE)
    redux("jobs", "stop", "waits-2")


def test_an_id_is_submitted_once(redux: Redux, head: Head) -> None:
    words = ("submit", "job.yaml", "name=fails", "--id", "chosen", "--wait")
    first, again = redux(*words), redux(*words)
    assert (first.code, again.code) == (3, 3)
    assert read_arguments(first.out) == read_arguments(again.out)
    assert "chosen is FAILED" in again.out
    assert [job["submission_id"] for job in jobs_api(head, "/api/jobs/")].count("chosen") == 1
    assert "which is fails, allowed: an id of other" in redux("submit", "job.yaml", "name=other", "--id", "chosen").err


@pytest.mark.parametrize(("name", "code", "submissions"), [("fails-often", 3, 2), ("misused", 2, 1)])
def test_a_failure_is_tried_again_unless_it_is_a_mistake(redux: Redux, name: str, code: int, submissions: int) -> None:
    ended = redux("submit", "job.yaml", f"name={name}", "--retries", 1)
    assert ended.code == code
    assert list_submissions(ended.out, tries=2) == [name, f"{name}-2"][:submissions]


def list_submissions(output: str, tries: int) -> list[str]:
    """List the ids that a command with this number of tries has submitted."""
    return re.findall(rf"^(\S+) is submitted, try \d of {tries}", output, re.MULTILINE)


# --- a real run -------------------------------------------------------------------------------------------------------


def wait_for_log(head: Head, id: str, pattern: str, accepts: Callable[[str], bool] = bool) -> None:
    """Wait until a match of the pattern in the log of a job is accepted."""
    import aiohttp

    token = Path(head.environment["RAY_AUTH_TOKEN_PATH"]).read_text()

    async def listen() -> None:
        text = ""
        headers = {"Authorization": f"Bearer {token}"}
        async with aiohttp.ClientSession(headers=headers) as session:
            # The log is never closed: closing would wait for its end.
            log = await session.ws_connect(f"{head.address}/api/jobs/{id}/logs/tail")
            async for message in log:
                text += message.data
                if any(accepts(found) for found in re.findall(pattern, text)):
                    return
        raise AssertionError(f"{id} never wrote {pattern}:\n{text}")

    asyncio.run(asyncio.wait_for(listen(), 600))


def read_events(run: Path, kind: str) -> list[dict[str, Any]]:
    lines = map(json.loads, (run / "ledger.jsonl").read_text().splitlines())
    return [line for line in lines if line["event"] == kind]


def test_a_killed_run_is_retried_from_its_checkpoint_and_a_stopped_one_saves_one(
    redux: Redux, head: Head, tmp_path: Path
) -> None:
    """From a folder that is not a checkout, so with the Redux that the cluster has."""
    turns = [{"from": "human", "value": "is it odd?"}, {"from": "gpt", "value": "yes"}]
    (tmp_path / "talk.json").write_text(json.dumps([{"id": id, "conversations": turns} for id in range(20)]))
    (tmp_path / "job.yaml").write_text(JOB)
    data = {"source": None, "sets": {"talk": f"{tmp_path}/talk"}, "make": {"talk": {"source": f"{tmp_path}/talk.json"}}}
    job = ("job.yaml", "name=real", f"data={json.dumps(data)}", "train.instruct.data=talk")
    words = ("submit", *job, "--runs-dir", tmp_path / "on the cluster", "--retries", 1)
    waiting = subprocess.Popen(
        [sys.executable, "-m", "jobs.command", *map(str, words), "--address", head.address],
        cwd=tmp_path, env=head.environment | {"PYTHONPATH": str(ROOT)}, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    output = wait_for_line(waiting, "real is submitted")
    wait_for_log(head, "real", r"(\d+)/2000", lambda step: int(step) >= 10)
    os.kill(int(jobs_api(head, "/api/jobs/real")["driver_info"]["pid"]), signal.SIGKILL)
    output += wait_for_line(waiting, "real-2 is submitted")
    assert "real is FAILED" in output
    run = tmp_path / "on the cluster" / "real"
    done = max(event["step"] for event in read_events(run, "step"))
    wait_for_log(head, "real-2", r"(\d+)/2000", lambda step: int(step) >= done + 10)
    assert "real-2 is STOPPED" in redux("jobs", "stop", "real-2").out
    rest, _ = waiting.communicate(timeout=60)
    assert waiting.returncode == 130, output + rest
    assert "is submitted" not in rest

    steps = [json.loads(line)["step"] for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert steps == list(range(1, steps[-1] + 1))
    first, second = (event["cursor"] for event in read_events(run, "start"))
    assert first == 0
    assert 0 < second <= done
    lost_steps = len(read_events(run, "step")) - steps[-1]
    assert lost_steps <= 10, "a killed run loses the steps after its last checkpoint"
    last = run / "checkpoints" / "instruct" / f"step-{steps[-1]:06d}"
    assert (last / "manifest.json").exists(), "the stop saved the last step"


def wait_for_line(process: "subprocess.Popen[str]", text: str) -> str:
    assert process.stdout
    seen = ""
    for line in process.stdout:
        seen += line
        if text in line:
            return seen
    raise AssertionError(f"never wrote {text}:\n{seen}")


def test_an_interrupted_wait_leaves_the_job_running(redux: Redux, head: Head, checkout: Path) -> None:
    waiting = subprocess.Popen(
        [sys.executable, "-P", "-m", "jobs.command", "submit", "job.yaml", "name=waits-on", "--wait"],
        cwd=checkout, env=head.environment | {"RAY_API_SERVER_ADDRESS": head.address, "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    wait_for_line(waiting, "ready")
    begun = time.monotonic()
    waiting.send_signal(signal.SIGINT)
    _, err = waiting.communicate(timeout=60)
    assert waiting.returncode == 130
    assert "waits-on continues on the cluster; redux jobs logs waits-on -f shows it" in err
    assert time.monotonic() - begun < 30
    assert "waits-on is RUNNING" in redux("jobs", "status", "waits-on").out
    redux("jobs", "stop", "waits-on")
