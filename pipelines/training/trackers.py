"""Where the numbers of a run are shown while it trains: TensorBoard, MLflow, Weights & Biases.

The record of a run is metrics.jsonl; a tracker is a view of it, so what fails in one is said and left out, and training
goes on.  A run that starts again, in a new process on another machine, goes on under the ids in trackers.json.

    tensorboard  run/tensorboard/STAGE; each step once: readers drop what lies past the cursor when a file begins
    mlflow       one run a job, metrics STAGE/name, at MLFLOW_TRACKING_URI or else in run/mlflow.db, in the experiment
                 MLFLOW_EXPERIMENT_NAME or "redux".  MLflow takes nothing back: a step done again has two values, and
                 the later timestamp is the one that counts.  SQLite, since MLflow's file store is closed by default;
                 it wants a disk of the machine, so on a shared file system name a server
    wandb        one run a job, charts over STAGE/step, in the project WANDB_PROJECT or "redux", its files in run/wandb.
                 History only grows here too.  WANDB_MODE=offline needs no key, and `wandb sync run/wandb/offline-*`
                 sends later what each start left, under the one id.  A killed process loses its last second

Costs of a step with ten values: TensorBoard 0.03 ms, W&B 0.4 ms (it sends from a process of its own), MLflow on SQLite
6 ms; of a start: W&B 1 s, or 2 minutes when it is away; MLflow 3 s.  A server of MLflow is waited for, and asked for
minutes when it is away: MLFLOW_HTTP_REQUEST_MAX_RETRIES and MLFLOW_HTTP_REQUEST_TIMEOUT bound that.

TensorBoard's own writer is not used: it names files by the second, host and process, and readers take them in the order
of names, which after a restart need not be the order of writing; and it keeps steps for two minutes that a kill loses.
"""

import json
import os
import socket
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal, Protocol, get_args
from uuid import uuid4

from tensorboard.compat.proto.event_pb2 import Event, SessionLog
from tensorboard.compat.proto.summary_pb2 import Summary
from tensorboard.summary.writer.record_writer import RecordWriter

from pipelines.core import storage
from redux.extras import write_install_command

Name = Literal["tensorboard", "mlflow", "wandb"]
FILE = "trackers.json"
PROJECT = "redux"
BATCH = 100
"""Parameters that MLflow takes at once."""
FINISH_S = 300
"""Seconds that the end of a stage waits for W&B's last numbers to be sent; `wandb sync` sends what is left."""


class Tracker(Protocol):
    """Made as TRACKERS[name](run, job_name, stage, cursor, settings), by one process of a run at a time.

    run: the run folder.  stage: whose steps follow, counted from 1.  cursor: steps up to this one are there already,
    those after it are written again.  settings: the resolved job, shown beside the numbers.
    """

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Show one step."""

    def close(self) -> None:
        """The stage has ended; another one may follow in the same run."""


class TensorBoard:
    """Events of one stage; a step is with the operating system when `write` returns."""

    def __init__(self, run: Path, job_name: str, stage: str, cursor: int, settings: Mapping[str, Any]) -> None:
        folder = run / "tensorboard" / stage
        folder.mkdir(parents=True, exist_ok=True)
        # a clock that is behind, or a restart within the second, must not put this file before an earlier one
        numbers = [int(path.name.split(".")[3]) + 1 for path in folder.glob("events.out.tfevents.*")]
        number = max(int(time.time()), *numbers, 0)
        name = f"events.out.tfevents.{number:010d}.{socket.gethostname()}.{os.getpid()}"
        self.file = RecordWriter((folder / name).open("xb"))
        self._add(file_version="brain.Event:2")
        self._add(step=cursor + 1, session_log=SessionLog(status=SessionLog.START))

    def write(self, step: int, values: Mapping[str, float]) -> None:
        scalars = [Summary.Value(tag=name, simple_value=value) for name, value in values.items()]
        self._add(step=step, summary=Summary(value=scalars))

    def close(self) -> None:
        self.file.close()

    def _add(self, **content: Any) -> None:
        self.file.write(Event(wall_time=time.time(), **content).SerializeToString())
        self.file.flush()


class MLflow:
    """The job's run in MLflow, through a client of its own: no run is active, and nothing global is set."""

    def __init__(self, run: Path, job_name: str, stage: str, cursor: int, settings: Mapping[str, Any]) -> None:
        from mlflow import MlflowClient

        self.stage = stage
        self.client = MlflowClient(os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{run.resolve() / 'mlflow.db'}")
        self.id = _ids(run).get("mlflow")
        if self.id is None:
            self.id = self._start(job_name, settings)
            # last, so that a run which is gone on with has all parameters
            _remember(run, "mlflow", self.id)
        self.client.update_run(self.id, status="RUNNING")

    def write(self, step: int, values: Mapping[str, float]) -> None:
        from mlflow.entities import Metric

        now = time.time_ns() // 1_000_000
        metrics = [Metric(f"{self.stage}/{name}", value, now, step) for name, value in values.items()]
        self.client.log_batch(self.id, metrics=metrics)

    def close(self) -> None:
        self.client.set_terminated(self.id)

    def _start(self, job_name: str, settings: Mapping[str, Any]) -> str:
        from mlflow.entities import Param

        identity = self.client.create_run(self._experiment(), run_name=job_name).info.run_id
        params = [Param(name, str(value)) for name, value in _flat(settings)]
        for start in range(0, len(params), BATCH):
            self.client.log_batch(identity, params=params[start : start + BATCH])
        return identity

    def _experiment(self) -> str:
        from mlflow.exceptions import MlflowException

        name = os.environ.get("MLFLOW_EXPERIMENT_NAME") or PROJECT
        try:
            return self.client.create_experiment(name)
        except MlflowException:  # asked afterwards, since another job may make it in between
            if (found := self.client.get_experiment_by_name(name)) is None:
                raise
            return found.experiment_id


class WandB:
    """The job's run in Weights & Biases.  Steps are values here: W&B's own only grow, over restarts and stages."""

    def __init__(self, run: Path, job_name: str, stage: str, cursor: int, settings: Mapping[str, Any]) -> None:
        import wandb

        self.stage = stage
        identity = _ids(run).get("wandb")
        if identity is None:
            identity = uuid4().hex
            _remember(run, "wandb", identity)
        self.run = wandb.init(
            id=identity,
            resume="allow",
            reinit="finish_previous",
            project=os.environ.get("WANDB_PROJECT") or PROJECT,
            name=job_name,
            dir=run,
            config=dict(settings),
            settings=wandb.Settings(
                console="off",
                finish_timeout=FINISH_S,
                # of the machine that writes, which need not be one that trains
                x_disable_stats=True,
                x_transaction_log_flush_interval=1,
            ),
        )
        self.run.define_metric(f"{stage}/step", hidden=True)
        self.run.define_metric(f"{stage}/*", step_metric=f"{stage}/step")

    def write(self, step: int, values: Mapping[str, float]) -> None:
        named = {f"{self.stage}/{name}": value for name, value in values.items()}
        self.run.log({f"{self.stage}/step": step, **named})

    def close(self) -> None:
        self.run.finish()


TRACKERS: dict[str, Callable[[Path, str, str, int, Mapping[str, Any]], Tracker]] = {
    "tensorboard": TensorBoard,
    "mlflow": MLflow,
    "wandb": WandB,
}


class Trackers:
    """Several trackers as one that never fails: the first error of each is said and ends it for this stage.

    Raises ValueError as `require` does.
    """

    def __init__(
        self,
        names: Iterable[str],
        run: Path,
        job_name: str,
        stage: str,
        cursor: int,
        settings: Mapping[str, Any],
        say: Callable[[str], None],
    ) -> None:
        names = list(names)
        require(names)
        self.stage, self.say = stage, say
        self.open: dict[str, Tracker] = {}
        for name in names:
            try:
                self.open[name] = TRACKERS[name](run, job_name, stage, cursor, settings)
            except Exception as error:
                self._leave(name, "at its start", error)

    def write(self, step: int, values: Mapping[str, float]) -> None:
        for name, tracker in list(self.open.items()):
            try:
                tracker.write(step, values)
            except Exception as error:
                self._leave(name, f"at step {step}", error)

    def close(self) -> None:
        for name, tracker in list(self.open.items()):
            try:
                tracker.close()
            except Exception as error:
                self._leave(name, "at its end", error)
        self.open.clear()

    def _leave(self, name: str, when: str, error: Exception) -> None:
        self.open.pop(name, None)
        told = " ".join(f"{type(error).__name__}: {error}".split())
        self.say(f"trackers: {name} left out of {self.stage}, it failed {when}: {told}")


def require(names: Iterable[str]) -> None:
    """Raise ValueError, in one line, unless this machine has the trackers' packages and W&B has a key or is offline."""
    allowed = get_args(Name)
    for name in names:
        if name not in allowed:
            raise ValueError(f"trackers: got {name}, allowed: {', '.join(allowed)}")
        if not _installed(name):
            there = ", ".join(filter(_installed, allowed))
            raise ValueError(f"trackers: got {name}, allowed: {there}, or {name}: {write_install_command(name)}")
        if name == "wandb":
            _require_key()


def _installed(name: str) -> bool:
    spec = find_spec(name)
    # a folder `wandb` where the job was started is a package too, of no origin
    return spec is not None and spec.origin is not None


def _require_key() -> None:
    """W&B asks at a terminal, and a batch job has nobody to answer; nor is it meant to be offline and nobody knows."""
    import wandb

    try:
        # not verified: on day three W&B may be away, and the run must start all the same
        if wandb.setup().settings.mode in ("offline", "dryrun", "disabled") or wandb.login(verify=False, prompt=False):
            return
    except wandb.Error as error:
        raise ValueError(f"trackers: got wandb, whose credentials are no good: {error}") from error
    raise ValueError("trackers: got wandb without a key: set WANDB_API_KEY, or WANDB_MODE=offline to send it later")


def _ids(run: Path) -> dict[str, str]:
    """The runs' ids by tracker."""
    path = run / FILE
    return json.loads(path.read_text()) if path.exists() else {}


def _remember(run: Path, name: str, identity: str) -> None:
    storage.write(str(run / FILE), json.dumps({**_ids(run), name: identity}).encode())


def _flat(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Leaves by dotted name."""
    for name, value in tree.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value
