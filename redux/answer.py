"""Greedy answers to questions about images; and the paper's upper limit, answers from a description alone.

The upper limit of Table 1 shows what image tokens cost in following instructions: the model first describes the image,
then answers from the description without seeing anything.  The paper gives neither prompt nor length; here both are
arguments, and the description stands where the image stood, before the question.

Cost: one generation for each question; the upper limit one more for each image.
"""

from collections.abc import Sequence

import numpy as np
import torch
from jaxtyping import UInt8
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from redux.conversation import IMAGE, Template, encode, pad
from redux.model import ReduxForConditionalGeneration, normalise

DESCRIBE = "Describe the image in detail."


@torch.inference_mode()
def answer(
    model: ReduxForConditionalGeneration,
    tokenizer: PreTrainedTokenizerBase,
    template: Template,
    questions: Sequence[str],
    images: UInt8[Tensor, "questions 3 height width"] | None,
    max_new_tokens: int,
) -> list[str]:
    """What the model says to each question about its image, or from text alone where `images` is None."""
    shown = f"{IMAGE}\n" if images is not None else ""
    seen = {} if images is None else {"pixel_values": normalise(images.to(model.device)).to(model.dtype)}
    prompts = [
        encode(tokenizer, [{"from": "human", "value": shown + question}], template, model.config.image_seq_length)[0]
        for question in questions
    ]
    mask = pad([np.ones_like(prompt) for prompt in prompts], 0, left=True)
    ids = torch.from_numpy(pad(prompts, tokenizer.pad_token_id, left=True)).to(model.device)
    generated = model.generate(
        input_ids=ids,
        attention_mask=torch.from_numpy(mask).to(model.device),
        **seen,
        max_new_tokens=max_new_tokens,
        eos_token_id=tokenizer.eos_token_id,  # what the templates end with, whatever the checkpoint's own settings say
        do_sample=False,
    )
    decoded = tokenizer.batch_decode(generated[:, ids.shape[1] :], skip_special_tokens=True)
    return [text.strip() for text in decoded]


def answer_from_descriptions(
    model: ReduxForConditionalGeneration,
    tokenizer: PreTrainedTokenizerBase,
    template: Template,
    questions: Sequence[str],
    images: UInt8[Tensor, "images 3 height width"],
    shows: Sequence[int],
    max_new_tokens: int,
    describe: str = DESCRIBE,
    description_tokens: int = 256,
) -> list[str]:
    """The upper limit: what the model says to each question when a description of its own stands for the image.

    shows: number of the image that each question is about; an image is described once.
    """
    asked = [describe] * len(images)
    descriptions = answer(model, tokenizer, template, asked, images, description_tokens)
    told = [f"{descriptions[image]}\n{question}" for image, question in zip(shows, questions, strict=True)]
    return answer(model, tokenizer, template, told, None, max_new_tokens)
