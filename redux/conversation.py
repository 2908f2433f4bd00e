"""From a LLaVA conversation to token ids and labels.

The whole conversation is tokenised once, and labels follow from the character spans of the assistant's text.  LLaVA
tokenises pieces and adds up their lengths; where a tokenizer merges across a seam, the lengths disagree and the sample
is silently masked.  Here a token that straddles a span is an error that names it.

A conversation is a list of turns {"from": "human" | "gpt", "value": text} in which `<image>` stands for the image.
Wherever it stands in its turn, it is read as LLaVA's trainer reads it: at the front, on a line of its own.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from redux.settings import TemplateName

IMAGE_TOKEN = "<image>"
EOS_TOKEN = "</s>"
"""Vicuna's end of text.  In a template it stands for that of the tokenizer at hand, whatever its name there."""

IGNORE_INDEX = -100
"""Label of tokens that are not predicted, as torch's cross-entropy ignores it."""

CLIP_MAX_LENGTH = 77
"""Tokens of a caption that CLIP's text tower reads at most."""


@dataclass(frozen=True, kw_only=True)
class Template:
    """How turns become text.  The assistant's text and its `end` are what the model learns to say.

    system: opens the conversation.  human, assistant: stand before a turn of that role.  end: closes the assistant's.
    An EOS in `end` is the tokenizer's own.
    """

    system: str
    human: str
    assistant: str
    end: str

    def spans(self, turns: Sequence[dict], eos: str = EOS_TOKEN) -> Iterator[tuple[str, bool]]:
        """(text, learned) pieces whose concatenation is the conversation.

        ValueError where roles do not alternate human, gpt, human, ...
        """
        end = self.end.replace(EOS_TOKEN, eos)
        yield self.system, False
        for number, turn in enumerate(turns):
            role = ("human", "gpt")[number % 2]
            if turn["from"] != role:
                raise ValueError(f"turn {number + 1}: got role {turn['from']!r}, allowed: {role!r}")
            text = move_image_to_front(turn["value"])
            if role == "human":
                yield self.human + self.question(text), False
                yield self.assistant, False
            else:
                yield f" {text}{end}" if self.assistant else text + end, True

    def question(self, text: str) -> str:
        """A human turn's text; LLaVA's stage 1 (an empty `human`) discards all of it but the image."""
        if self.human:
            return text
        return IMAGE_TOKEN if IMAGE_TOKEN in text else ""


def move_image_to_front(text: str) -> str:
    r"""Move `<image>` to the front of its turn, as LLaVA's trainer does before anything else.

    It then stands there once, and the rest of the turn on the next line, trimmed.  A turn without it stays as it is.

    >>> move_image_to_front("What is this? <image>\n")
    '<image>\nWhat is this?'
    >>> move_image_to_front(" no image ")
    ' no image '
    """
    if IMAGE_TOKEN not in text:
        return text
    return f"{IMAGE_TOKEN}\n{text.replace(IMAGE_TOKEN, '').strip()}".strip()


VICUNA_SYSTEM = (
    "A chat between a curious user and an artificial intelligence assistant. The assistant gives helpful, detailed, "
    "and polite answers to the user's questions. "
)
TEMPLATES: dict[TemplateName, Template] = {
    "plain": Template(system="", human="", assistant="", end="\n"),
    "vicuna_v1": Template(system=VICUNA_SYSTEM, human="USER: ", assistant=" ASSISTANT:", end=EOS_TOKEN),
    "vicuna_bare": Template(system="", human="USER: ", assistant=" ASSISTANT:", end=EOS_TOKEN),
}
"""LLaVA-1.5's two templates (haotian-liu/LLaVA, conversation.py), and vicuna_v1 without its system prompt."""


def encode_conversation(
    tokenizer: PreTrainedTokenizerBase,
    turns: Sequence[dict],
    template: Template,
    image_tokens: int,
    length: int | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """(input_ids, labels) of a conversation, each (length,) int64; labels are IGNORE but for what the assistant says.

    Each `<image>` becomes `image_tokens` tokens.  A conversation that ends with a human turn ends ready to be answered.
    length: tokens after which it is cut off, those of images counted, as LLaVA does; None leaves it whole.
    ValueError where the cut would go through an image, or leave nothing of what the assistant says.
    """
    pieces = list(template.spans(turns, tokenizer.eos_token or EOS_TOKEN))
    text = "".join(piece for piece, _ in pieces)
    ids, start, end = _tokenize(tokenizer, text)
    # characters that the assistant says before each place; a token's own are the difference of two
    spoken = np.cumsum([0, *np.repeat([said for _, said in pieces], [len(piece) for piece, _ in pieces])])
    said = spoken[end] - spoken[start]
    if (torn := np.flatnonzero((said > 0) & (said < end - start))).size:
        first = slice(start[torn[0]], end[torn[0]])
        raise ValueError(f"token {text[first]!r} at character {first.start} is partly the assistant's, partly not")
    image = tokenizer.convert_tokens_to_ids(IMAGE_TOKEN)
    labels = np.where((said > 0) & (ids != image), ids, IGNORE_INDEX)  # nobody can say an image
    repeats = np.where(ids == image, image_tokens, 1)
    ids, labels = ids.repeat(repeats), labels.repeat(repeats)
    if length is None or len(ids) <= length:
        return ids, labels
    if (ids[length:] == image).any():
        raise ValueError(f"{len(ids)} tokens, cut off after {length} within or before the image")
    if (labels[:length] == IGNORE_INDEX).all():  # a batch of such would have no loss
        raise ValueError(f"{len(ids)} tokens, cut off after {length} before any answer")
    return ids[:length], labels[:length]


def _tokenize(tokenizer: PreTrainedTokenizerBase, text: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Tokenise a text with images; returns ids, and the first character of each token and the one after its last.

    The text between images is tokenised piece by piece, as in LLaVA's tokenizer_image_token: SentencePiece puts a blank
    before a text, which LLaVA's models have learned behind each image.
    """
    parts = text.split(IMAGE_TOKEN)
    image = tokenizer.convert_tokens_to_ids(IMAGE_TOKEN)
    ids, spans, first = [], [], 0
    for number, part in enumerate(parts):
        # what opens a text opens only the first piece
        encoded = tokenizer(part, add_special_tokens=number == 0, return_offsets_mapping=True)
        ids += encoded["input_ids"]
        spans += [(first + start, first + end) for start, end in encoded["offset_mapping"]]
        first += len(part) + len(IMAGE_TOKEN)
        if number < len(parts) - 1:
            ids.append(image)
            spans.append((first - len(IMAGE_TOKEN), first))
    start, end = np.asarray(spans, np.int64).reshape(-1, 2).T
    return np.asarray(ids, np.int64), start, end


def pad_rows(rows: Sequence[np.ndarray], value: int, left: bool = False) -> np.ndarray:
    """(rows, longest) array, filled up with `value`."""
    result = np.full((len(rows), max(map(len, rows))), value, np.int64)
    for line, row in zip(result, rows, strict=True):
        line[len(line) - len(row) if left else 0 :][: len(row)] = row
    return result


def train_word_tokenizer(texts: Iterable[str], length: int) -> PreTrainedTokenizerFast:
    """A tokenizer of whole words and marks, learned from `texts`; words are numbered by count, then alphabet.

    For small closed vocabularies such as easy-VQA's: one token a word keeps conversations short.
    """
    # "</s>" must not be number 2: transformers' CLIP text tower then pools at the largest id instead of at the end
    special = ["<unk>", "<s>", "<pad>", "</s>", IMAGE_TOKEN]
    tokenizer = Tokenizer(models.WordLevel(unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Replace(Regex(" +"), " ")
    # what means something together stays together, such as I'm and <<: decoding puts blanks between tokens
    tokenizer.pre_tokenizer = pre_tokenizers.Split(
        Regex(r"\n|\w+'\w+|\w+:?|<<|>>|\*{6}|[^\w\s]"), "removed", invert=True
    )
    tokenizer.decoder = decoders.WordPiece(prefix="##")
    tokenizer.train_from_iterator(texts, trainers.WordLevelTrainer(special_tokens=special, show_progress=False))
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        unk_token="<unk>",
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        extra_special_tokens=[IMAGE_TOKEN],
        model_max_length=length,
        padding_side="right",
    )
