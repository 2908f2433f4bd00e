"""Every benchmark starts from the command line, and the cheap ones run as a whole in their smallest size."""

import importlib
import json
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

import pytest

from jobs.bench import feeding, ingest, inhibition, launches, order, packing, pixels, serve, skew
from jobs.bench.simulated_bucket import TiledFile
from pipelines.serving.settings import ServedModel, ServerSettings
from tests.pipelines.serving.local_gateway import serve_locally

ROOT = Path(__file__).parents[3]
SHARED_PARTS = {"record", "simulated_bucket"}
SCRIPTS = sorted({path.stem for path in (ROOT / "jobs" / "bench").glob("*.py")} - SHARED_PARTS)


@pytest.mark.parametrize("name", SCRIPTS)
def test_a_script_explains_its_options(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    main = importlib.import_module(f"jobs.bench.{name}").main
    for arguments, code, stream in ((["--help"], 0, "out"), (["--nothing"], 2, "err")):
        with pytest.raises(SystemExit) as ended:
            main(arguments)
        assert ended.value.code == code
        assert "usage: " in getattr(capsys.readouterr(), stream)


def test_the_page_lists_every_script_with_its_record() -> None:
    folder = ROOT / "jobs" / "bench"
    rows = re.findall(r"^\| `(\w+)\.py` \| [^|]+ \| ?(?:`(\w+)\.jsonl`)? \|", (folder / "README.md").read_text(), re.M)
    assert sorted(name for name, _ in rows) == SCRIPTS
    assert all(record == (name if (folder / f"{name}.jsonl").exists() else "") for name, record in rows)


@pytest.mark.integration
def test_pixels_in_the_smallest_size(tmp_path: Path) -> None:
    pytest.importorskip("simplejpeg")
    pixels.main(["--images", "1", "--size", "28", "--out", str(tmp_path / "out.jsonl")])
    record = json.loads((tmp_path / "out.jsonl").read_text())
    assert {"pad", "crop"} == record["ms"].keys()
    assert {"exact", "fast", "prepared"} == record["ms"]["pad"].keys()


@pytest.mark.integration
@pytest.mark.parametrize("variant", ["redux-exact", "redux-texts"])
def test_redux_reads_the_images_of_the_bare_loop(
    variant: str, ray_cluster: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("simplejpeg")
    monkeypatch.setattr(ingest, "open_ray_session", nullcontext)
    monkeypatch.setattr(ingest, "INGEST_PARTS", 2)
    ingest.make_files(tmp_path, ingest.INGEST_BATCH, squares=False)
    read, bare = (sorted(chain.from_iterable(ingest.INGEST_VARIANTS[name](tmp_path))) for name in (variant, "bare"))
    assert read == sorted(ingest.PASSES[variant] * bare)


@pytest.mark.integration
@pytest.mark.parametrize("variant", order.ORDER_VARIANTS)
def test_order_in_the_smallest_size(variant: str, capsys: pytest.CaptureFixture[str]) -> None:
    order.main(["--global-batch-size", "8", "--variant", variant])
    assert json.loads(capsys.readouterr().out).keys() == {"first_ms", "median_ms", "worst_ms", "peak_mib"}


@pytest.mark.integration
@pytest.mark.skipif(sys.platform != "linux", reason="reads the memory of the process from /proc")
@pytest.mark.parametrize("variant", inhibition.INHIBITION_VARIANTS)
def test_inhibition_in_the_smallest_size(variant: str, capsys: pytest.CaptureFixture[str]) -> None:
    inhibition.main(["--heads", "2", "--image", "8", "--text", "4", "--variant", variant])
    assert json.loads(capsys.readouterr().out).keys() == {"peak_mib", "seconds", "device"}


@pytest.mark.integration
def test_packing_in_the_smallest_size(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    few = partial(packing.measure_speed, micro_batch_size=2, batch_size=8)
    monkeypatch.setattr(packing, "measure_speed", few)
    parts = ["--parts", "padding,peers,speed"]
    packing.main([*parts, "--batches", "10", "--steps", "1", "--out", str(tmp_path / "out.jsonl")])
    record = json.loads((tmp_path / "out.jsonl").read_text())
    assert all(layout["packed"] <= 0.03 < layout["unpacked"] for layout in record["padding"])
    assert all(speed["packed"] > 0 for speed in record["tokens_per_cpu_second"].values())
    assert all(layout["packers"]["redux"]["padding"] <= 0.03 for layout in record["peers"])


@pytest.mark.integration
def test_packers_train_the_same_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packing, "GLOBAL_BATCH", 2 * packing.RANKS)
    monkeypatch.setattr(packing, "PEER_LAYOUTS", (packing.PeerLayout(2, 8192, 1),))
    # Another packer: a row for each sample.
    monkeypatch.setattr(
        packing, "load_packers", lambda: {"single": lambda lengths, _: ([length] for length in lengths)}
    )
    packing.main(["--parts", "peers-speed", "--peer-steps", "1", "--out", str(tmp_path / "out.jsonl")])
    [layout] = json.loads((tmp_path / "out.jsonl").read_text())["peers_speed"]
    for speeds in layout["packers"].values():
        assert 0 < speeds["rank_tokens_per_second"] <= speeds["cpu_tokens_per_second"]


def test_padding_and_waiting_are_shares() -> None:
    even, uneven = [[[4, 4], [8]]] * packing.RANKS, [[[4], [8]], *[[[4, 4]]] * (packing.RANKS - 1)]
    assert packing.measure_micro_batches(even) == {"padding": 0, "waiting": 0}
    # One rank pads 4 of 16 tokens, and seven ranks with 8 tokens wait for it.
    assert packing.measure_micro_batches(uneven) == {"padding": round(4 / 72, 5), "waiting": round(1 - 72 / 128, 5)}


@pytest.mark.integration
@pytest.mark.skipif(sys.platform != "linux", reason="reads the memory of the process from /proc")
def test_a_large_set_is_opened_with_few_requests(tmp_path: Path) -> None:
    pytest.importorskip("s3fs")
    feeding.main(["--parts", "open", "--samples", "160000", "--out", str(tmp_path / "out.jsonl")])
    [opened] = json.loads((tmp_path / "out.jsonl").read_text())["open"]
    assert (opened["samples"], opened["requests"] <= 3 + 2 * feeding.OPEN_BATCH + 3) == (160_000, True)
    assert opened["megabytes"] < 3


def test_ranges_of_a_tiled_file_are_those_of_its_bytes() -> None:
    file = TiledFile(b"head", b"tile!", 3, b"end")
    whole = b"head" + 3 * b"tile!" + b"end"
    assert len(file) == len(whole)
    ranges = [(start, stop) for start in range(len(whole)) for stop in range(start, len(whole) + 1)]
    assert [file.read(*part) for part in ranges] == [whole[slice(*part)] for part in ranges]


@pytest.mark.integration
def test_passes_of_text_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(skew, "REPEATS", 1)
    skew.train_tokenizer(tmp_path)
    passes = skew.measure_passes(skew.build_plan(tmp_path, 1), is_trained=True)
    assert passes.keys() == {"images", "text", "whole_image", "no_tower", "share", "whole_image_share"}
    counts = list(skew.draw_image_counts(skew.TEXT_STEP))
    assert counts[-1] == [0, 0, 0]
    assert {number for step in counts for number in step} == set(skew.IMAGE_COUNTS)


@pytest.mark.integration
def test_launches_of_one_path(capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("triton")
    launches.main(["--paths", "tower block, inference", "--verbose"])
    row, plain, fused, kernels = capsys.readouterr().out.splitlines()[2:]
    assert row.startswith("| tower block, inference | ")
    assert "addmm" in plain
    assert "addmm" in fused
    assert kernels == "Counter()"


@pytest.mark.integration
def test_serve_in_the_smallest_size(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    @contextmanager
    def start_locally(model: Path, tokens: int | None) -> Iterator[str]:
        served = ServedModel(name="m", path=str(model), image_tokens="all" if tokens == 576 else tokens)
        with serve_locally(ServerSettings(model=served)) as url:
            yield url

    monkeypatch.setattr(serve, "start_server", start_locally)
    words = "--small --tokens 576 64 --concurrency 1 2 --requests 2 --new-tokens 2"
    serve.main([*words.split(), "--out", str(tmp_path / "out.jsonl")])
    record = json.loads((tmp_path / "out.jsonl").read_text())
    measured = [(result["image_tokens"], result["concurrency"], result["requests"]) for result in record["results"]]
    assert measured == [(576, 1, 2), (576, 2, 4), (64, 1, 2), (64, 2, 4)]
    assert all(result["first_token_p95_ms"] >= result["first_token_p50_ms"] > 0 for result in record["results"])
