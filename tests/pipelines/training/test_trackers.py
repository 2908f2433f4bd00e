"""Trackers keep one ID across killed processes, and their failures do not stop the run.

Values are read back with each library's reader; for W&B that is `wandb leet inspect` on the files of a run.
"""

import io
import json
import os
import pty
import re
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
from mlflow import MlflowClient
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from pipelines.training import trackers
from pipelines.training.trackers import TRACKER_IDS_FILE, TRACKERS, Tracker, TrackerGroup, check_trackers
from redux.extras import write_install_command

pytestmark = pytest.mark.integration

SETTINGS = {"name": "job", "train": {"tower": {"epochs": 2, "data": None}}, "many": {str(n): n for n in range(150)}}
# The discard port, on which no server listens.
UNUSED_ADDRESS = "http://127.0.0.1:9"
CUT_OFF = {"DO_NOT_TRACK": "true", "WANDB_ERROR_REPORTING": "false", "WANDB_BASE_URL": UNUSED_ADDRESS}
WRITER = """
import sys
from pathlib import Path
from pipelines.training.trackers import TrackerGroup
name, run, stage, cursor, stop, shift = sys.argv[1:]
group = TrackerGroup([name], Path(run), "job", stage, int(cursor), {"a": {"b": 1}}, print)
for step in range(int(cursor) + 1, int(stop) + 1):
    group.write(step, {"loss": step / 4 + int(shift), "replaced": step % 2})
print("written", flush=True)
sys.stdin.read()
group.close()
"""


@pytest.fixture(autouse=True)
def cut_off_network(monkeypatch: pytest.MonkeyPatch):
    for name in [name for name in os.environ if name.startswith(("MLFLOW_", "WANDB_"))]:
        monkeypatch.delenv(name)
    for name, value in {**CUT_OFF, "WANDB_MODE": "offline", "WANDB_SILENT": "true"}.items():
        monkeypatch.setenv(name, value)


def write(name: str, run: Path, stage: str, cursor: int, stop: int, shift: float = 0) -> None:
    """Write steps cursor+1..stop of a stage. Their values are exact in 32-bit floats."""
    group = TrackerGroup([name], run, "job", stage, cursor, SETTINGS, print)
    for step in range(cursor + 1, stop + 1):
        group.write(step, {"loss": step / 4 + shift, "replaced": step % 2})
    group.close()


def read_tensorboard(run: Path, stage: str) -> dict[str, list[tuple[int, float]]]:
    events = EventAccumulator(str(run / "tensorboard" / stage), size_guidance={"scalars": 0}).Reload()
    return {name: [(event.step, event.value) for event in events.Scalars(name)] for name in events.Tags()["scalars"]}


def read_mlflow(run: Path, stage: str) -> dict[str, list[tuple[int, float]]]:
    client, identity = open_mlflow(run), read_ids(run)["mlflow"]
    values_read = {}
    for key in client.get_run(identity).data.metrics:
        if key.startswith(f"{stage}/"):
            history = sorted(client.get_metric_history(identity, key), key=lambda metric: metric.timestamp)
            values_read[key.partition("/")[2]] = [(metric.step, metric.value) for metric in history]
    return values_read


def read_wandb(run: Path, stage: str) -> dict[str, list[tuple[int, float]]]:
    values_read: dict[str, list[tuple[int, float]]] = {}
    for file in sorted(run.glob(f"wandb/offline-run-*-{read_ids(run)['wandb']}*/*.wandb")):
        for record in read_wandb_records(file):
            item = record.get("history", {}).get("item", {})
            for key, value in item.items():
                if key.startswith(f"{stage}/") and key != f"{stage}/step":
                    values_read.setdefault(key.partition("/")[2], []).append((item[f"{stage}/step"], value))
    return values_read


READERS = {"tensorboard": read_tensorboard, "mlflow": read_mlflow, "wandb": read_wandb}


def open_mlflow(run: Path) -> MlflowClient:
    return MlflowClient(f"sqlite:///{run / 'mlflow.db'}")


def read_ids(run: Path) -> dict[str, str]:
    return json.loads((run / TRACKER_IDS_FILE).read_text())


def read_wandb_records(file: Path) -> Iterator[dict]:
    command = [sys.executable, "-m", "wandb", "leet", "inspect", "--json", str(file)]
    lines = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True).stdout.splitlines()
    return map(json.loads, lines)


def make_losses(start: int, stop: int, shift: float = 0) -> list[tuple[int, float]]:
    return [(step, step / 4 + shift) for step in range(start, stop + 1)]


def kill_after_writing(name: str, run: Path, cursor: int, stop: int, shift: int, expected: list) -> None:
    """Write in a separate process and SIGKILL it after its values can be read. W&B takes up to a second for that."""
    command = [sys.executable, "-c", WRITER, name, str(run), "tower", str(cursor), str(stop), str(shift)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as writer:
        assert writer.stdout
        assert writer.stdout.readline() == b"written\n"
        deadline = time.monotonic() + (30 if name == "wandb" else 0)
        while (values_read := READERS[name](run, "tower").get("loss")) != expected and time.monotonic() < deadline:
            pass
        writer.kill()
    assert values_read == expected


@pytest.mark.parametrize("name", TRACKERS)
def test_all_values_of_a_stage_can_be_read(tmp_path: Path, name: str):
    write(name, tmp_path, "tower", 0, 20)
    write(name, tmp_path, "instruct", 0, 7, shift=2)
    for stage, stop, shift in (("tower", 20, 0), ("instruct", 7, 2)):
        replaced = [(step, step % 2) for step in range(1, stop + 1)]
        assert READERS[name](tmp_path, stage) == {"loss": make_losses(1, stop, shift), "replaced": replaced}


@pytest.mark.parametrize("name", TRACKERS)
def test_killed_runs_resume_with_the_same_id(tmp_path: Path, name: str):
    kill_after_writing(name, tmp_path, 0, 5, 0, make_losses(1, 5))
    before = read_ids(tmp_path) if name != "tensorboard" else None
    # MLflow and W&B keep all values of a step; the latest one counts.
    kept = make_losses(1, 3) if name == "tensorboard" else make_losses(1, 5)
    kill_after_writing(name, tmp_path, 3, 7, 1, kept + make_losses(4, 7, 1))
    assert before is None or (read_ids(tmp_path) == before and list(before) == [name])


def test_scores_and_pictures_of_an_evaluation_can_be_read(tmp_path: Path):
    picture = Image.new("RGB", (20, 10), "teal")
    group = TrackerGroup(TRACKERS, tmp_path, "job", "evaluate", 0, SETTINGS, pytest.fail)
    group.write(1, {"easy_vqa.accuracy.yes/no": 0.5, "mine.accuracy.é: (a)": 0.25})
    group.write_picture(1, "mine/1", picture, "what? teal")
    group.close()
    for name, of_tracker in READERS.items():
        scores = {"easy_vqa.accuracy.yes/no": [(1, 0.5)], "mine.accuracy.é: (a)": [(1, 0.25)]}
        if name == "mlflow":
            scores = {re.sub("[:()]", "_", key): values for key, values in scores.items()}
        found = of_tracker(tmp_path, "evaluate")
        assert {key: found.get(key) for key in scores} == scores, name
    events = EventAccumulator(str(tmp_path / "tensorboard" / "evaluate")).Reload()
    [shown] = events.Images("mine/1")
    assert (shown.step, shown.width, shown.height) == (1, 20, 10)
    assert Image.open(io.BytesIO(shown.encoded_image_string)).getpixel((3, 3)) == (0, 128, 128)
    assert list(tmp_path.glob("wandb/offline-run-*/files/media/images/**/*.png"))


def test_tensorboard_has_each_step_once_after_many_restarts_in_a_second(tmp_path: Path):
    for shift in range(15):
        write("tensorboard", tmp_path, "tower", shift, shift + 4, shift)
    expected = [loss for shift in range(15) for loss in make_losses(shift + 1, shift + 1, shift)] + make_losses(
        16, 18, 14
    )
    assert read_tensorboard(tmp_path, "tower")["loss"] == expected


def test_tensorboard_has_each_step_once_when_the_next_machine_s_clock_is_behind(tmp_path: Path):
    write("tensorboard", tmp_path, "tower", 0, 6)
    (file,) = (tmp_path / "tensorboard" / "tower").iterdir()
    file.rename(file.with_name(f"events.out.tfevents.{int(time.time()) + 3600:010d}.zebra.1.0"))
    write("tensorboard", tmp_path, "tower", 2, 4, shift=3)
    assert read_tensorboard(tmp_path, "tower")["loss"] == make_losses(1, 2) + make_losses(3, 4, 3)


@pytest.mark.parametrize("missing_bytes", [1, 8, 20])
def test_tensorboard_continues_after_an_event_that_a_crash_truncated(tmp_path: Path, missing_bytes: int):
    write("tensorboard", tmp_path, "tower", 0, 6)
    (file,) = (tmp_path / "tensorboard" / "tower").iterdir()
    os.truncate(file, file.stat().st_size - missing_bytes)
    write("tensorboard", tmp_path, "tower", 4, 8, shift=3)
    assert read_tensorboard(tmp_path, "tower")["loss"] == make_losses(1, 4) + make_losses(5, 8, 3)


def test_mlflow_has_one_run_for_the_job_and_its_status(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("MLFLOW_EXPERIMENT_NAME", "towers")
    write("mlflow", tmp_path, "tower", 0, 1)
    group = TRACKERS["mlflow"](tmp_path, "job", "instruct", 0, SETTINGS)
    client, identity = open_mlflow(tmp_path), read_ids(tmp_path)["mlflow"]
    assert client.get_run(identity).info.status == "RUNNING"
    group.close()
    experiment = client.get_experiment_by_name("towers").experiment_id
    (run,) = client.search_runs([experiment])
    assert (run.info.run_id, run.info.run_name, run.info.status) == (identity, "job", "FINISHED")
    many = {f"many.{n}": str(n) for n in range(150)}
    assert run.data.params == {"name": "job", "train.tower.epochs": "2", "train.tower.data": "None", **many}


def test_two_jobs_share_an_experiment_of_the_store_that_the_environment_names(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path / 'mlflow.db'}")
    for run in (tmp_path / "one", tmp_path / "two"):
        run.mkdir()
        write("mlflow", run, "tower", 0, 1)
        assert not (run / "mlflow.db").exists()
    client = open_mlflow(tmp_path)
    runs = client.search_runs([client.get_experiment_by_name("redux").experiment_id])
    assert {run.info.run_id for run in runs} == {read_ids(tmp_path / name)["mlflow"] for name in ("one", "two")}


def test_wandb_has_the_job_and_plots_a_stage_over_the_steps_of_the_stage(tmp_path: Path):
    write("wandb", tmp_path, "tower", 0, 2)
    (file,) = tmp_path.glob("wandb/offline-run-*/*.wandb")
    records = list(read_wandb_records(file))
    (run,) = (record["run"] for record in records if record["type"] == "run")
    config = {name: value for name, value in run["config"]["update"].items() if name != "_wandb"}
    assert (run["run_id"], run["project"], run["display_name"], config) == (
        read_ids(tmp_path)["wandb"],
        "redux",
        "job",
        SETTINGS,
    )
    metrics = [record["metric"] for record in records if record["type"] == "metric"]
    assert [(metric.get("name"), metric.get("glob_name"), metric.get("step_metric")) for metric in metrics] == [
        ("tower/step", None, None),
        (None, "tower/*", "tower/step"),
    ]


def test_a_failing_tracker_is_reported_once_and_the_others_continue(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    group = TrackerGroup(["mlflow", "tensorboard"], tmp_path, "job", "tower", 0, SETTINGS, print)
    group.write(1, {"loss": 0.25})
    open_mlflow(tmp_path).delete_run(read_ids(tmp_path)["mlflow"])
    capsys.readouterr()
    for step in (2, 3):
        group.write(step, {"loss": step / 4})
    group.close()
    messages = [line for line in capsys.readouterr().out.splitlines() if line.startswith("trackers:")]
    assert len(messages) == 1
    assert messages[0].startswith("trackers: mlflow left out of tower, it failed at step 2: MlflowException: ")
    assert read_tensorboard(tmp_path, "tower")["loss"] == make_losses(1, 3)


def test_a_tracker_without_a_server_at_the_start_is_left_out(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", UNUSED_ADDRESS)
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    group = TrackerGroup(["mlflow", "tensorboard"], tmp_path, "job", "tower", 0, SETTINGS, print)
    group.write(1, {"loss": 0.25})
    group.close()
    assert "trackers: mlflow left out of tower, it failed at its start: " in capsys.readouterr().out
    assert read_tensorboard(tmp_path, "tower")["loss"] == make_losses(1, 1)
    # No ID is stored, so the next start creates a run.
    assert not (tmp_path / TRACKER_IDS_FILE).exists()


def test_ctrl_c_is_no_failure_of_a_tracker(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    class Interrupted:
        def write(self, step: int, values: Mapping[str, float]) -> None:
            raise KeyboardInterrupt

        def close(self) -> None:
            pass

    def make(*_: Any) -> Tracker:
        return Interrupted()

    monkeypatch.setitem(TRACKERS, "tensorboard", make)
    group = TrackerGroup(["tensorboard"], tmp_path, "job", "tower", 0, SETTINGS, print)
    with pytest.raises(KeyboardInterrupt):
        group.write(1, {"loss": 0})


def test_an_unknown_name_is_refused():
    with pytest.raises(ValueError, match=r"^trackers: got comet, allowed: tensorboard, mlflow, wandb$"):
        check_trackers(["tensorboard", "comet"])
    assert set(TRACKERS) == set(trackers.get_args(trackers.TrackerName))


def test_a_tracker_that_is_not_installed_is_refused_with_the_command_that_installs_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setitem(sys.modules, "mlflow", None)
    command = re.escape(write_install_command("mlflow"))
    message = f"^trackers: got mlflow, allowed: tensorboard, wandb, or mlflow: {command}$"
    with pytest.raises(ValueError, match=message):
        check_trackers(["mlflow"])
    with pytest.raises(ValueError, match=message):
        TrackerGroup(["tensorboard", "mlflow"], tmp_path, "job", "tower", 0, SETTINGS, print)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        ({}, "trackers: got wandb without a key: set WANDB_API_KEY, or WANDB_MODE=offline to send it later"),
        ({"WANDB_API_KEY": "short"}, "trackers: got wandb with invalid credentials: WANDB_API_KEY invalid"),
        ({"WANDB_API_KEY": "0" * 40}, "fine"),
        ({"WANDB_MODE": "offline"}, "fine"),
    ],
    ids=["neither", "bad key", "key", "offline"],
)
def test_wandb_without_a_key_is_refused_without_a_prompt_at_a_terminal(
    tmp_path: Path, environment: dict[str, str], message: str
):
    program = """
from pipelines.training.trackers import check_trackers
try:
    check_trackers(["wandb"])
    print("fine")
except ValueError as error:
    print(error)
"""
    terminal, terminal_of_process = pty.openpty()
    clean = {name: value for name, value in os.environ.items() if not name.startswith("WANDB_")}
    try:
        ended = subprocess.run(
            [sys.executable, "-c", program],
            env=clean | {"HOME": str(tmp_path), "TERM": "xterm", **CUT_OFF, **environment},
            stdin=terminal_of_process,
            stdout=subprocess.PIPE,
            stderr=terminal_of_process,
            text=True,
            timeout=60,
        )
    finally:
        os.close(terminal)
        os.close(terminal_of_process)
    assert ended.stdout.splitlines()[-1].startswith(message)


def test_no_tracker_loads_torch(tmp_path: Path):
    """The recorder process is small; torch alone would cost it seconds and hundreds of megabytes."""
    program = f"""
import sys
from pathlib import Path
from pipelines.training.trackers import TRACKERS, TrackerGroup
group = TrackerGroup(TRACKERS, Path({str(tmp_path)!r}), "job", "tower", 0, {{}}, print)
group.write(1, {{"loss": 1}})
assert set(group.open) == set(TRACKERS)
group.close()
sys.exit("torch" in sys.modules)
"""
    assert subprocess.run([sys.executable, "-c", program]).returncode == 0
