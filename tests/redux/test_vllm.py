"""vLLM's stock server serves our models by the plug-in, with the answers of `redux.answering`.

The slow tests start the real server. They need an interpreter with vLLM and Redux, whose path REDUX_VLLM_PYTHON has.
REDUX_VLLM_MODEL may name a model trained on easy-VQA; the default is a random model of the quickstart's sizes.
"""

import ast
import base64
import contextlib
import io
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import easy_vqa
import numpy as np
import pytest
import torch
from PIL import Image
from transformers import SiglipVisionConfig

import redux.vllm
from redux.answering import load
from redux.architecture import LanguageSizes, ModelSettings, TowerSizes
from redux.chat import ChatModel, Message, Sampling, load_chat_model
from redux.configuration import ReduxConfig
from redux.conversation import train_word_tokenizer
from redux.model import ReduxForConditionalGeneration, ReduxModel, build_model
from redux.processor import build_processor, record_training_format
from redux.settings import CMAI, VMTC, Reduction
from redux.vllm.configuration import build_image_encoder, check_config

Tiny = Callable[..., ReduxForConditionalGeneration]

INTERPRETER = os.environ.get("REDUX_VLLM_PYTHON", "")
MAX_NEW_TOKENS = 8
OFF = {"vmtc": None, "reduction": None, "cmai": None}
METHODS: dict[str, dict[str, Any]] = {
    "vmtc": {**OFF, "vmtc": {"ratio": 0.5}},
    "prumerge": {**OFF, "reduction": {"method": "prumerge", "tokens": 16}},
    "all tokens": OFF,
}


def test_the_plug_in_registers_the_architecture_of_saved_models(tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    registered: dict[str, str] = {}
    registry = SimpleNamespace(register_model=registered.__setitem__)
    monkeypatch.setitem(sys.modules, "vllm", SimpleNamespace(ModelRegistry=registry))
    redux.vllm.register()
    redux.vllm.register()  # vLLM may call it again
    [(architecture, target)] = registered.items()
    assert architecture == ReduxForConditionalGeneration.__name__
    module, name = target.split(":")
    path = Path(redux.vllm.__file__).parent.joinpath(*module.split(".")[2:]).with_suffix(".py")
    assert name in {node.name for node in ast.parse(path.read_text()).body if isinstance(node, ast.ClassDef)}


@pytest.mark.parametrize(
    ("methods", "tokens"),
    [
        ({}, 16),
        ({"vmtc": VMTC()}, 8),
        ({"vmtc": VMTC(tokens=5)}, 5),
        ({"reduction": Reduction(method="stride", tokens=4)}, 4),
    ],
)
def test_the_number_of_image_tokens_follows_from_the_configuration(
    tower: TowerSizes, tiny: Tiny, methods: dict[str, Any], tokens: int
) -> None:
    config = ReduxConfig(**{**tiny(None, None).config.to_dict(), **methods})
    assert check_config(config).image_seq_length == tokens


def test_a_model_with_cmai_is_refused_until_an_override_turns_it_off(tiny: Tiny) -> None:
    config = tiny(VMTC(), CMAI()).config
    with pytest.raises(ValueError, match=r"^cmai: got settings, allowed: null, .*--hf-overrides '{\"cmai\": null}'$"):
        check_config(config)
    config.update({"cmai": None})  # As vLLM applies an override
    assert check_config(config).vmtc == tiny(VMTC(), CMAI()).config.vmtc


def test_a_mistake_in_an_override_is_named(tiny: Tiny) -> None:
    config = tiny(None, None).config
    config.vmtc = {"token": 4}
    with pytest.raises(ValueError, match=r"^vmtc: got token, allowed: "):
        check_config(config).method_settings("vmtc")


# PruMerge needs a class token, which SigLIP has not.
@pytest.mark.parametrize(
    ("methods", "tower_type"),
    [(name, tower) for name in METHODS for tower in ("clip", "siglip") if (name, tower) != ("prumerge", "siglip")],
)
def test_the_image_encoder_gives_the_tokens_of_the_model(tiny: Tiny, methods: str, tower_type: str) -> None:
    config = ReduxConfig(**{**tiny(None, None).config.to_dict(), **METHODS[methods]})
    if tower_type == "siglip":
        sizes = {name: getattr(config.vision_config, name) for name in TowerSizes.__dataclass_fields__}
        vision = SiglipVisionConfig(**sizes, vision_use_head=False)
        config = ReduxConfig(
            **{**config.to_dict(), "vision_config": vision.to_dict(), "vision_feature_select_strategy": "full"}
        )
    torch.manual_seed(0)
    model = ReduxModel(config).eval()
    encoder = build_image_encoder(check_config(config)).eval()
    names = {name for name in model.state_dict() if not name.startswith("language_model.")}
    assert names == set(encoder.state_dict())
    encoder.load_state_dict({name: model.state_dict()[name] for name in names})
    pixels = torch.randn(2, 3, 32, 32)
    expected, found = (torch.stack(each.get_image_features(pixels).pooler_output) for each in (model, encoder))
    assert expected.shape == (2, config.image_seq_length, 32)
    assert torch.equal(found, expected)


# The real server.


def _has_vllm() -> bool:
    program = "import importlib.util as u; assert u.find_spec('vllm') and u.find_spec('redux')"
    return bool(INTERPRETER) and subprocess.run([INTERPRETER, "-c", program], capture_output=True).returncode == 0


def served(test: Any) -> Any:
    """Mark a test of the real server."""
    reason = "needs the interpreter of an environment with redux and vLLM in REDUX_VLLM_PYTHON, see redux/README.md"
    for mark in (pytest.mark.slow, pytest.mark.integration, pytest.mark.skipif(not INTERPRETER, reason=reason)):
        test = mark(test)
    return test


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of the quickstart's sizes; vLLM's attention on CPUs has no heads of fewer than 32 dimensions."""
    assert _has_vllm(), f"REDUX_VLLM_PYTHON: got {INTERPRETER}, allowed: an interpreter with vllm and redux"
    if trained := os.environ.get("REDUX_VLLM_MODEL"):
        return Path(trained)
    tokenizer = train_word_tokenizer([*easy_vqa.get_test_questions()[0], "USER: ASSISTANT: yes no red circle"], 512)
    settings = ModelSettings(
        tower=TowerSizes(
            image_size=64,
            patch_size=8,
            hidden_size=96,
            num_hidden_layers=5,
            num_attention_heads=3,
            intermediate_size=192,
        ),
        language=LanguageSizes(
            hidden_size=128,
            num_hidden_layers=2,
            num_attention_heads=4,
            intermediate_size=352,
            max_position_embeddings=512,
        ),
        vmtc=VMTC(ratio=0.5),
        cmai=CMAI(),
    )
    torch.manual_seed(0)
    model = build_model(settings, tokenizer).eval()
    with torch.no_grad():
        for weight in model.parameters():
            if weight.dim() > 1:  # Attention of weights as initialised is all but uniform
                weight.mul_(0.16 / weight.std())
    path = tmp_path_factory.mktemp("served")
    record_training_format(model, tokenizer, "vicuna_bare", "pad")
    model.save_pretrained(path)
    build_processor(model.config, tokenizer).save_pretrained(path)
    return path


class Server:
    """vLLM's server on a free port of this machine."""

    def __init__(self, folder: Path, *arguments: str) -> None:
        with socket.create_server(("127.0.0.1", 0)) as free:
            self.url = f"http://127.0.0.1:{free.getsockname()[1]}"
        address = ("--host", "127.0.0.1", "--port", self.url.rpartition(":")[2])
        options = ("--served-model-name", "redux", "--dtype", "float32", "--enforce-eager", "--max-num-seqs", "16")
        quiet = {"VLLM_NO_USAGE_STATS": "1", "HF_HUB_OFFLINE": "1", "VLLM_CPU_KVCACHE_SPACE": "1"}
        module = "vllm.entrypoints.openai.api_server"
        self.process = subprocess.Popen(
            [INTERPRETER, "-m", module, "--model", str(folder), *address, *options, *arguments],
            env={**{name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}, **quiet},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )
        self.output: list[str] = []
        self.ready = threading.Event()  # Or ended
        self.reader = threading.Thread(target=self._read)
        self.reader.start()

    def _read(self) -> None:
        assert self.process.stdout
        for line in self.process.stdout:
            self.output.append(line)
            if "Application startup complete" in line:
                self.ready.set()
        self.ready.set()

    def end(self) -> None:
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.process.wait(60)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
        self.reader.join()

    def ask(self, messages: Sequence[Message], **options: Any) -> dict[str, Any]:
        body = {"model": "redux", "messages": [write_message(each) for each in messages], "temperature": 0, **options}
        request = urllib.request.Request(
            f"{self.url}/v1/chat/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
        )
        with urllib.request.urlopen(request, timeout=600) as response:
            return json.load(response)


def write_message(message: Message) -> dict[str, Any]:
    parts = [
        {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{base64.b64encode(image).decode()}"}}
        for image in message.images
    ]
    return {"role": message.role, "content": [*parts, {"type": "text", "text": message.text}]}


@contextmanager
def started(folder: Path, methods: str) -> Iterator[Server]:
    server = Server(folder, "--hf-overrides", json.dumps(METHODS[methods]))
    try:
        server.ready.wait()
        assert server.process.poll() is None, "".join(server.output[-60:])
        yield server
    finally:
        server.end()


def picture(seed: int, mode: str = "RGB", rotated: bool = False) -> bytes:
    """A file that vLLM would show otherwise than training if it has transparency or a rotation in its EXIF."""
    noise = np.random.default_rng(seed).integers(0, 256, (40, 60, len(mode)), np.uint8)
    image, file = Image.fromarray(noise), io.BytesIO()
    exif = Image.Exif()
    if rotated:
        exif[0x0112] = 6
    image.save(file, "PNG", exif=exif)
    return file.getvalue()


def conversations() -> list[list[Message]]:
    """Two images in one turn, an image in a later turn, files that need care, and no image."""
    ask, answer = ({"role": role} for role in ("user", "assistant"))
    return [
        [Message(**ask, text="what is the red shape?", images=(picture(0), picture(1)))],
        [
            Message(**ask, text="is there a circle?"),
            Message(**answer, text="yes"),
            Message(**ask, text="what color is it?", images=(picture(2),)),
        ],
        [Message(**ask, text="what is the red shape?", images=(picture(3, "RGBA"),))],
        [Message(**ask, text="what is the red shape?", images=(picture(4, rotated=True),))],
        [Message(**ask, text="what is the red shape?")],
        [Message(role="system", text="yes no"), Message(**ask, text="what is it?", images=(picture(5),))],
    ]


def check_conversations(server: Server, model: ChatModel) -> None:
    for messages in conversations():
        chat = model.encode(messages)
        [expected] = model.generate([chat], [Sampling(max_new_tokens=MAX_NEW_TOKENS)], lambda deltas: ())
        found = server.ask(messages, max_tokens=MAX_NEW_TOKENS)
        assert found["choices"][0]["message"]["content"].strip() == expected.text
        assert found["usage"]["prompt_tokens"] == len(chat.input_ids)


@served
def test_the_server_gives_the_answers_of_the_library(folder: Path) -> None:
    questions, _, numbers = easy_vqa.get_test_questions()
    paths = easy_vqa.get_test_image_paths()
    step = len(questions) // 500
    pairs = [(questions[at], Path(paths[numbers[at]]).read_bytes()) for at in range(0, 500 * step, step)]
    answerer = load(folder, device="cpu", **METHODS["vmtc"])
    expected = [
        text
        for at in range(0, 500, 50)
        for text in answerer(*zip(*pairs[at : at + 50], strict=True), MAX_NEW_TOKENS).texts
    ]
    with started(folder, "vmtc") as server:
        with ThreadPoolExecutor(16) as pool:
            asked = [[Message(role="user", text=text, images=(image,))] for text, image in pairs]
            found = [*pool.map(lambda messages: server.ask(messages, max_tokens=MAX_NEW_TOKENS), asked)]
        check_conversations(server, load_chat_model(folder, device="cpu", **METHODS["vmtc"]))
    texts = [answer["choices"][0]["message"]["content"].strip() for answer in found]
    assert len(set(expected)) > 10
    assert sum(text == other for text, other in zip(texts, expected, strict=True)) >= 495


@served
@pytest.mark.parametrize("methods", ["prumerge", "all tokens"])
def test_the_server_runs_other_numbers_of_tokens(folder: Path, methods: str) -> None:
    with started(folder, methods) as server:
        check_conversations(server, load_chat_model(folder, device="cpu", **METHODS[methods]))


@served
def test_the_server_refuses_cmai_before_it_starts_an_engine(folder: Path) -> None:
    server = Server(folder)
    try:
        server.ready.wait()
        assert server.process.wait() != 0
    finally:
        server.end()
    assert server.output[-1].rstrip().endswith("""without CMAI: --hf-overrides '{"cmai": null}'""")
    assert not any("EngineCore" in line for line in server.output)
