"""The command line as a user meets it: its exit codes, its one line for a mistake, and how it ends when interrupted."""

import os
import signal
import subprocess
import sys
import sysconfig
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from jobs import command
from pipelines.core import interrupts, storage

QUICKSTART = Path("jobs/recipes/quickstart.yaml")
ROOT = Path(__file__).parents[2]
HEAVY = {"ray", "torch", "transformers", "deepspeed", "pydantic", "yaml", "numpy"}


def redux(*arguments: str | Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """The installed console script, as a shell would start it."""
    script = Path(sysconfig.get_path("scripts")) / "redux"
    return subprocess.run(
        [script, *arguments], cwd=ROOT, capture_output=True, text=True, stdin=subprocess.DEVNULL, timeout=120,
        env=os.environ | environment,
    )  # fmt: skip


@pytest.fixture
def attentive() -> Iterator[None]:
    """Reset ignored signals: a suite in the background ignores SIGINT, one under nohup SIGHUP."""
    before = {number: signal.getsignal(number) for number in interrupts.SIGNALS}
    for number, handler in before.items():
        if handler == signal.SIG_IGN:
            signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.fixture
def work(
    attentive: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> Callable[[Callable[[Any, Path, bool], None]], None]:
    """Puts a function in the place of the work that `redux run` starts, and a job of one name in that of the schema."""
    monkeypatch.chdir(tmp_path)
    Path("x.yaml").touch()

    def replace(function: Callable[[Any, Path, bool], None]) -> None:
        for name, content in {
            "schema": {"load": lambda path, overrides: SimpleNamespace(name="a", path=path, overrides=overrides)},
            "run": {"run": function},
        }.items():
            module = ModuleType(f"jobs.{name}")
            vars(module).update(content)
            monkeypatch.setitem(sys.modules, f"jobs.{name}", module)
            monkeypatch.setattr(f"jobs.{name}", module, raising=False)

    return replace


def test_help_and_version_load_nothing_heavy() -> None:
    for arguments in (
        ["--help"],
        ["run", "--help"],
        ["score", "--help"],
        ["manifest", "--help"],
        ["--version"],
        ["run"],
    ):
        program = (
            "import sys\nfrom jobs.command import main\n"
            f"try: main({arguments})\nexcept SystemExit: print('LOADED', *sys.modules)"
        )
        output = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True)
        loaded = {name.partition(".")[0] for name in output.stdout.partition("LOADED")[2].split()}
        assert "argparse" in loaded
        assert not loaded & HEAVY


def test_help_shows_an_example() -> None:
    assert "redux run" in redux("--help").stdout + redux("run", "--help").stdout
    assert f"redux run {QUICKSTART}" in redux("run", "--help").stdout


def test_mistakes_in_a_job_are_a_line_each_and_exit_2_before_ray_starts(tmp_path: Path) -> None:
    job, ray = tmp_path / "job.yaml", tmp_path / "ray"
    job.write_text("nmae: a\n")
    ray.mkdir()
    ended = redux("run", job, "--runs-dir", tmp_path / "runs", RAY_TMPDIR=str(ray), RAY_ADDRESS="")
    assert ended.returncode == 2
    assert ended.stdout == ""
    assert ended.stderr.startswith(
        f"redux: {job}: nmae: unknown key, did you mean 'name'? got 'a', allowed keys: name,"
    )
    lines = ended.stderr.splitlines()
    assert [line.removeprefix(f"redux: {job}: ").partition(":")[0] for line in lines] == [
        "nmae",
        "name",
        "data",
        "model",
    ]
    assert not list(ray.iterdir()), "Ray was started"
    assert not (tmp_path / "runs").exists()


MISTAKES = {
    "job": "name: a\nseeed: 1\ndata: {}\nmodel: {checkpoint: a/b}\nevaluate: {tasks: {gqa: {}}}\n",
    "study": "name: a\nvariants: {b: {}}\njob: {seeed: 1, data: {}, model: {checkpoint: a/b}, evaluate: {}}\n",
    "variant": "name: a\nvariants: {b: {seeed: 1}}\njob: {data: {}, model: {checkpoint: a/b}, evaluate: {}}\n",
    "search": "name: a\nnum_trials: 2\nspace: {evaluate.batch_size: {low: 1, high: 2}}\nobjectives: {flops: min}\n"
    "job: {seeed: 1, data: {}, model: {checkpoint: a/b}, evaluate: {}}\n",
}


@pytest.mark.parametrize("kind", MISTAKES)
def test_a_misspelt_key_is_found_without_torch_or_ray(tmp_path: Path, kind: str) -> None:
    """They take seconds to import."""
    job = tmp_path / "job.yaml"
    job.write_text(MISTAKES[kind])
    program = f"import sys\nfrom jobs.command import main\nprint(main(['run', {str(job)!r}]), *sys.modules)"
    ended = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True)
    code, *loaded = ended.stdout.split()
    assert code == "2"
    assert "seeed: unknown key, did you mean 'seed'?" in ended.stderr
    assert not {"torch", "ray", "transformers", "deepspeed"} & {name.partition(".")[0] for name in loaded}


def test_run_hands_over_the_job_and_its_folder(work: Any) -> None:
    seen = []
    work(lambda job, folder, changed: seen.append((job, folder, changed)))
    assert command.main(["run", "x.yaml"]) == 0
    assert command.main(["run", "x.yaml", "a.b=1", "--runs-dir", "elsewhere", "--allow-changes", "c=2"]) == 0
    assert [(folder, changed) for _, folder, changed in seen] == [
        (Path("runs/a"), False),
        (Path("elsewhere/a"), True),
    ]
    assert [(job.path, job.overrides) for job, *_ in seen] == [(Path("x.yaml"), []), (Path("x.yaml"), ["a.b=1", "c=2"])]


def test_a_mistake_found_later_is_one_line_too(work: Any, capsys: pytest.CaptureFixture[str]) -> None:
    def fail(job: Any, folder: Path, changed: bool) -> None:
        raise ValueError("num_workers: got 3,\nallowed: a divisor of 32")

    work(fail)
    assert command.main(["run", "x.yaml"]) == 2
    assert capsys.readouterr().err == "redux: num_workers: got 3, allowed: a divisor of 32\n"


@pytest.mark.parametrize("number", interrupts.SIGNALS)
def test_a_signal_unwinds_the_work_and_exits_130(
    work: Any, capsys: pytest.CaptureFixture[str], number: signal.Signals
) -> None:
    unwound = []

    def interrupted(job: Any, folder: Path, changed: bool) -> None:
        try:
            signal.raise_signal(number)
        finally:
            unwound.append(folder)

    work(interrupted)
    assert command.main(["run", "x.yaml"]) == 130
    assert unwound == [Path("runs/a")]
    assert capsys.readouterr().err.count("\n") == 1
    assert signal.getsignal(number) is signal.SIG_IGN, "another one cannot spoil the exit code"


def test_signals_are_as_before_after_work_without_one(work: Any) -> None:
    before = [signal.getsignal(number) for number in interrupts.SIGNALS]
    work(lambda *arguments: None)
    assert command.main(["run", "x.yaml"]) == 0
    assert [signal.getsignal(number) for number in interrupts.SIGNALS] == before


def test_an_interrupt_counts_that_comes_out_as_another_error(work: Any, capsys: pytest.CaptureFixture[str]) -> None:
    def turned(job: Any, folder: Path, changed: bool) -> None:
        try:
            signal.raise_signal(signal.SIGTERM)
        except KeyboardInterrupt:
            raise ImportError("numpy._core failed to import") from None

    work(turned)
    assert command.main(["run", "x.yaml"]) == 130
    assert "redux: interrupted" in capsys.readouterr().err


def test_an_interrupt_that_is_swallowed_comes_with_the_next_look(work: Any) -> None:
    def swallowed(job: Any, folder: Path, changed: bool) -> None:
        with suppress(KeyboardInterrupt):
            signal.raise_signal(signal.SIGHUP)
        interrupts.raise_if_interrupted()
        pytest.fail("went on")

    work(swallowed)
    assert command.main(["run", "x.yaml"]) == 130


def test_an_interrupt_waits_for_the_end_of_a_block_that_defers_it(work: Any) -> None:
    steps = []

    def deferring(job: Any, folder: Path, changed: bool) -> None:
        with interrupts.defer_signals():
            signal.raise_signal(signal.SIGTERM)
            steps.append("the block went on")
        steps.append("and so did what follows")

    work(deferring)
    assert command.main(["run", "x.yaml"]) == 130
    assert steps == ["the block went on"]


def test_a_signal_that_is_ignored_stays_ignored(work: Any) -> None:
    """As under nohup."""
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    work(lambda *arguments: signal.raise_signal(signal.SIGHUP))
    try:
        assert command.main(["run", "x.yaml"]) == 0
    finally:
        signal.signal(signal.SIGHUP, before)


@pytest.mark.parametrize("name", ["stdout", "stderr"])
def test_an_output_that_nobody_reads_any_more_is_no_error(name: str) -> None:
    """A `tee` dies of the Ctrl-C that the run makes a checkpoint on."""
    code = (
        "import sys; from jobs import command; command._survive_lost_outputs();"
        f"sys.stdin.read(); print('lost', file=sys.{name}, flush=True); sys.exit(7)"
    )
    process = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, **{name: subprocess.PIPE})
    getattr(process, name).close()
    process.communicate(b"")
    assert process.returncode == 7


@pytest.mark.parametrize("closed", [">&-", "2>&-", ">&- 2>&-"])
def test_an_output_that_the_shell_has_closed_is_no_error(closed: str) -> None:
    ended = subprocess.run(["sh", "-c", f"{sys.executable} -m jobs.command schema {closed}"], cwd=ROOT)
    assert ended.returncode == 0


def test_a_character_that_the_output_cannot_show_is_no_error() -> None:
    code = "from jobs import command; command._survive_lost_outputs(); print('caf\\udce9 ü')"
    for encoding, shown in (("utf-8", "caf\\udce9 ü"), ("ascii", "caf\\udce9 \\xfc")):
        environment = os.environ | {"PYTHONIOENCODING": encoding}
        output = subprocess.check_output([sys.executable, "-c", code], cwd=ROOT, env=environment)
        assert output.decode().strip() == shown


def test_an_error_of_ours_keeps_its_traceback(work: Any) -> None:
    def fail(job: Any, folder: Path, changed: bool) -> None:
        raise RuntimeError("a bug")

    work(fail)
    with pytest.raises(RuntimeError, match="a bug"):
        command.main(["run", "x.yaml"])


def test_cost_prints_the_stages_and_tokens_of_each_preset() -> None:
    told = redux("cost", "default", "tokens-64", "tokens-36")
    assert told.returncode == 0
    rows = {line.split()[0]: line for line in told.stdout.splitlines()}
    assert list(rows) == ["preset", "default", "tokens-64", "tokens-36"]
    assert rows["default"].split()[1] == "288"
    assert "5: 381+76, 11: 303+60, 17: 240+48" in rows["default"]
    assert rows["tokens-64"].split()[1] == "64"
    assert "17: 53+11" in rows["tokens-64"]
    assert rows["tokens-36"].split()[1] == "36"
    assert "17: 30+6" in rows["tokens-36"]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["nothing"], "preset: got nothing, allowed: default, "),
        (["--model", "8b"], "--model: got 8b, allowed: 7b, 13b, or the folder of a LLaVA"),
        (["--text", "0"], "argument --text: got 0, allowed: a whole number >= 1"),
        (["--text", "9" * 5000], ", allowed: a whole number >= 1"),
    ],
    ids=str,
)
def test_what_cost_cannot_show_is_named_in_a_line(arguments: list[str], said: str) -> None:
    told = redux("cost", *arguments)
    assert told.returncode == 2
    assert said in told.stderr.splitlines()[-1]
    assert not told.stdout


@pytest.mark.parametrize("content", ["", "[]", "3", '{"model_type": 3}', '{"model_type": "llava", "text_config": 3}'])
def test_cost_names_a_folder_whose_config_is_not_that_of_a_llava(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], content: str
) -> None:
    (tmp_path / "config.json").write_text(content)
    assert command.main(["cost", "--model", str(tmp_path)]) == 2
    assert capsys.readouterr().err.startswith(f"redux: --model: got {tmp_path}, allowed: 7b, 13b, or the folder of a")


def test_a_config_with_a_value_of_a_wrong_type_is_a_line(tmp_path: Path) -> None:
    from jobs import model_parts
    from redux.architecture import ModelSettings

    (tmp_path / "config.json").write_text('{"model_type": "llava", "text_config": 3}')
    with pytest.raises(ValueError, match=r"^checkpoint: got .*, allowed: a config.json .*'text_config' with value 3"):
        model_parts.build_config(ModelSettings(checkpoint=str(tmp_path)))


def test_a_run_without_training_has_nothing_to_export(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = f"name: a\ndata: {{}}\nmodel: {{checkpoint: {tmp_path}}}\nevaluate: {{tasks: {{easy_vqa: {{}}}}}}\n"
    (tmp_path / "job.yaml").write_text(text)
    assert command.main(["export", str(tmp_path), "--out", str(tmp_path / "out")]) == 2
    assert capsys.readouterr().err == (
        f"redux: {tmp_path}: this run only evaluates, allowed: the folder of a run with training stages\n"
    )


def test_tables_are_not_written_over_a_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (out := tmp_path / "out").touch()
    assert command.main(["tables", str(tmp_path), "--out", str(out)]) == 2
    assert capsys.readouterr().err == f"redux: --out: got {out}, which is a file, allowed: a folder\n"


def test_an_export_that_is_stopped_leaves_nothing_in_the_way_of_the_next(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    from jobs import export

    out = tmp_path / "out"

    def half(*arguments: Any) -> str:
        storage.write(str(out / "config.json"), b"{}")
        raise KeyboardInterrupt

    monkeypatch.setattr(export, "_export_folder", half)
    with pytest.raises(KeyboardInterrupt):
        export.export_model(tmp_path, None, None, str(out))
    assert not out.exists()
