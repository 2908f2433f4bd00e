"""A batch gets the answers that each prompt gets alone, from any family of models, and its tokens and time are told."""

import copy
import io
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import (
    AutoTokenizer,
    Blip2Config,
    Blip2ForConditionalGeneration,
    Blip2Processor,
    BlipImageProcessorPil,
    Idefics3Config,
    Idefics3ForConditionalGeneration,
    Idefics3ImageProcessorPil,
    Idefics3Processor,
    InstructBlipConfig,
    InstructBlipForConditionalGeneration,
    InstructBlipProcessor,
    LlamaConfig,
    LlamaForCausalLM,
    LlavaForConditionalGeneration,
    OPTConfig,
    PaliGemmaConfig,
    PaliGemmaForConditionalGeneration,
    PaliGemmaProcessor,
    PreTrainedTokenizerFast,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    SiglipImageProcessorPil,
    T5Config,
)
from transformers.utils import is_torchvision_available

from redux.adapters import TransformersModel
from redux.answering import Answerer, CaptionThenAnswer, LlavaAnswerer, load
from redux.conversation import TEMPLATES, train_word_tokenizer
from redux.generation import Answers, drop_warm_up
from redux.model import ReduxForConditionalGeneration

WORDS = "USER ASSISTANT : Question Answer User Is it a red circle ? yes no blue green square shape What colour the is ."
SIZE = {"hidden_size": 32, "num_attention_heads": 4, "intermediate_size": 48}
TOWER = {**SIZE, "num_hidden_layers": 2, "image_size": 16, "patch_size": 4}
TURN = (
    "{% for turn in messages %}User:{% for part in turn.content %}"
    "{% if part.type == 'image' %}<image>{% else %}{{ part.text }}{% endif %}"
    "{% endfor %}<end>\n{% endfor %}{% if add_generation_prompt %}Assistant:{% endif %}"
)
PROMPTS = ["Is it a red circle?", "What colour is the shape?", "no", "Is the shape a blue square or a green circle?"]


def picture(seed: int, width: int = 24, height: int = 16) -> bytes:
    noise = np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)
    file = io.BytesIO()
    Image.fromarray(noise).save(file, "PNG")
    return file.getvalue()


IMAGES = [picture(0), picture(1, 16, 40), picture(2), picture(0)]


def words(*special: str) -> PreTrainedTokenizerFast:
    tokenizer = train_word_tokenizer([WORDS], 256)
    tokenizer.add_special_tokens({"extra_special_tokens": ["<image>", *special]})
    return tokenizer


def text(tokenizer: PreTrainedTokenizerFast, **other: Any) -> dict[str, Any]:
    special = {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    return {"vocab_size": len(tokenizer), "num_hidden_layers": 2, **special, **other}


def llama(tokenizer: PreTrainedTokenizerFast) -> dict[str, Any]:
    return LlamaConfig(**SIZE, **text(tokenizer)).to_dict()


def idefics3() -> tuple[Any, Any]:
    tokenizer = words("<fake_token_around_image>", "<end_of_utterance>", "<global-img>")
    edge = {"longest_edge": 16}
    images = Idefics3ImageProcessorPil(size=edge, max_image_size=edge, do_image_splitting=False)
    processor = Idefics3Processor(images, tokenizer, image_seq_len=4, chat_template=TURN)
    image = tokenizer.convert_tokens_to_ids("<image>")
    config = Idefics3Config(text_config=llama(tokenizer), vision_config=TOWER, scale_factor=2, image_token_id=image)
    return Idefics3ForConditionalGeneration(config), processor


def q_former(config: Any, tokenizer: PreTrainedTokenizerFast, language: dict[str, Any]) -> Any:
    return config(
        text_config=language,
        vision_config=TOWER,
        qformer_config={**SIZE, "num_hidden_layers": 2, "vocab_size": len(tokenizer), "pad_token_id": 2},
        num_query_tokens=4,
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
    )


def small() -> BlipImageProcessorPil:
    return BlipImageProcessorPil(size={"height": 16, "width": 16})


def blip2() -> tuple[Any, Any]:
    tokenizer = words()
    sizes = {"hidden_size": 32, "num_attention_heads": 4, "ffn_dim": 48, "word_embed_proj_dim": 32}
    language = OPTConfig(**text(tokenizer, **sizes)).to_dict()
    processor = Blip2Processor(small(), tokenizer, num_query_tokens=4)
    return Blip2ForConditionalGeneration(q_former(Blip2Config, tokenizer, language)), processor


def blip2_t5() -> tuple[Any, Any]:
    """A model with an encoder and a decoder: generated tokens follow a start token, not the prompt."""
    tokenizer = words()
    sizes = {
        "d_model": 32,
        "d_kv": 8,
        "num_heads": 4,
        "d_ff": 48,
        "num_layers": 2,
        "decoder_start_token_id": 2,
        "tie_word_embeddings": False,
    }
    language = T5Config(**text(tokenizer, **sizes)).to_dict()
    processor = Blip2Processor(small(), tokenizer, num_query_tokens=4)
    return Blip2ForConditionalGeneration(q_former(Blip2Config, tokenizer, language)), processor


def instructblip() -> tuple[Any, Any]:
    tokenizer = words()
    processor = InstructBlipProcessor(small(), tokenizer, words(), num_query_tokens=4)
    config = q_former(InstructBlipConfig, tokenizer, llama(tokenizer))
    return InstructBlipForConditionalGeneration(config), processor


def paligemma() -> tuple[Any, Any]:
    tokenizer = words()
    images = SiglipImageProcessorPil(size={"height": 16, "width": 16})
    images.image_seq_length = 16
    processor = PaliGemmaProcessor(images, tokenizer)
    config = PaliGemmaConfig(
        text_config=text(tokenizer, **SIZE, num_key_value_heads=2, head_dim=8, model_type="gemma"),
        vision_config={**TOWER, "model_type": "siglip_vision_model"},
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
        projection_dim=32,
        eos_token_id=tokenizer.eos_token_id,
    )
    return PaliGemmaForConditionalGeneration(config), processor


def qwen2_5_vl() -> tuple[Any, Any]:
    if not is_torchvision_available():
        pytest.skip("torchvision, which the processor of Qwen2.5-VL needs, is not installed")
    from transformers import Qwen2_5_VLProcessor, Qwen2VLImageProcessor, Qwen2VLVideoProcessor

    special = {"image": "<|image_pad|>", "video": "<|video_pad|>", "start": "<|vision_start|>", "end": "<|vision_end|>"}
    tokenizer = words(*special.values())
    ids = {name: tokenizer.convert_tokens_to_ids(token) for name, token in special.items()}
    seen = TURN.replace("<image>", f"{special['start']}{special['image']}{special['end']}")
    patch = {"patch_size": 4, "temporal_patch_size": 2, "merge_size": 2}
    images = Qwen2VLImageProcessor(**patch, min_pixels=64, max_pixels=1024)
    processor = Qwen2_5_VLProcessor(images, tokenizer, Qwen2VLVideoProcessor(**patch), chat_template=seen)
    rope = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [1, 1, 2]}
    tower = {"depth": 1, "hidden_size": 32, "num_heads": 4, "intermediate_size": 48, "patch_size": 4}
    config = Qwen2_5_VLConfig(
        text_config=text(tokenizer, **SIZE, num_key_value_heads=2, rope_parameters=rope),
        vision_config={**tower, "window_size": 16, "out_hidden_size": 32, "fullatt_block_indexes": [0]},
        image_token_id=ids["image"],
        video_token_id=ids["video"],
        vision_start_token_id=ids["start"],
        vision_end_token_id=ids["end"],
    )
    return Qwen2_5_VLForConditionalGeneration(config), processor


FOREIGN = {make.__name__: make for make in (idefics3, blip2, blip2_t5, instructblip, paligemma, qwen2_5_vl)}
CHATS = ("idefics3", "qwen2_5_vl")
every_family = pytest.mark.parametrize("family", ["redux", "llava", *FOREIGN])
every_mixing_family = pytest.mark.parametrize("family", ["redux", "llava", *CHATS])


@pytest.fixture(scope="module")
def folders(
    tiny: Callable[..., ReduxForConditionalGeneration],
    tokenizer: PreTrainedTokenizerFast,
    tmp_path_factory: pytest.TempPathFactory,
) -> Callable[[str], Path]:
    """The folder of a family's model, as transformers saves it: random, but answering each question differently."""
    made: dict[str, Path] = {}

    def make(family: str) -> Path:
        if family not in made:
            torch.manual_seed(0)
            folder = tmp_path_factory.mktemp(family)
            if family in FOREIGN:
                model, processor = FOREIGN[family]()
            else:
                model, processor = (tiny() if family == "redux" else tiny(None, None)), tokenizer
            if family == "llava":  # The very class of transformers, and its configuration
                plain = LlavaForConditionalGeneration(model.config)
                plain.load_state_dict(model.state_dict())
                model = plain
            if family in FOREIGN:
                with torch.no_grad():
                    for name, weight in model.named_parameters():
                        # What T5's decoder is told by its encoder would else drown in its own words.
                        spread = 1.6 if "EncDecAttention" in name else 0.2
                        weight.normal_(std=spread) if weight.dim() > 1 else weight.add_(0.01 * torch.randn_like(weight))
            model.save_pretrained(folder)
            processor.save_pretrained(folder)
            made[family] = folder
        return made[family]

    return make


@pytest.fixture
def asked(folders: Callable[[str], Path]) -> Callable[..., Answerer]:
    return lambda family, **other: load(folders(family), template="vicuna_bare", device="cpu", **other)


def alone(answerer: Answerer, images: Sequence[bytes | None], length: int) -> list[tuple[str, int]]:
    """(text, tokens) of each prompt, asked for itself."""
    said = [answerer([prompt], [image], length) for prompt, image in zip(PROMPTS, images, strict=True)]
    return [(answers.texts[0], answers.tokens[0]) for answers in said]


def pairs(answers: Answers) -> list[tuple[str, int]]:
    return list(zip(answers.texts, answers.tokens, strict=True))


@every_family
def test_a_batch_gets_the_answers_that_each_prompt_gets_alone(asked: Callable[..., Answerer], family: str) -> None:
    answerer = asked(family)
    together = answerer(PROMPTS, IMAGES, 8)
    assert pairs(together) == alone(answerer, IMAGES, 8)
    assert len(set(together.texts)) > 2, "answers that differ, or equality says nothing"
    assert answerer(PROMPTS, [*IMAGES[1:], IMAGES[1]], 8).texts != together.texts, "images are looked at"


@every_mixing_family
def test_prompts_with_and_without_images_mix_in_the_order_asked(asked: Callable[..., Answerer], family: str) -> None:
    answerer = asked(family)
    for images in ([None, IMAGES[0], None, IMAGES[1]], [IMAGES[0], None, None, None], [None] * 4):
        assert pairs(answerer(PROMPTS, images, 8)) == alone(answerer, images, 8)
    assert answerer(PROMPTS, IMAGES, 8).texts != answerer(PROMPTS, [None] * 4, 8).texts


@every_family
def test_an_answer_ends_with_the_first_end_token_and_that_one_counts(
    asked: Callable[..., Answerer], family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    answerer: Any = asked(family)
    raw: list[list[int]] = []
    original = answerer.model.generate

    def recorded(**inputs: Any) -> Any:
        sequences = original(**inputs)
        raw[:] = sequences[:, -8:].tolist()
        return sequences

    monkeypatch.setattr(answerer.model, "generate", recorded)
    answerer.model.generation_config.eos_token_id = [1000]
    assert answerer(PROMPTS, IMAGES, 8).tokens == [8] * 4, "none ends by itself"
    free, end = list(raw), raw[0][3]
    if isinstance(answerer, LlavaAnswerer):
        answerer.tokenizer.eos_token = answerer.tokenizer.convert_ids_to_tokens(end)
    else:
        answerer.model.generation_config.eos_token_id = [end]
    ended = answerer(PROMPTS, IMAGES, 8)
    assert ended.tokens == [row.index(end) + 1 if end in row else 8 for row in free]
    assert 4 >= ended.tokens[0] < 8
    tokenizer = answerer.tokenizer if isinstance(answerer, LlavaAnswerer) else answerer.processor.tokenizer
    for text, row, count in zip(ended.texts, free, ended.tokens, strict=True):
        assert text == tokenizer.decode(row[:count], skip_special_tokens=True).strip()


@every_family
def test_the_time_to_the_first_token_and_from_there_is_told(asked: Callable[..., Answerer], family: str) -> None:
    answerer = asked(family)
    answers = answerer(PROMPTS, IMAGES, 6)
    assert answers.prefill_s > 0
    assert answers.decode_s > 0
    assert answerer(PROMPTS, IMAGES, 1).tokens == [1] * 4


@every_family
def test_a_longer_prompt_is_longer(asked: Callable[..., Answerer], family: str) -> None:
    answerer = asked(family)
    assert answerer.count_tokens(PROMPTS[2]) < answerer.count_tokens(PROMPTS[0]) < answerer.count_tokens(PROMPTS[3])


def test_a_plain_llava_is_read_by_the_class_of_ours(asked: Callable[..., Answerer]) -> None:
    for family, on in (("redux", True), ("llava", False)):
        answerer = asked(family)
        assert isinstance(answerer, LlavaAnswerer)
        assert (answerer.model.config.vmtc is not None) == on


def test_padding_and_cropping_show_different_squares(asked: Callable[..., Answerer]) -> None:
    assert (
        asked("redux", image_aspect_ratio="pad")(PROMPTS, IMAGES, 8).texts
        != asked("redux", image_aspect_ratio="crop")(PROMPTS, IMAGES, 8).texts
    )


@every_mixing_family
def test_the_upper_limit_describes_each_image_once_and_answers_without_it(
    asked: Callable[..., Answerer], family: str
) -> None:
    answerer, batches = asked(family), []

    class Listening:
        def __call__(self, prompts: Sequence[str], images: Sequence[bytes | None], max_new_tokens: int) -> Answers:
            batches.append((list(prompts), list(images), max_new_tokens))
            return answerer(prompts, images, max_new_tokens)

        def count_tokens(self, prompt: str) -> int:
            return answerer.count_tokens(prompt)

    described = CaptionThenAnswer(Listening(), caption_prompt="What colour is the shape?", caption_tokens=5)
    told = described(PROMPTS, [*IMAGES[:3], None], 6)
    descriptions = [answerer(["What colour is the shape?"], [image], 5).texts[0] for image in IMAGES[:3]]
    texts = [*(f"{said}\n{prompt}" for said, prompt in zip(descriptions, PROMPTS, strict=False)), PROMPTS[3]]
    assert batches == [(["What colour is the shape?"] * 3, IMAGES[:3], 5), (texts, [None] * 4, 6)]
    assert told.texts == answerer(texts, [None] * 4, 6).texts
    assert (
        described(PROMPTS[1:2], IMAGES[3:], 6).texts == answerer([f"{descriptions[0]}\n{PROMPTS[1]}"], [None], 6).texts
    ), "IMAGES[3] is IMAGES[0]"
    assert len(batches) == 3, "and so it is not described again"


def test_load_gives_the_upper_limit_where_images_are_described(asked: Callable[..., Answerer]) -> None:
    assert isinstance(asked("redux", image_input="caption"), CaptionThenAnswer)


@pytest.mark.parametrize("family", [family for family in FOREIGN if family not in CHATS])
def test_a_model_that_only_answers_about_images_says_so(asked: Callable[..., Answerer], family: str) -> None:
    with pytest.raises(ValueError, match=r"image: got None, allowed for (blip-2|instructblip|paligemma): an image"):
        asked(family)(PROMPTS, [IMAGES[0], None, None, None], 2)


@every_family
def test_what_is_no_image_is_told(asked: Callable[..., Answerer], family: str) -> None:
    with pytest.raises(ValueError, match="not an image that Pillow knows"):
        asked(family)(PROMPTS[:1], [b"nothing"], 2)


def test_a_language_model_is_no_answerer(tmp_path: Path) -> None:
    LlamaForCausalLM(LlamaConfig(**SIZE, vocab_size=8, num_hidden_layers=1)).save_pretrained(tmp_path)
    with pytest.raises(
        ValueError,
        match=r"model_type: got llama in the config.json of .*, allowed: llava or another image-text-to-text",
    ):
        load(tmp_path)


def test_a_folder_without_a_model_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=f"model_type: got None in the config.json of {tmp_path}, allowed: llava or"):
        load(tmp_path)
    with pytest.raises(ValueError, match=f"model: got {tmp_path}/none, allowed: a folder, hub id or URL of a model"):
        load(tmp_path / "none")


@pytest.mark.parametrize(
    "wrong",
    [{"template": "v0"}, {"image_aspect_ratio": "stretch"}, {"image_input": "guessed"}],
    ids=lambda wrong: next(iter(wrong)),
)
def test_what_load_does_not_know_is_named_before_anything_is_read(
    wrong: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import jaxtyping

    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)
    [(name, value)] = wrong.items()
    with pytest.raises(ValueError, match=f"{name}: got '{value}', allowed: "):
        load(tmp_path / "nothing", **wrong)  # type: ignore[arg-type]


def test_a_model_without_template_or_prompt_of_its_own_is_named(folders: Callable[[str], Path]) -> None:
    model, processor = FOREIGN["idefics3"]()
    processor = copy.deepcopy(processor)
    processor.chat_template = None
    with pytest.raises(ValueError, match="model_type: got idefics3 without a chat template, allowed without: blip-2"):
        TransformersModel(model, processor)


def test_prompts_and_images_are_as_many(asked: Callable[..., Answerer]) -> None:
    for family in ("redux", "idefics3"):
        with pytest.raises(ValueError, match="images: got 3, allowed: as many as prompts, 4"):
            asked(family)(PROMPTS, IMAGES[:3], 2)
        with pytest.raises(ValueError, match="and at least one"):
            asked(family)([], [], 2)


def test_an_image_has_its_place_in_the_template_alone(asked: Callable[..., Answerer]) -> None:
    for image in (IMAGES[0], None):
        with pytest.raises(ValueError, match="prompt: got '<image> is it red', allowed: one without <image>"):
            asked("redux")(["<image> is it red"], [image], 2)


def test_a_tokenizer_without_padding_pads_with_its_end(folders: Callable[[str], Path]) -> None:
    folder = folders("llava")
    whole = load(folder, template="vicuna_bare", device="cpu")
    assert isinstance(whole, LlavaAnswerer)
    bare = AutoTokenizer.from_pretrained(folder)
    bare.pad_token = None
    other = LlavaAnswerer(whole.model, bare, TEMPLATES["vicuna_bare"])
    assert bare.pad_token == bare.eos_token
    assert pairs(other(PROMPTS, IMAGES, 6)) == pairs(whole(PROMPTS, IMAGES, 6))


def test_templates_are_asked_for_by_name(folders: Callable[[str], Path]) -> None:
    folder = folders("redux")
    bare, full = (load(folder, template=name, device="cpu") for name in ("vicuna_bare", "vicuna_v1"))
    assert isinstance(bare, LlavaAnswerer)
    direct = LlavaAnswerer(bare.model, AutoTokenizer.from_pretrained(folder), TEMPLATES["vicuna_v1"])
    assert direct(PROMPTS, IMAGES, 6).texts == full(PROMPTS, IMAGES, 6).texts != bare(PROMPTS, IMAGES, 6).texts


def test_the_first_batch_of_each_size_is_dropped_as_warm_up() -> None:
    batches = [Answers(["a"] * size, [1] * size, float(number), 0.0) for number, size in enumerate((2, 2, 3, 2, 3))]
    assert [answers.prefill_s for answers in drop_warm_up(batches)] == [1, 3, 4]
    assert drop_warm_up(batches[1:3]) == batches[1:3], "no other times"
