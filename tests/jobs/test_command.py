"""The command line as a user meets it: its exit codes, its one line for a mistake, and how it ends when interrupted."""

import os
import re
import signal
import subprocess
import sys
import sysconfig
from argparse import ArgumentParser
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from jobs import command
from jobs.command import VERB_GROUPS, _build_parser
from pipelines.core import interrupts, storage
from tests.jobs.command_line import run_command

QUICKSTART = Path("jobs/recipes/quickstart.yaml")
ROOT = Path(__file__).parents[2]
HEAVY = {"ray", "torch", "transformers", "deepspeed", "pydantic", "yaml", "numpy"}


def redux(*arguments: str | Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run the installed console script, as a shell does."""
    script = Path(sysconfig.get_path("scripts")) / "redux"
    return subprocess.run(
        [script, *arguments], cwd=ROOT, capture_output=True, text=True, stdin=subprocess.DEVNULL, timeout=120,
        env=os.environ | environment,
    )  # fmt: skip


@pytest.fixture
def reset_signals() -> Iterator[None]:
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
    reset_signals: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> Callable[[Callable[[Any, Path, bool], None]], None]:
    """Replace the function that `redux run` calls, and the schema by one that returns a job without checks."""
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


@pytest.mark.integration
def test_help_and_version_load_nothing_heavy() -> None:
    program = (
        "import sys\nfrom jobs.command import main\n"
        "for words in ('--help', 'run --help', 'check --help', 'look --help', 'score --help', 'manifest --help', "
        "'--version', 'run'):\n"
        " try: main(words.split())\n except SystemExit: print('ENDED')\n"
        "print('LOADED', *sys.modules)"
    )
    output = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True)
    assert output.stdout.count("ENDED") == 8
    loaded = {name.partition(".")[0] for name in output.stdout.partition("LOADED")[2].split()}
    assert "argparse" in loaded
    assert not loaded & HEAVY


def test_help_shows_an_example() -> None:
    assert "redux run" in run_command("--help").out
    assert f"redux run {QUICKSTART}" in run_command("run", "--help").out


def test_help_lists_each_verb_in_one_group() -> None:
    listed = re.findall(r"^  ([a-z]+) ", run_command("--help").out, re.M)
    assert sorted(listed) == sorted(verb for verbs in VERB_GROUPS.values() for verb in verbs)
    [verbs] = [action for action in _build_parser()._actions if isinstance(action.choices, dict)]
    assert sorted(listed) == sorted(verbs.choices or ())


def list_parsers(parser: ArgumentParser, *words: str) -> Iterator[tuple[str, ArgumentParser]]:
    """List the verbs with their parsers, and the actions of those that have some."""
    yield " ".join(words), parser
    for action in parser._actions:
        if isinstance(action.choices, dict):
            for name, inner in action.choices.items():
                yield from list_parsers(inner, *words, name)


@pytest.mark.parametrize(
    ("words", "parser"), [pytest.param(*pair, id=pair[0]) for pair in list_parsers(_build_parser())]
)
def test_help_explains_each_verb_and_its_arguments(words: str, parser: ArgumentParser) -> None:
    result = run_command(*words.split(), "--help")
    assert (result.code, result.err) == (0, "")
    assert result.out.startswith(f"usage: {' '.join(['redux', *words.split()])} ")
    text = " ".join(result.out.split())
    for action in parser._actions:
        if not isinstance(action.choices, dict):
            assert re.search("[a-z]", (action.help or "").partition("(")[0]), f"{action.dest} has no meaning"
        if "%(default)s" in (action.help or ""):
            assert f"default: {action.default}" in text


@pytest.mark.parametrize(
    ("verb", "arguments", "options"),
    [
        ("ask", "m a.png b.png what?", "--gamma 0"),
        ("chat", "m a.png b.png", "--gamma 0"),
        ("serve", "m", "--port 9 --compare"),
        ("run", "j.yaml a=1 b=-2", "--runs-dir x --allow-changes"),
        ("look", "j.yaml a=1 b=2", "--seed 3"),
        ("check", "j.yaml a=1 b=2", "--price 3"),
        ("best", "s 1 2", ""),
        ("tables", "a b", "--out o"),
        ("cost", "default tokens-64", "--text 3"),
        ("score", "gqa", "--answers a"),
        ("export", "m", "--to vllm --stage s"),
        ("shards verify", "x", "--consumed r --decode"),
    ],
)
def test_options_may_stand_between_arguments(verb: str, arguments: str, options: str) -> None:
    """Also between those of a list."""
    words = arguments.split()
    parser = command._build_parser()
    parsed = [
        vars(parser.parse_args([*verb.split(), *words[:place], *options.split(), *words[place:]]))
        for place in range(len(words) + 1)
    ]
    for values in parsed:
        values.pop("verb")  # that of shards is a new function for each action
    assert all(values == parsed[0] for values in parsed)


def test_only_arguments_that_are_missing_are_named() -> None:
    assert run_command("run").err.endswith("redux run: error: the following arguments are required: JOB\n")
    assert run_command("ask", "m").err.endswith("required: QUESTION\n")


def test_an_unknown_option_is_named_by_the_usage_of_its_verb() -> None:
    result = run_command("ask", "m", "--gama", "0", "a.png", "what?")
    assert result.code == 2
    assert result.err.startswith("usage: redux ask")
    assert result.err.endswith("redux ask: error: unrecognized arguments: --gama\n")
    assert run_command("run", "j.yaml", "--into", "x").err.endswith("--into: this option is now --runs-dir\n")


JOB = "name: a\ndata: {source: easy-vqa}\nmodel: {checkpoint: runs/quikstart}\nevaluate: {tasks: {easy_vqa: {}}}\n"


@pytest.mark.parametrize(
    "words",
    [
        "ask runs/quikstart what?",
        "chat runs/quikstart",
        "serve runs/quikstart",
        "export runs/quikstart",
        "export runs/quikstart --out o",
        "report runs/quikstart",
        "tables runs/quikstart",
        "best runs/quikstart",
        "look runs/quikstart",
        "cost --model runs/quikstart",
        "shards verify runs/quikstart",
        "shards verify runs/quickstart --consumed runs/quikstart",
        "shards index runs/quikstart",
        "check job.yaml",
        "run job.yaml",
    ],
)
def test_a_mistyped_folder_is_named_in_one_line(
    words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, no_ray: None
) -> None:
    """In each verb that takes a folder of a run or of a model, without Ray and without the hub."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "job.yaml").write_text(JOB)
    (tmp_path / "runs/quickstart").mkdir(parents=True)
    result = run_command(*words.split())
    assert result.code == 2
    assert result.out in ("", "1 problem\n")  # redux check counts them
    [line] = result.err.splitlines()
    assert "there is no folder runs/quikstart (did you mean runs/quickstart?)" in line


@pytest.fixture
def no_ray(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make a start of Ray and a request to the hub an error."""
    import huggingface_hub

    from pipelines.core import cluster

    def refuse(*arguments: object, **options: object) -> None:
        raise AssertionError("called")

    monkeypatch.setattr(cluster, "open_session", refuse)
    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", refuse)


@pytest.mark.integration
def test_mistakes_in_a_job_are_one_line_for_each_key_before_ray_starts(tmp_path: Path) -> None:
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


@pytest.mark.integration
def test_a_misspelt_key_is_found_without_torch_or_ray(tmp_path: Path) -> None:
    """In all kinds of files. Torch and Ray take seconds to import."""
    for kind, text in MISTAKES.items():
        (tmp_path / f"{kind}.yaml").write_text(text)
    program = (
        "import sys\nfrom jobs.command import main\n"
        f"print(*(main(['run', name + '.yaml']) for name in {list(MISTAKES)}))\nprint(*sys.modules)"
    )
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    ended = subprocess.run(
        [sys.executable, "-c", program], cwd=tmp_path, env=environment, capture_output=True, text=True, check=True
    )
    codes, loaded = ended.stdout.splitlines()
    assert codes.split() == ["2"] * len(MISTAKES)
    lines = ended.stderr.splitlines()
    assert [line.split(": ")[1] for line in lines if "seeed: unknown key, did you mean 'seed'?" in line] == [
        f"{kind}.yaml" for kind in MISTAKES
    ]
    assert not {"torch", "ray", "transformers", "deepspeed"} & {name.partition(".")[0] for name in loaded.split()}


def test_run_passes_job_and_folder(work: Any) -> None:
    seen = []
    work(lambda job, folder, changed: seen.append((job, folder, changed)))
    assert command.main(["run", "x.yaml"]) == 0
    assert command.main(["run", "x.yaml", "a.b=1", "--runs-dir", "elsewhere", "--allow-changes", "c=2"]) == 0
    assert [(folder, changed) for _, folder, changed in seen] == [
        (Path("runs/a"), False),
        (Path("elsewhere/a"), True),
    ]
    assert [(job.path, job.overrides) for job, *_ in seen] == [(Path("x.yaml"), []), (Path("x.yaml"), ["a.b=1", "c=2"])]


def test_a_mistake_found_during_the_run_is_one_line(work: Any, capsys: pytest.CaptureFixture[str]) -> None:
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


def test_signal_handlers_are_restored(work: Any) -> None:
    before = [signal.getsignal(number) for number in interrupts.SIGNALS]
    work(lambda *arguments: None)
    assert command.main(["run", "x.yaml"]) == 0
    assert [signal.getsignal(number) for number in interrupts.SIGNALS] == before


def test_an_interrupt_that_appears_as_another_error_exits_130(work: Any, capsys: pytest.CaptureFixture[str]) -> None:
    def replace_error(job: Any, folder: Path, changed: bool) -> None:
        try:
            signal.raise_signal(signal.SIGTERM)
        except KeyboardInterrupt:
            raise ImportError("numpy._core failed to import") from None

    work(replace_error)
    assert command.main(["run", "x.yaml"]) == 130
    assert "redux: interrupted" in capsys.readouterr().err


def test_a_suppressed_interrupt_is_raised_at_the_next_check(work: Any) -> None:
    def suppress_interrupt(job: Any, folder: Path, changed: bool) -> None:
        with suppress(KeyboardInterrupt):
            signal.raise_signal(signal.SIGHUP)
        interrupts.raise_if_interrupted()
        pytest.fail("continued")

    work(suppress_interrupt)
    assert command.main(["run", "x.yaml"]) == 130


def test_a_deferred_interrupt_is_raised_after_its_block(work: Any) -> None:
    steps = []

    def defer(job: Any, folder: Path, changed: bool) -> None:
        with interrupts.defer_signals():
            signal.raise_signal(signal.SIGTERM)
            steps.append("rest of the block")
        steps.append("after the block")

    work(defer)
    assert command.main(["run", "x.yaml"]) == 130
    assert steps == ["rest of the block"]


def test_an_ignored_signal_stays_ignored(work: Any) -> None:
    """Under nohup, SIGHUP is ignored from the start."""
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    work(lambda *arguments: signal.raise_signal(signal.SIGHUP))
    try:
        assert command.main(["run", "x.yaml"]) == 0
    finally:
        signal.signal(signal.SIGHUP, before)


@pytest.mark.integration
@pytest.mark.parametrize("name", ["stdout", "stderr"])
def test_an_output_without_a_reader_is_no_error(name: str) -> None:
    """A `tee` dies of the Ctrl-C that the run makes a checkpoint on."""
    code = (
        "import sys; from jobs import command; command._survive_lost_outputs();"
        f"sys.stdin.read(); print('lost', file=sys.{name}, flush=True); sys.exit(7)"
    )
    process = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, **{name: subprocess.PIPE})
    getattr(process, name).close()
    process.communicate(b"")
    assert process.returncode == 7


@pytest.mark.integration
@pytest.mark.parametrize("closed", [">&-", "2>&-", ">&- 2>&-"])
def test_an_output_that_the_shell_has_closed_is_no_error(closed: str) -> None:
    ended = subprocess.run(["sh", "-c", f"{sys.executable} -m jobs.command schema {closed}"], cwd=ROOT)
    assert ended.returncode == 0


@pytest.mark.integration
def test_a_character_that_the_output_cannot_show_is_no_error() -> None:
    code = "from jobs import command; command._survive_lost_outputs(); print('caf\\udce9 ü')"
    for encoding, shown in (("utf-8", "caf\\udce9 ü"), ("ascii", "caf\\udce9 \\xfc")):
        environment = os.environ | {"PYTHONIOENCODING": encoding}
        output = subprocess.check_output([sys.executable, "-c", code], cwd=ROOT, env=environment)
        assert output.decode().strip() == shown


def test_an_internal_error_keeps_its_traceback(work: Any) -> None:
    def fail(job: Any, folder: Path, changed: bool) -> None:
        raise RuntimeError("a bug")

    work(fail)
    with pytest.raises(RuntimeError, match="a bug"):
        command.main(["run", "x.yaml"])


def test_cost_prints_the_stages_and_tokens_of_each_preset() -> None:
    costs = run_command("cost", "default", "tokens-64", "tokens-36")
    assert costs.code == 0
    rows = {line.split()[0]: line for line in costs.out.splitlines()}
    assert list(rows) == ["preset", "default", "tokens-64", "tokens-36"]
    assert rows["default"].split()[1] == "288"
    assert "5: 381+76, 11: 303+60, 17: 240+48" in rows["default"]
    assert rows["tokens-64"].split()[1] == "64"
    assert "17: 53+11" in rows["tokens-64"]
    assert rows["tokens-36"].split()[1] == "36"
    assert "17: 30+6" in rows["tokens-36"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nothing"], "preset: got nothing, allowed: default, "),
        (["--model", "8b"], "--model: got 8b, allowed: 7b, 13b, or the folder of a LLaVA"),
        (["--text", "0"], "argument --text: got 0, allowed: a whole number >= 1"),
        (["--text", "9" * 5000], ", allowed: a whole number >= 1"),
    ],
    ids=str,
)
def test_a_wrong_argument_of_cost_is_named_in_one_line(arguments: list[str], message: str) -> None:
    refused = run_command("cost", *arguments)
    assert refused.code == 2
    assert message in refused.err.splitlines()[-1]
    assert not refused.out


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
        model_parts.configure_model(ModelSettings(checkpoint=str(tmp_path)))


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


def test_an_interrupted_export_leaves_an_empty_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from jobs import export

    out = tmp_path / "out"

    def half(*arguments: Any) -> str:
        storage.write(str(out / "config.json"), b"{}")
        raise KeyboardInterrupt

    monkeypatch.setattr(export, "_export_folder", half)
    with pytest.raises(KeyboardInterrupt):
        export.export_model(tmp_path, None, None, str(out))
    assert not out.exists()
