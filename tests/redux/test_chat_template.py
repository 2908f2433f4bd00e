"""A model learns and is asked in the words of its tokenizer's chat template, or the template is refused."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoProcessor, AutoTokenizer, GenerationConfig, PreTrainedTokenizerFast

from redux import answering
from redux.answering import LlavaAnswerer
from redux.chat import ChatModel
from redux.chat_template import derive_template, find_template, set_end_token
from redux.conversation import IGNORE_INDEX, IMAGE_TOKEN, TEMPLATES, encode_conversation
from redux.messages import Message
from redux.processor import build_processor, record_training_format, write_chat_template
from tests.redux.test_processor import as_file, picture

SPECIAL = [
    "<pad>", "<|im_start|>", "<|im_end|>", "<s>", "</s>", "<|begin|>", "<|header|>", "<|eot|>", "<turn>", "<end_turn>",
    IMAGE_TOKEN,
]  # fmt: skip

LOOP = "{% for m in messages %}{{ X }}{% endfor %}"
ASK = "{% if add_generation_prompt %}{{ X }}{% endif %}"


def write(turn: str, ask: str, start: str = "") -> str:
    return start + LOOP.replace("X", turn) + ASK.replace("X", ask)


NO_SYSTEM = "{% if messages[0].role == 'system' %}{{ raise_exception('no system') }}{% endif %}"
CHATML = write(
    r"'<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n'",
    r"'<|im_start|>assistant\n'",
    r"{% if messages[0].role != 'system' %}{{ '<|im_start|>system\nBe kind.<|im_end|>\n' }}{% endif %}",
)
ACCEPTED = {
    "like SmolLM2's": CHATML,
    "like LLaMA 3's": write(
        r"'<|header|>' + m.role + '\n\n' + m.content | trim + '<|eot|>'",
        r"'<|header|>assistant\n\n'",
        "{{ bos_token }}",
    ),
    "like Gemma's": write(
        r"'<turn>' + ('model' if m.role == 'assistant' else m.role) + '\n' + m.content | trim + '<end_turn>\n'",
        r"'<turn>model\n'",
        "{{ bos_token }}" + NO_SYSTEM,
    ),
    "like Mistral's": write(
        "'[INST] ' + m.content + ' [/INST]' if m.role == 'user' else ' ' + m.content + '</s>'",
        "''",
        "{{ bos_token }}" + NO_SYSTEM,
    ),
    "like Zephyr's": write(r"'<|' + m.role + '|>\n' + m.content + '</s>\n'", r"'<|assistant|>\n'"),
    "like Qwen3's": write(
        r"'<|im_start|>' + m.role + '\n' + ('<think>\n\n</think>\n\n' if loop.last and m.role == 'assistant' else '')"
        r" + m.content + '<|im_end|>\n'",
        r"'<|im_start|>assistant\n' + ('<think>\n\n</think>\n\n' if enable_thinking is false else '')",
    ),
    "with the date": write(
        r"'<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n'",
        r"'<|im_start|>assistant\n'",
        r"{{ '<|im_start|>system\nToday is ' + strftime_now('%d %B %Y') + '.<|im_end|>\n' }}",
    ),
}
KIND = pytest.mark.parametrize("kind", ACCEPTED)
REFUSED = {
    "none": ("", "a tokenizer without a chat template"),
    "no end": (
        write(r"m.role + ': ' + m.content + '\n'", "'assistant: '"),
        r"a chat template with '\\n' after an answer",
    ),
    "rewritten": (
        CHATML.replace("m.content", r"m.content | replace('\n', ' ')"),
        "a chat template that rewrites turns",
    ),
    "last turn alone": (
        LOOP.replace("X", "m.content if loop.last"),
        "a chat template that leaves out or repeats a turn",
    ),
    "first turn": (
        CHATML.replace("m.content", r"('Hello!\n' if loop.first else '') + m.content"),
        "a chat template that writes first and later turns differently",
    ),
    "thinks": (
        CHATML.replace("assistant\\n'", "assistant\\n<think>\\n'"),
        "a chat template that asks with .* and writes .* before an answer",
    ),
    "parts alone": (CHATML.replace("m.content", "m.content[0].text"), "a chat template that fails"),
}

TURNS = [
    {"from": "human", "value": f"{IMAGE_TOKEN}\nWhat is it?"},
    {"from": "gpt", "value": "A cat.\n\nYes."},
    {"from": "human", "value": "Why?"},
    {"from": "gpt", "value": "It purrs."},
]


def make_tokenizer(
    chat_template: str, bos_token: str = "<|begin|>", eos_token: str = "</s>"
) -> PreTrainedTokenizerFast:
    """A tokenizer of bytes, whose end token is not that of most chat templates here."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator([], trainer)
    result = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=bos_token,
        eos_token=eos_token,
        pad_token="<pad>",
        extra_special_tokens=[IMAGE_TOKEN],
    )
    result.chat_template = chat_template
    return result


def as_messages(turns: list[dict[str, str]]) -> list[dict[str, str]]:
    roles = {"human": "user", "gpt": "assistant"}
    return [{"role": roles[turn["from"]], "content": turn["value"]} for turn in turns]


@KIND
def test_the_tokens_are_those_of_the_chat_template(kind: str) -> None:
    tokenizer = make_tokenizer(ACCEPTED[kind])
    template = derive_template(tokenizer)
    for count in (1, 2, 3, 4):
        # Qwen3's own template drops earlier blocks.
        turns = TURNS[:count] if kind != "like Qwen3's" else TURNS[: min(count, 2)]
        ids, labels = encode_conversation(tokenizer, turns, template, 1)
        asks = len(turns) % 2 == 1
        on_one_day = ACCEPTED[kind].replace("strftime_now('%d %B %Y')", "'26 July 2024'")
        theirs = tokenizer.apply_chat_template(
            as_messages(turns),
            chat_template=on_one_day,
            add_generation_prompt=asks,
            enable_thinking=False,
            tokenize=False,
        )
        assert ids.tolist() == tokenizer(theirs, add_special_tokens=False)["input_ids"]
        answers = [turn["value"] for turn in turns if turn["from"] == "gpt"]
        learned = tokenizer.decode(labels[labels != IGNORE_INDEX])
        assert learned == "".join(f"{template.answer}{answer}{template.end}" for answer in answers)


@KIND
def test_the_written_template_reads_as_the_same(kind: str) -> None:
    template = derive_template(make_tokenizer(ACCEPTED[kind]))
    tokenizer = make_tokenizer(ACCEPTED[kind])
    tokenizer.chat_template = write_chat_template(template, tokenizer)
    assert derive_template(tokenizer) == template
    text = tokenizer.apply_chat_template(as_messages(TURNS), tokenize=False)
    assert tokenizer(text)["input_ids"] == encode_conversation(tokenizer, TURNS, template, 1)[0].tolist()


@pytest.mark.parametrize("kind", REFUSED)
def test_what_cannot_be_expressed_is_refused(kind: str) -> None:
    chat_template, reason = REFUSED[kind]
    with pytest.raises(ValueError, match=f"^template: got chat for {reason}.*, allowed: vicuna_v1, "):
        find_template("chat", make_tokenizer(chat_template))


def test_other_templates_need_no_chat_template() -> None:
    assert find_template("vicuna_v1", make_tokenizer("")) is TEMPLATES["vicuna_v1"]


def test_an_end_token_that_takes_the_line_break_along_is_learned_with_it() -> None:
    """Special tokens of Phi-3 remove blanks on their right."""
    tokenizer = make_tokenizer(CHATML)
    tokenizer.add_tokens([AddedToken("<|im_end|>", special=True, normalized=False, rstrip=True)], special_tokens=True)
    assert len(tokenizer("<|im_end|>\n")["input_ids"]) == 1
    template = derive_template(tokenizer)
    assert (template.end, template.after) == ("<|im_end|>\n", "")
    set_end_token(tokenizer, template)
    assert tokenizer.eos_token == "<|im_end|>"
    assert len(tokenizer("<|im_end|>\n")["input_ids"]) == 1


def test_the_end_of_a_turn_becomes_the_end_token_and_is_not_decoded() -> None:
    tokenizer = make_tokenizer(CHATML.replace("<|im_end|>", "[end]"))
    tokenizer.add_tokens(["[end]"])
    set_end_token(tokenizer, derive_template(tokenizer))
    assert tokenizer.eos_token == "[end]"
    assert tokenizer.decode(tokenizer("yes[end]")["input_ids"], skip_special_tokens=True) == "yes"


def test_a_system_message_replaces_that_of_the_template_or_is_refused() -> None:
    tokenizer = make_tokenizer(CHATML)
    template = derive_template(tokenizer)
    messages = [{"role": "system", "content": "Be brief."}, *as_messages(TURNS[:1])]
    theirs = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    assert "".join(text for text, _ in template.replace_system("Be brief.").split_spans(TURNS[:1])) == theirs
    tokenizer = make_tokenizer(ACCEPTED["like Gemma's"])
    without = derive_template(tokenizer)
    with pytest.raises(ValueError, match="messages: got a system message, allowed: user and assistant"):
        without.replace_system("Be brief.")
    tokenizer.chat_template = write_chat_template(without, tokenizer)
    with pytest.raises(Exception, match="messages: got role system, allowed: user and assistant"):
        tokenizer.apply_chat_template(messages)


@pytest.mark.parametrize("kind", ["like SmolLM2's", "like LLaMA 3's", "like Mistral's"])
def test_a_saved_model_is_asked_as_it_was_trained(kind: str, tiny: Callable[..., Any], tmp_path: Path) -> None:
    """By redux and by transformers' processor, with several images and several turns."""
    tokenizer, model = make_tokenizer(ACCEPTED[kind]), tiny()
    model.resize_token_embeddings(len(tokenizer))
    model.config.image_token_index = tokenizer.convert_tokens_to_ids(IMAGE_TOKEN)
    expected = derive_template(tokenizer)
    record_training_format(model, tokenizer, "chat", "pad")
    build_processor(model.config, tokenizer).save_pretrained(tmp_path)
    model.save_pretrained(tmp_path)

    end = AutoTokenizer.from_pretrained(tmp_path).convert_tokens_to_ids(expected.end.strip())
    assert GenerationConfig.from_pretrained(tmp_path).eos_token_id == end
    asked = answering.load(tmp_path)
    assert isinstance(asked, LlavaAnswerer)
    assert asked.template == expected
    assert asked.tokenizer.eos_token_id == end
    chat = ChatModel(asked.model, asked.tokenizer, asked.template)
    file = as_file(picture())
    messages = [
        Message(role="user", text="What are these?", images=(file, file)),
        Message(role="assistant", text="Cats."),
        Message(role="user", text="And this?", images=(file,)),
    ]
    as_parts = [
        {
            "role": message.role,
            "content": [{"type": "image", "image": picture()} for _ in message.images]
            + [{"type": "text", "text": message.text}],
        }
        for message in messages
    ]
    processor = AutoProcessor.from_pretrained(tmp_path)
    got = processor.apply_chat_template(as_parts, add_generation_prompt=True, tokenize=True, return_dict=True)
    assert got["input_ids"][0] == chat.encode(messages).input_ids.tolist()
    assert np.count_nonzero(np.array(got["input_ids"][0]) == processor.image_token_id) == 3 * 8
