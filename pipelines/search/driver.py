"""Search with Ray Tune: several trials at a time, each in a process that trains and evaluates like any run.

Tune starts the trials and receives their losses. A trial asks an actor if it is to stop, and ends by itself. The study
decides the values of a trial and its result (pipelines/search/trials.py). Tune restores nothing: a restarted search
gets its remaining trials from the study, and a trial continues from its run folder.

    trial drivers   on the node of the search, which has the run folders; they need no CPU of Ray
    training        anywhere in the cluster, with the resources of the job
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
from ray.tune.experiment import Trial as TuneTrial
from ray.tune.schedulers import FIFOScheduler
from ray.tune.search import Searcher
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy
from tqdm import tqdm

from pipelines.core import failures, interrupts
from pipelines.core.background import run_in_background
from pipelines.search.trials import Prune, Trials, TrialSpec
from pipelines.training import metrics
from pipelines.training.driver import StopCallback, StoppedError, remove_placement_group
from pipelines.training.stage import Recovery

TRIALS_FOLDER = "trials"


RunTrial = Callable[[TrialSpec, Path, StopCallback], dict[str, float]]
"""Function that runs or continues a trial in a run folder, with a callback for its progress; returns its metrics."""

OnTrialsEnded = Callable[[Trials], None]
"""Function that is called after trials have ended."""


def run_trials(
    trials: Trials,
    folder: Path,
    run_trial: RunTrial,
    on_trials_ended: OnTrialsEnded,
    stage: str | None = None,
    grace_s: float = Recovery.grace_s,
) -> None:
    """Run the remaining trials. A signal stops the running trials, which then wait in the study.

    Args:
        trials: the trials.
        folder: folder of the search; trial n runs in folder/trials/n.
        run_trial: runs a trial; it is pickled and sent to the processes of the trials.
        on_trials_ended: called in this process after trials have ended.
        stage: stage whose loss is reported; None reports the losses of all stages.
        grace_s: seconds for training trials to write a checkpoint when the search is stopped.

    Raises:
        ValueError: the first trials fail one after another.
    """
    # The actor is pinned to this node: it ends with the search, not with another node.
    pinned = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    stop_flags = ray.remote(num_cpus=0, scheduling_strategy=pinned)(StopFlags).remote()
    every = (trials.settings.prune or Prune()).every
    trainable = _build_trainable(folder, run_trial, lambda number: LossReporter(every, number, stop_flags, stage))
    # Tune needs a storage folder, but the study has all results.
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as temporary, _make_bar(trials) as bar:
        tuner = _build_tuner(trainable, trials, StudyScheduler(trials, folder, stop_flags), temporary)
        # Tune runs in a thread, so that this one can handle signals.
        future = run_in_background(tuner.fit)
        try:
            while not wait([future], timeout=0.5).done:
                interrupts.raise_if_interrupted()
                _update_bar(trials, bar, on_trials_ended)
            future.result()
        except KeyboardInterrupt:
            # Close first: trials that now end must not count as failed.
            trials.close()
            _stop_trials(stop_flags, future, bar, grace_s)
            raise
        finally:
            trials.close()
    on_trials_ended(trials)
    if trials.failure_reason:
        raise ValueError(trials.failure_reason)


def _build_trainable(
    folder: Path, run_trial: RunTrial, make_reporter: Callable[[int], "LossReporter"]
) -> Callable[[dict[str, Any]], None]:
    """Build the function that Tune calls in the process of a trial.

    Args:
        folder: folder of the search.
        run_trial: runs the trial.
        make_reporter: function from the number of a trial to its progress callback.
    """
    working_directory = os.getcwd()
    environment = {name: value for name, value in os.environ.items() if name == "RAY_ADDRESS"}

    def drive_trial(config: dict[str, Any]) -> None:
        # Runs in a process of Tune, whose working directory is a temporary folder; paths in a job are relative to ours.
        os.chdir(working_directory)
        os.environ.update(environment)
        trial = TrialSpec(number=config["number"], values=json.loads(config["values"]))
        reporter = make_reporter(trial.number)
        try:
            trial_metrics = run_trial(trial, folder / TRIALS_FOLDER / f"{trial.number:04}", reporter)
        except StoppedError:
            return
        finally:
            ray.get(reporter.stop_flags.leave.remote(trial.number))
        tune.report({"metrics": trial_metrics})

    return drive_trial


def _build_tuner(
    trainable: Callable[[dict[str, Any]], None], trials: Trials, scheduler: "StudyScheduler", storage_path: str
) -> tune.Tuner:
    """Build a tuner that takes its trials from the study and starts their processes on this node, without CPUs."""
    for name in ("ray.tune", "ray.tune.execution.tune_controller", "ray.tune.tune"):
        logging.getLogger(name).setLevel(logging.CRITICAL)  # The study has the errors of all trials
    this_node = f"node:{ray.util.get_node_ip_address()}"
    return tune.Tuner(
        tune.with_resources(trainable, {"CPU": 0, this_node: 0.001}),
        tune_config=tune.TuneConfig(
            search_alg=StudySearcher(trials),
            scheduler=scheduler,
            num_samples=-1,
            trial_dirname_creator=lambda trial: trial.trial_id,
        ),
        run_config=tune.RunConfig(name="search", storage_path=storage_path, verbose=0),
    )


def _stop_trials(stop_flags: Any, future: Future[Any], bar: tqdm, grace_s: float) -> None:
    """Wait until training trials have written a checkpoint; other trials end at once."""
    deadline = time.monotonic() + grace_s
    training = ray.get(stop_flags.stop_all.remote())
    if training:
        bar.write("search: trials stop after a checkpoint; a second signal stops at once")
    while training and time.monotonic() < deadline and not wait([future], timeout=0.2).done:
        training = ray.get(stop_flags.count_training.remote())


class StudySearcher(Searcher):
    """Search algorithm of Tune that takes its trials from the study."""

    def __init__(self, trials: Trials) -> None:
        super().__init__()
        self.trials = trials

    def suggest(self, trial_id: str) -> dict[str, Any] | str | None:
        trial = self.trials.next_trial(trial_id)
        if trial is None:
            return Searcher.FINISHED if self.trials.is_finished else None
        return {"number": trial.number, "values": json.dumps(trial.values)}

    def on_trial_complete(self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False) -> None:
        if error:
            return  # StudyScheduler.on_trial_error has the message
        # Tune flattens the reported dictionary.
        prefix = "metrics/"
        reported = {
            name.removeprefix(prefix): value for name, value in (result or {}).items() if name.startswith(prefix)
        }
        self.trials.finish(trial_id, reported)

    def save(self, checkpoint_path: str) -> None:
        """Save nothing: the study is in its storage."""

    def restore(self, checkpoint_path: str) -> None:
        """Restore nothing."""


class StopFlags:
    """Ray actor with a flag for each trial: the trial is to stop.

    If Tune stopped a trial, it would kill the process in the middle of its work, and with it all that it has started.
    """

    def __init__(self) -> None:
        self.stopped = set[int]()
        self.training = set[int]()
        self.all_stopped = False

    def stop(self, number: int) -> None:
        """Stop a trial early."""
        self.stopped.add(number)

    def stop_all(self) -> int:
        """Stop all trials; return how many of them are training."""
        self.all_stopped = True
        return len(self.training)

    def count_training(self) -> int:
        return len(self.training)

    def should_stop(self, number: int, is_training: bool) -> bool:
        """Return True if a trial is to stop, and record whether it is training."""
        if is_training:
            self.training.add(number)
        else:
            self.training.discard(number)
        return self.all_stopped or number in self.stopped

    def leave(self, number: int) -> None:
        """Record that the process of a trial ends."""
        self.training.discard(number)


class StudyScheduler(FIFOScheduler):
    """Scheduler of Tune that reports losses and errors to the study."""

    def __init__(self, trials: Trials, folder: Path, stop_flags: Any) -> None:
        super().__init__()
        self.trials = trials
        self.folder = folder
        self.stop_flags = stop_flags

    def on_trial_result(self, tune_controller: Any, trial: TuneTrial, result: dict[str, Any]) -> str:
        if "loss" in result:
            should_stop = self.trials.report_loss(trial.trial_id, result["step"], result["steps"], result["loss"])
            if should_stop:
                ray.get(self.stop_flags.stop.remote(trial.config["number"]))
        return self.CONTINUE

    def on_trial_error(self, tune_controller: Any, trial: TuneTrial) -> None:
        # The process of the trial may have died; free the resources that it had reserved for training.
        remove_placement_group(self.folder / TRIALS_FOLDER / f"{trial.config['number']:04}")
        # get_pickled_error of Tune fails if the file is not yet in its storage.
        with open(trial.pickled_error_file, "rb") as file:
            error = ray.cloudpickle.load(file)
        self.trials.finish(trial.trial_id, {}, failures.classify_error(error).text)


class LossReporter:
    """Progress callback of a trial that sends Tune the mean loss of each `every` steps, from the run folder.

    Args:
        every: number of steps between two reports.
        number: number of the trial.
        stop_flags: handle of the StopFlags actor.
        stage: stage whose loss is reported; None reports the losses of all stages.
    """

    def __init__(self, every: int, number: int, stop_flags: Any, stage: str | None = None) -> None:
        self.every = every
        self.number = number
        self.stop_flags = stop_flags
        self.stage = stage
        self.reported = 0

    def __call__(self, run: Path, stage: str, step: int, steps: int) -> bool:
        if self.stage in (None, stage):
            self._report(run, stage, step, steps)
        return bool(ray.get(self.stop_flags.should_stop.remote(self.number, step < steps)))

    def _report(self, run: Path, stage: str, step: int, steps: int) -> None:
        if self.reported + self.every > step:
            return
        losses = metrics.read_losses(run, stage)
        while self.reported + self.every <= step:
            window = range(self.reported + 1, self.reported + self.every + 1)
            if not all(index in losses for index in window):
                break  # The record is being cut back to a checkpoint; a later call reports this window
            values = [losses[index] for index in window]
            finite = [value for value in values if value is not None]
            self.reported += self.every
            mean = sum(finite) / len(finite) if finite else sys.float_info.max
            # Returns after on_trial_result, so the flag of this report is set when __call__ asks for it.
            tune.report({"step": self.reported, "steps": steps, "loss": mean})


def _make_bar(trials: Trials) -> tqdm:
    return tqdm(desc="search", total=trials.settings.num_trials, initial=len(trials.ended_attempts), unit="trial")


def _update_bar(trials: Trials, bar: tqdm, on_trials_ended: OnTrialsEnded) -> None:
    """Update the progress bar and call `on_trials_ended` if trials have ended since the last call."""
    ended_attempts = trials.ended_attempts
    if len(ended_attempts) == bar.n:
        return
    bar.n = len(ended_attempts)
    states = [attempts[-1].state for attempts in ended_attempts]
    counts = {"stopped early": states.count(TrialState.PRUNED), "failed": states.count(TrialState.FAIL)}
    bar.set_postfix_str(", ".join(f"{count} {word}" for word, count in counts.items() if count))
    on_trials_ended(trials)
