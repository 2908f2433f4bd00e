"""A search by Ray Tune: several trials at a time, each a driver of its own that trains and evaluates like any run.

Tune starts the drivers and hears of them; one that lags behind asks, is told so, and ends itself.  What they are given,
and what becomes of it, is the study's to say (pipelines/search/trials.py).  Nothing is restored by Tune: another start
asks the study for what is left, and a trial goes on from what its run folder holds.

    drivers    on the machine of the search, where the run folders are; they ask Ray for no CPU
    training   anywhere in the cluster, with the resources that the job gives its workers
"""

import json
import logging
import os
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import Future, wait
from pathlib import Path
from typing import Any

import ray
from optuna.trial import TrialState
from ray import tune
from ray.tune.experiment import Trial as Tuned
from ray.tune.schedulers import FIFOScheduler
from ray.tune.search import Searcher
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy
from tqdm import tqdm

from pipelines.core import failures, interrupts
from pipelines.search.trials import Prune, Trials, Try
from pipelines.training import metrics
from pipelines.training.driver import StopCallback, StoppedError, remove_placement_group, run_in_background
from pipelines.training.stage import Recovery

FOLDER = "trials"


Work = Callable[[Try, Path, StopCallback], dict[str, float]]
"""Runs a trial in a run folder, from where it was, with somebody to tell how it trains; returns its metrics."""

After = Callable[[Trials], None]


def search(
    trials: Trials, folder: Path, work: Work, after: After, stage: str | None = None, grace_s: float = Recovery.grace_s
) -> None:
    """Run what is left of the trials. A signal that stops the command stops those under way, which wait in the study.

    Args:
        folder: the search's; trial n has folder/trials/n.
        work: is sent to the processes of the trials.
        after: is called here whenever trials have ended.
        stage: whose loss tells how a trial trains; None is any.
        grace_s: for trials that train to make a checkpoint when they are stopped.

    Raises:
        ValueError: one trial after another fails.
    """
    settings = trials.settings
    every = (settings.prune or Prune()).every

    pinned = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    verdicts = ray.remote(num_cpus=0, scheduling_strategy=pinned)(Verdicts).remote()
    place, named = os.getcwd(), {name: value for name, value in os.environ.items() if name == "RAY_ADDRESS"}

    def drive(config: dict[str, Any]) -> None:
        os.chdir(place)  # out of the folder that Tune gives it: paths in a job are from here
        os.environ.update(named)
        trial = Try(number=config["number"], values=json.loads(config["values"]))
        try:
            found = work(trial, folder / FOLDER / f"{trial.number:04}", Reporter(every, trial.number, verdicts, stage))
        except StoppedError:
            return
        finally:
            ray.get(verdicts.leave.remote(trial.number))
        tune.report({"found": found})

    for name in ("ray.tune", "ray.tune.execution.tune_controller", "ray.tune.tune"):
        logging.getLogger(name).setLevel(logging.CRITICAL)  # what went wrong is in the study
    here = f"node:{ray.util.get_node_ip_address()}"
    # Tune wants a folder, of which nothing is needed later
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as scratch, _bar(trials) as bar:
        tuner = tune.Tuner(
            tune.with_resources(drive, {"CPU": 0, here: 0.001}),
            tune_config=tune.TuneConfig(
                search_alg=Asking(trials),
                scheduler=Hearing(trials, folder, verdicts),
                num_samples=-1,
                trial_dirname_creator=lambda trial: trial.trial_id,
            ),
            run_config=tune.RunConfig(name="search", storage_path=scratch, verbose=0),
        )
        future = run_in_background(tuner.fit)
        try:
            while not wait([future], timeout=0.5).done:
                interrupts.raise_if_interrupted()
                _show(trials, bar, after)
            future.result()
        except KeyboardInterrupt:
            trials.close()
            _stop(verdicts, future, bar, grace_s)
            raise
        finally:
            trials.close()
    after(trials)
    if trials.hopeless:
        raise ValueError(trials.hopeless)


def _stop(verdicts: Any, future: Future[Any], bar: tqdm, grace_s: float) -> None:
    """Have the trials that train make a checkpoint; the others have nothing to lose."""
    end = time.monotonic() + grace_s
    left = ray.get(verdicts.stop_all.remote())
    if left:
        bar.write("search: trials stop after a checkpoint; a second signal stops at once")
    while left and time.monotonic() < end and not wait([future], timeout=0.2).done:
        left = ray.get(verdicts.count_training.remote())


class Asking(Searcher):
    """Tune's questions, for the study to answer."""

    def __init__(self, trials: Trials) -> None:
        super().__init__()
        self.trials = trials

    def suggest(self, trial_id: str) -> dict[str, Any] | str | None:
        trial = self.trials.next(trial_id)
        if trial is None:
            return Searcher.FINISHED if self.trials.finished else None
        return {"number": trial.number, "values": json.dumps(trial.values)}

    def on_trial_complete(self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False) -> None:
        if not error:  # of which Hearing was told more
            found = {name.removeprefix("found/"): value for name, value in (result or {}).items() if "found/" in name}
            self.trials.end(trial_id, found)

    def save(self, checkpoint_path: str) -> None:
        """Nothing: the study is in its storage."""

    def restore(self, checkpoint_path: str) -> None:
        """Nothing."""


class Verdicts:
    """An actor that trials ask whether they are to stop.

    Tune would stop a trial by ending its process, and with it, in the middle of whatever they do, all that it started.
    """

    def __init__(self) -> None:
        self.lagging, self.training = set[int](), set[int]()
        self.over = False

    def stop(self, number: int) -> None:
        """The trial lags behind."""
        self.lagging.add(number)

    def stop_all(self) -> int:
        """The search is stopped; returns how many trials train."""
        self.over = True
        return len(self.training)

    def count_training(self) -> int:
        """How many trials train."""
        return len(self.training)

    def lags(self, number: int, training: bool) -> bool:
        """Whether the trial is to stop; training: whether a stage of it is under way."""
        (self.training.add if training else self.training.discard)(number)
        return self.over or number in self.lagging

    def leave(self, number: int) -> None:
        """The trial's driver ends."""
        self.training.discard(number)


class Hearing(FIFOScheduler):
    """Tells the study how trials get on."""

    def __init__(self, trials: Trials, folder: Path, verdicts: Any) -> None:
        super().__init__()
        self.trials, self.folder, self.verdicts = trials, folder, verdicts

    def on_trial_result(self, tune_controller: Any, trial: Tuned, result: dict[str, Any]) -> str:
        if "loss" in result and self.trials.report(trial.trial_id, result["step"], result["steps"], result["loss"]):
            ray.get(self.verdicts.stop.remote(trial.config["number"]))
        return self.CONTINUE

    def on_trial_error(self, tune_controller: Any, trial: Tuned) -> None:
        remove_placement_group(self.folder / FOLDER / f"{trial.config['number']:04}")
        with open(trial.pickled_error_file, "rb") as file:  # which get_pickled_error seeks where it is not copied yet
            error = ray.cloudpickle.load(file)
        self.trials.end(trial.trial_id, {}, failures.classify_error(error).text)


class Reporter:
    """In a trial's driver: sends Tune the mean loss of each `every` steps of a stage, as the run folder has them."""

    def __init__(self, every: int, number: int, verdicts: Any, stage: str | None = None) -> None:
        self.every, self.number, self.verdicts, self.stage = every, number, verdicts, stage
        self.reported = 0

    def __call__(self, run: Path, stage: str, step: int, steps: int) -> bool:
        if self.stage in (None, stage):
            self._report(run, stage, step, steps)
        return bool(ray.get(self.verdicts.lags.remote(self.number, step < steps)))

    def _report(self, run: Path, stage: str, step: int, steps: int) -> None:
        if self.reported + self.every > step:
            return
        losses = metrics.read_losses(run, stage)
        while self.reported + self.every <= step:
            window = range(self.reported + 1, self.reported + self.every + 1)
            if not all(each in losses for each in window):
                break  # the record is being cut back to a checkpoint; it will be asked again
            finite = [loss for each in window if (loss := losses[each]) is not None]
            self.reported += self.every
            mean = sum(finite) / len(finite) if finite else sys.float_info.max
            tune.report({"step": self.reported, "steps": steps, "loss": mean})  # returns when it was heard


def _bar(trials: Trials) -> tqdm:
    return tqdm(desc="search", total=trials.settings.num_trials, initial=len(trials.ended), unit="trial")


def _show(trials: Trials, bar: tqdm, after: After) -> None:
    """The bar, and what the caller does about a trial that has ended since."""
    ended = trials.ended
    if len(ended) == bar.n:
        return
    bar.n = len(ended)
    states = [tries[-1].state for tries in ended]
    said = {"stopped early": states.count(TrialState.PRUNED), "failed": states.count(TrialState.FAIL)}
    bar.set_postfix_str(", ".join(f"{count} {what}" for what, count in said.items() if count))
    after(trials)
