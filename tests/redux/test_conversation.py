"""Labels cover what the assistant says and nothing else, in the words of LLaVA's own templates."""

from dataclasses import replace

import numpy as np
import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from redux.conversation import (
    EOS_TOKEN,
    IGNORE_INDEX,
    TEMPLATES,
    Template,
    encode_conversation,
    pad_rows,
    train_word_tokenizer,
)

TALK = [
    {"from": "human", "value": "<image>\nIs it a red circle?"},
    {"from": "gpt", "value": "yes, it is."},
    {"from": "human", "value": "What colour is the shape?"},
    {"from": "gpt", "value": "blue"},
]
CAPTION = [{"from": "human", "value": "What is the shape? <image>\n"}, {"from": "gpt", "value": "A blue square."}]


def ids_of(tokenizer: PreTrainedTokenizerFast, text: str) -> list[int]:
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def text_of(template: Template, turns: list[dict]) -> str:
    return "".join(text for text, _ in template.split_spans(turns))


@pytest.mark.parametrize("name", ["vicuna_v1", "vicuna_bare"])
def test_labels_are_the_assistants_words_and_the_end(tokenizer: PreTrainedTokenizerFast, name: str) -> None:
    ids, labels = encode_conversation(tokenizer, TALK, TEMPLATES[name], 3)
    assert labels[labels != IGNORE_INDEX].tolist() == ids_of(tokenizer, "yes, it is.</s> blue</s>")
    assert tokenizer.decode(labels[labels != IGNORE_INDEX]) == "yes, it is. </s> blue </s>"
    assert np.array_equal(ids[labels != IGNORE_INDEX], labels[labels != IGNORE_INDEX])
    # One stretch an answer, right behind "ASSISTANT:".
    starts = np.flatnonzero((labels[1:] != IGNORE_INDEX) & (labels[:-1] == IGNORE_INDEX))
    assert tokenizer.convert_ids_to_tokens(ids[starts]) == ["ASSISTANT:", "ASSISTANT:"]


def test_labels_of_a_caption_are_the_caption_and_its_line_break(tokenizer: PreTrainedTokenizerFast) -> None:
    ids, labels = encode_conversation(tokenizer, CAPTION, TEMPLATES["plain"], 3)
    said = ids_of(tokenizer, "A blue square.\n")
    image = tokenizer.convert_tokens_to_ids("<image>")
    assert ids.tolist() == [tokenizer.bos_token_id, image, image, image, *said]
    assert labels.tolist() == [IGNORE_INDEX] * 4 + said


def test_the_words_are_known_to_the_tokenizer_of_these_tests(tokenizer: PreTrainedTokenizerFast) -> None:
    """Else equal numbers of unknown words would prove nothing."""
    for name, turns in (("vicuna_v1", TALK), ("plain", CAPTION)):
        assert tokenizer.unk_token_id not in encode_conversation(tokenizer, turns, TEMPLATES[name], 1)[0]


@pytest.mark.parametrize("count", [0, 1, 8])
def test_each_image_is_as_many_tokens_as_asked_for(tokenizer: PreTrainedTokenizerFast, count: int) -> None:
    turns = [*TALK[:2], {"from": "human", "value": "<image>\nWhat colour is the shape?"}, TALK[3]]
    ids, labels = encode_conversation(tokenizer, turns, TEMPLATES["vicuna_v1"], count)
    image = ids == tokenizer.convert_tokens_to_ids("<image>")
    assert image.sum() == 2 * count
    assert (labels[image] == IGNORE_INDEX).all()
    once = encode_conversation(tokenizer, turns, TEMPLATES["vicuna_v1"], 1)[0]
    assert ids[~image].tolist() == [number for number in once if number != tokenizer.convert_tokens_to_ids("<image>")]


def test_the_text_is_that_of_llavas_vicuna_v1() -> None:
    """Equal to haotian-liu/LLaVA's conv_vicuna_v1.get_prompt() of a conversation that waits for an answer."""
    turns = [
        {"from": "human", "value": "q"},
        {"from": "gpt", "value": "a"},
        {"from": "human", "value": "q2"},
    ]
    system = (
        "A chat between a curious user and an artificial intelligence assistant. "
        "The assistant gives helpful, detailed, and polite answers to the user's questions."
    )
    assert text_of(TEMPLATES["vicuna_v1"], turns) == f"{system} USER: q ASSISTANT: a</s>USER: q2 ASSISTANT:"
    assert text_of(TEMPLATES["vicuna_bare"], turns) == "USER: q ASSISTANT: a</s>USER: q2 ASSISTANT:"


def test_a_system_message_replaces_that_of_the_template(tokenizer: PreTrainedTokenizerFast) -> None:
    turns = [{"from": "system", "value": "Be brief."}, {"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]
    for name in ("vicuna_v1", "vicuna_bare"):
        assert text_of(TEMPLATES[name], turns) == "Be brief. USER: q ASSISTANT: a</s>"
    assert text_of(TEMPLATES["plain"], turns) == "a\n", "LLaVA's stage 1 has no text besides the caption"
    without = replace(TEMPLATES["vicuna_v1"], system_message=None)
    with pytest.raises(ValueError, match="got a system message, allowed: user and assistant"):
        text_of(without, turns)
    ids, labels = encode_conversation(tokenizer, turns, TEMPLATES["vicuna_v1"], 1)
    learned = labels[labels != IGNORE_INDEX]
    _, plain_labels = encode_conversation(tokenizer, turns[1:], TEMPLATES["vicuna_v1"], 1)
    assert np.array_equal(learned, plain_labels[plain_labels != IGNORE_INDEX])
    assert len(learned) < len(ids)


def test_the_plain_template_keeps_only_the_image_of_what_the_human_says() -> None:
    assert text_of(TEMPLATES["plain"], CAPTION) == "<image>A blue square.\n"
    assert text_of(TEMPLATES["plain"], [{"from": "human", "value": "no image"}, CAPTION[1]]) == "A blue square.\n"


def test_a_question_ends_ready_to_be_answered(tokenizer: PreTrainedTokenizerFast) -> None:
    asked, labels = encode_conversation(tokenizer, TALK[:3], TEMPLATES["vicuna_v1"], 3)
    whole, _ = encode_conversation(tokenizer, TALK, TEMPLATES["vicuna_v1"], 3)
    assert np.array_equal(asked, whole[: len(asked)])
    assert tokenizer.convert_ids_to_tokens(int(asked[-1])) == "ASSISTANT:"
    assert labels[-1] == IGNORE_INDEX


@pytest.mark.parametrize(
    ("turns", "message"),
    [
        (TALK[1:], "turn 1: got role 'gpt', allowed: 'human'"),
        ([TALK[0], TALK[2]], "turn 2: got role 'human', allowed: 'gpt'"),
        ([{"from": "tool", "value": ""}], "turn 1: got role 'tool'"),
        ([*TALK[:2], {"from": "system", "value": ""}], "turn 3: got role 'system', allowed: 'human'"),
    ],
    ids=["gpt first", "human twice", "unknown", "system later"],
)
def test_roles_out_of_turn_are_refused(tokenizer: PreTrainedTokenizerFast, turns: list[dict], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        encode_conversation(tokenizer, turns, TEMPLATES["vicuna_v1"], 3)


def test_a_token_across_the_seam_is_refused_and_named(tokenizer: PreTrainedTokenizerFast) -> None:
    seamless = Template(system="", human="USER: ", assistant="", end="</s>")
    turns = [{"from": "human", "value": "is it red"}, {"from": "gpt", "value": "circle"}]
    with pytest.raises(ValueError, match="token 'redcircle' at character 12 is partly the assistant's"):
        encode_conversation(tokenizer, turns, seamless, 1)


@pytest.fixture(scope="module")
def smol() -> PreTrainedTokenizerFast:
    """A tokenizer of SmolLM2's kind: bytes, no token before the text, and an end of another name than Vicuna's."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<image>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator([], trainers.BpeTrainer(special_tokens=special, initial_alphabet=alphabet))
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<|im_end|>", pad_token="<|endoftext|>", extra_special_tokens=["<image>"]
    )


@pytest.mark.parametrize("name", ["vicuna_v1", "vicuna_bare"])
def test_an_answer_ends_with_the_tokenizers_own_end(smol: PreTrainedTokenizerFast, name: str) -> None:
    ids, labels = encode_conversation(smol, TALK, TEMPLATES[name], 3)
    said = labels[labels != IGNORE_INDEX]
    assert smol.decode(said) == " yes, it is.<|im_end|> blue<|im_end|>"
    assert (said == smol.eos_token_id).sum() == (ids == smol.eos_token_id).sum() == 2
    assert labels[-1] == smol.eos_token_id
    assert EOS_TOKEN not in smol.decode(ids)


def test_a_template_without_the_end_of_text_keeps_its_own(smol: PreTrainedTokenizerFast) -> None:
    ids, labels = encode_conversation(smol, CAPTION, TEMPLATES["plain"], 3)
    assert smol.decode(labels[labels != IGNORE_INDEX]) == "A blue square.\n"
    assert smol.eos_token_id not in ids


def test_where_the_end_has_vicunas_name_the_text_is_vicunas(tokenizer: PreTrainedTokenizerFast) -> None:
    for name in TEMPLATES:
        spans = list(TEMPLATES[name].split_spans(TALK, str(tokenizer.eos_token)))
        assert spans == list(TEMPLATES[name].split_spans(TALK))


@pytest.mark.parametrize("length", [30, 40, 50, 1000])
def test_a_long_conversation_is_cut_off_after_its_images_are_counted(
    tokenizer: PreTrainedTokenizerFast, length: int
) -> None:
    """Like LLaVA's prepare_inputs_labels_for_multimodal with tokenizer_model_max_length."""
    whole = encode_conversation(tokenizer, [*TALK, *TALK[2:] * 6], TEMPLATES["vicuna_bare"], 16)
    assert 50 < len(whole[0]) < 1000
    for cut, column in zip(
        encode_conversation(tokenizer, [*TALK, *TALK[2:] * 6], TEMPLATES["vicuna_bare"], 16, length), whole, strict=True
    ):
        assert np.array_equal(cut, column[:length])


@pytest.mark.parametrize(
    ("turns", "length", "message"),
    [
        (TALK, 10, r"\d+ tokens, cut off after 10 within or before the image"),
        ([TALK[2], TALK[3], *TALK[:2]], 14, r"\d+ tokens, cut off after 14 within or before the image"),
        (TALK, 25, r"\d+ tokens, cut off after 25 before any answer"),
    ],
    ids=["within the image", "before the image", "within the question"],
)
def test_a_cut_leaves_the_image_whole_and_something_to_learn(
    tokenizer: PreTrainedTokenizerFast, turns: list[dict], length: int, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        encode_conversation(tokenizer, turns, TEMPLATES["vicuna_bare"], 16, length)


@pytest.mark.parametrize("left", [False, True])
def test_padding_fills_one_side(left: bool) -> None:
    rows = [np.array([1, 2, 3]), np.array([4]), np.array([], dtype=np.int64)]
    expected = [[1, 2, 3], [9, 9, 4], [9, 9, 9]] if left else [[1, 2, 3], [4, 9, 9], [9, 9, 9]]
    padded = pad_rows(rows, 9, left=left)
    assert padded.dtype == np.int64
    assert padded.tolist() == expected


TEXTS = ["b a a. c c", "USER: a c? ASSISTANT: b, c!\na"]


def test_a_word_tokenizer_is_the_same_again_in_whatever_order_its_texts_come() -> None:
    vocabularies = [train_word_tokenizer(texts, 64).get_vocab() for texts in (TEXTS, TEXTS, TEXTS[::-1])]
    assert vocabularies[0] == vocabularies[1] == vocabularies[2]
    ordered = sorted(vocabularies[0], key=vocabularies[0].__getitem__)
    # Special tokens; then by count, and by alphabet where counts are equal.
    assert ordered[:5] == ["<unk>", "<s>", "<pad>", "</s>", "<image>"]
    assert ordered[5:8] == ["a", "c", "b"]


def test_a_word_tokenizer_gives_back_what_it_read() -> None:
    tokenizer = train_word_tokenizer(TEXTS, 64)
    ids = tokenizer("a c? b, c!")["input_ids"]
    assert ids[0] == tokenizer.bos_token_id
    assert tokenizer.unk_token_id not in ids
    assert tokenizer.decode(ids, skip_special_tokens=True) == "a c? b, c!"
    tokens = tokenizer.convert_ids_to_tokens(tokenizer("a\n<image>USER: x")["input_ids"])
    assert tokens == ["<s>", "a", "\n", "<image>", "USER:", "<unk>"]


def test_the_end_is_not_number_two_where_clip_would_pool_at_the_largest_id() -> None:
    tokenizer = train_word_tokenizer(TEXTS, 64)
    assert tokenizer.eos_token == "</s>"
    assert tokenizer.eos_token_id != 2
    assert len({tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id, tokenizer.unk_token_id}) == 4
    assert tokenizer.model_max_length == 64
