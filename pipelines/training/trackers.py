"""Experiment trackers of a run: TensorBoard, MLflow, Weights & Biases.

The record of a run is metrics.jsonl, and a tracker is a view of it. If a tracker fails, the run reports the error,
leaves the tracker out and continues. A run that resumes, in a new process or on another machine, continues under the
IDs in trackers.json.

    tensorboard  run/tensorboard/STAGE. Each step has one value: a new file makes readers drop steps after its cursor
    mlflow       one run per job, metrics STAGE/name, at MLFLOW_TRACKING_URI or in run/mlflow.db, in the experiment
                 MLFLOW_EXPERIMENT_NAME or "redux". MLflow cannot delete values: a repeated step has two, and the one
                 with the later timestamp counts. SQLite, because MLflow's file store is disabled by default. SQLite
                 needs a local disk; on a shared file system, use a server
    wandb        one run per job, charts over STAGE/step, in the project WANDB_PROJECT or "redux", files in run/wandb.
                 W&B cannot delete values, either. WANDB_MODE=offline needs no key; `wandb sync run/wandb/offline-*`
                 later sends the values of every start under the one ID. A killed process loses its last second

Cost of a step with ten values: TensorBoard 0.03 ms, W&B 0.4 ms (it sends from its own process), MLflow on SQLite 6 ms.
Cost of a start: W&B 1 s, or 2 minutes if its server does not answer; MLflow 3 s. MLflow retries for minutes if its
server does not answer; MLFLOW_HTTP_REQUEST_MAX_RETRIES and MLFLOW_HTTP_REQUEST_TIMEOUT limit this.

The writer of the package tensorboard is not used, for two reasons. It names files by second, host and process, and
readers sort them by name, which after a restart may differ from the order of writing. It also keeps steps in memory for
two minutes, and a kill loses them.
"""

import io
import json
import os
import re
import socket
import time
from collections.abc import Callable, Iterable, Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal, Protocol, get_args
from uuid import uuid4

import PIL.Image
from tensorboard.compat.proto.event_pb2 import Event, SessionLog
from tensorboard.compat.proto.summary_pb2 import Summary, SummaryMetadata
from tensorboard.summary.writer.record_writer import RecordWriter

from pipelines.core import storage
from pipelines.core.settings import flatten_dict
from redux.extras import write_install_command

TrackerName = Literal["tensorboard", "mlflow", "wandb"]
TRACKER_IDS_FILE = "trackers.json"
DEFAULT_PROJECT = "redux"
MLFLOW_BATCH_SIZE = 100
"""Parameters that MLflow accepts in one call."""
WANDB_FINISH_S = 300
"""Seconds that the end of a stage waits for W&B to send its last values. `wandb sync` sends the rest."""


class Tracker(Protocol):
    """Interface of a tracker, created by TRACKERS[name](run, job_name, stage, cursor, settings).

    One process of a run at a time writes to a tracker.

    Args:
        run: run folder.
        job_name: name of the job.
        stage: name of the stage. Its steps count from 1.
        cursor: last step that the tracker already has. Later steps are written again.
        settings: the resolved job, shown with the values.
    """

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Write one step."""

    def write_picture(self, step: int, name: str, image: PIL.Image.Image, caption: str) -> None:
        """Write a picture of one step."""

    def close(self) -> None:
        """End the stage. Another one may follow in the same run."""


class TensorBoardTracker:
    """Event file of one stage. Each `write` hands its step to the operating system, so a killed process loses none."""

    def __init__(self, run: Path, job_name: str, stage: str, cursor: int, settings: Mapping[str, Any]) -> None:
        folder = run / "tensorboard" / stage
        folder.mkdir(parents=True, exist_ok=True)
        # Readers sort files by name. A clock that is behind, or a restart within a second, must not change the order.
        numbers = [int(path.name.split(".")[3]) + 1 for path in folder.glob("events.out.tfevents.*")]
        number = max(int(time.time()), *numbers, 0)
        name = f"events.out.tfevents.{number:010d}.{socket.gethostname()}.{os.getpid()}"
        self.file = RecordWriter((folder / name).open("xb"))
        self._add(file_version="brain.Event:2")
        # START makes readers drop steps of earlier files from this step on.
        self._add(step=cursor + 1, session_log=SessionLog(status=SessionLog.START))

    def write(self, step: int, values: Mapping[str, float]) -> None:
        scalars = [Summary.Value(tag=name, simple_value=value) for name, value in values.items()]
        self._add(step=step, summary=Summary(value=scalars))

    def write_picture(self, step: int, name: str, image: PIL.Image.Image, caption: str) -> None:
        picture = Summary.Image(
            height=image.height, width=image.width, colorspace=3, encoded_image_string=_encode_png(image)
        )
        metadata = SummaryMetadata(summary_description=caption)
        self._add(step=step, summary=Summary(value=[Summary.Value(tag=name, image=picture, metadata=metadata)]))

    def close(self) -> None:
        self.file.close()

    def _add(self, **content: Any) -> None:
        self.file.write(Event(wall_time=time.time(), **content).SerializeToString())
        self.file.flush()


class MLflowTracker:
    """MLflow run of the job. It uses its own client, so it changes no global state and no active run of MLflow."""

    def __init__(self, run: Path, job_name: str, stage: str, cursor: int, settings: Mapping[str, Any]) -> None:
        from mlflow import MlflowClient

        self.stage = stage
        self.client = MlflowClient(os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{run.resolve() / 'mlflow.db'}")
        self.id = _read_ids(run).get("mlflow")
        if self.id is None:
            self.id = self._create_run(job_name, settings)
            # Written last, so that a run that is resumed has all parameters.
            _write_id(run, "mlflow", self.id)
        self.client.update_run(self.id, status="RUNNING")

    def write(self, step: int, values: Mapping[str, float]) -> None:
        from mlflow.entities import Metric

        now = time.time_ns() // 1_000_000
        metrics = [Metric(_clean_name(f"{self.stage}/{name}"), value, now, step) for name, value in values.items()]
        self.client.log_batch(self.id, metrics=metrics)

    def write_picture(self, step: int, name: str, image: PIL.Image.Image, caption: str) -> None:
        """MLflow's artifacts have no captions, and its local store would put them into the working folder: no picture
        is written without a server."""
        if os.environ.get("MLFLOW_TRACKING_URI"):
            self.client.log_image(self.id, image, artifact_file=f"{_clean_name(f'{self.stage}/{name}')}.png")

    def close(self) -> None:
        self.client.set_terminated(self.id)

    def _create_run(self, job_name: str, settings: Mapping[str, Any]) -> str:
        from mlflow.entities import Param

        run_id = self.client.create_run(self._find_experiment(), run_name=job_name).info.run_id
        params = [Param(name, str(value)) for name, value in flatten_dict(settings).items()]
        for start in range(0, len(params), MLFLOW_BATCH_SIZE):
            self.client.log_batch(run_id, params=params[start : start + MLFLOW_BATCH_SIZE])
        return run_id

    def _find_experiment(self) -> str:
        """Create the experiment, or return the ID of the existing one."""
        from mlflow.exceptions import MlflowException

        name = os.environ.get("MLFLOW_EXPERIMENT_NAME") or DEFAULT_PROJECT
        try:
            return self.client.create_experiment(name)
        except MlflowException:
            # Look it up only now: another job may create it between a look-up and the call above.
            experiment = self.client.get_experiment_by_name(name)
            if experiment is None:
                raise
            return experiment.experiment_id


class WandBTracker:
    """Weights & Biases run of the job. Steps are logged as values, because W&B's own step can only increase."""

    def __init__(self, run: Path, job_name: str, stage: str, cursor: int, settings: Mapping[str, Any]) -> None:
        import wandb

        self.stage = stage
        run_id = _read_ids(run).get("wandb")
        if run_id is None:
            run_id = uuid4().hex
            _write_id(run, "wandb", run_id)
        self.run = wandb.init(
            id=run_id,
            resume="allow",
            reinit="finish_previous",
            project=os.environ.get("WANDB_PROJECT") or DEFAULT_PROJECT,
            name=job_name,
            dir=run,
            config=dict(settings),
            settings=wandb.Settings(
                console="off",
                finish_timeout=WANDB_FINISH_S,
                # System metrics would be those of the recorder's machine, not of the machines that train.
                x_disable_stats=True,
                x_transaction_log_flush_interval=1,
            ),
        )
        # Charts of the stage use its own step as x axis.
        self.run.define_metric(f"{stage}/step", hidden=True)
        self.run.define_metric(f"{stage}/*", step_metric=f"{stage}/step")

    def write(self, step: int, values: Mapping[str, float]) -> None:
        named = {f"{self.stage}/{name}": value for name, value in values.items()}
        self.run.log({f"{self.stage}/step": step, **named})

    def write_picture(self, step: int, name: str, image: PIL.Image.Image, caption: str) -> None:
        import wandb

        picture = wandb.Image(image, caption=caption)
        self.run.log({f"{self.stage}/step": step, f"{self.stage}/{name}": picture})

    def close(self) -> None:
        self.run.finish()


TRACKERS: dict[str, Callable[[Path, str, str, int, Mapping[str, Any]], Tracker]] = {
    "tensorboard": TensorBoardTracker,
    "mlflow": MLflowTracker,
    "wandb": WandBTracker,
}


class TrackerGroup:
    """Group of trackers that never fails. The first error of a tracker is reported and ends it for this stage.

    Args:
        names: names of the trackers.
        run: run folder.
        job_name: name of the job.
        stage: name of the stage.
        cursor: last step that the trackers already have.
        settings: the resolved job.
        report: called with each error message.

    Raises:
        ValueError: see `check_trackers`.
    """

    def __init__(
        self,
        names: Iterable[str],
        run: Path,
        job_name: str,
        stage: str,
        cursor: int,
        settings: Mapping[str, Any],
        report: Callable[[str], None],
    ) -> None:
        # An unknown or unusable tracker is an error; a tracker that fails later is dropped.
        names = list(names)
        check_trackers(names)
        self.stage = stage
        self.report = report
        self.open: dict[str, Tracker] = {}
        for name in names:
            try:
                self.open[name] = TRACKERS[name](run, job_name, stage, cursor, settings)
            except Exception as error:
                self._drop(name, "at its start", error)

    def write(self, step: int, values: Mapping[str, float]) -> None:
        for name, tracker in list(self.open.items()):
            try:
                tracker.write(step, values)
            except Exception as error:
                self._drop(name, f"at step {step}", error)

    def write_picture(self, step: int, name: str, image: PIL.Image.Image, caption: str) -> None:
        for tracker_name, tracker in list(self.open.items()):
            try:
                tracker.write_picture(step, name, image, caption)
            except Exception as error:
                self._drop(tracker_name, f"at the picture {name}", error)

    def close(self) -> None:
        for name, tracker in list(self.open.items()):
            try:
                tracker.close()
            except Exception as error:
                self._drop(name, "at its end", error)
        self.open.clear()

    def _drop(self, name: str, when: str, error: Exception) -> None:
        self.open.pop(name, None)
        message = " ".join(f"{type(error).__name__}: {error}".split())
        self.report(f"trackers: {name} left out of {self.stage}, it failed {when}: {message}")


def _encode_png(image: PIL.Image.Image) -> bytes:
    file = io.BytesIO()
    image.save(file, "PNG")
    return file.getvalue()


def _clean_name(name: str) -> str:
    """Replace the characters that MLflow does not allow in a name."""
    return re.sub(r"[^\w./ -]", "_", name)


def check_trackers(names: Iterable[str]) -> None:
    """Check that the trackers can be used on this machine.

    Raises:
        ValueError: a name is unknown, a package is not installed, or W&B has no valid key and is not offline.
    """
    allowed = get_args(TrackerName)
    for name in names:
        if name not in allowed:
            raise ValueError(f"trackers: got {name}, allowed: {', '.join(allowed)}")
        if not _is_installed(name):
            installed = ", ".join(filter(_is_installed, allowed))
            raise ValueError(f"trackers: got {name}, allowed: {installed}, or {name}: {write_install_command(name)}")
        if name == "wandb":
            _check_wandb_key()


def _is_installed(name: str) -> bool:
    spec = find_spec(name)
    # A folder `wandb` in the working directory is a namespace package, which has no origin.
    return spec is not None and spec.origin is not None


def _check_wandb_key() -> None:
    """Check that W&B has a key or is offline. Otherwise it would prompt for a key, and a batch job has no terminal."""
    import wandb

    try:
        # The key is not verified at the server: the run must start even if W&B does not answer.
        if wandb.setup().settings.mode in ("offline", "dryrun", "disabled") or wandb.login(verify=False, prompt=False):
            return
    except wandb.Error as error:
        raise ValueError(f"trackers: got wandb with invalid credentials: {error}") from error
    raise ValueError("trackers: got wandb without a key: set WANDB_API_KEY, or WANDB_MODE=offline to send it later")


def _read_ids(run: Path) -> dict[str, str]:
    """Read the run IDs by tracker."""
    path = run / TRACKER_IDS_FILE
    return json.loads(path.read_text()) if path.exists() else {}


def _write_id(run: Path, name: str, run_id: str) -> None:
    storage.write(str(run / TRACKER_IDS_FILE), json.dumps({**_read_ids(run), name: run_id}).encode())
