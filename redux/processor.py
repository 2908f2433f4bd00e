"""Processor and chat template that are saved with a model, so that every program prompts it as in training.

Training reads conversations by `redux.conversation.encode_conversation` and images by `redux.image.load_pixels`.
Programs that load the saved folder (transformers, vLLM) use a processor: a chat template for the text, an image
processor for the pixels, and the number of image tokens. The processor built here gives the same token ids and pixels.

transformers' LlavaProcessor counts one token for each patch, plus `num_additional_image_tokens`. With compression that
number is negative, so that the sum is the number of tokens of the compressed image.
"""

import json
from typing import Any

from transformers import CLIPImageProcessorPil, GenerationConfig, LlavaProcessor, PreTrainedTokenizerBase
from transformers.models.llava.image_processing_pil_llava import LlavaImageProcessorPil

from redux.chat_template import find_template, set_end_token
from redux.configuration import ReduxConfig
from redux.conversation import EOS_TOKEN, IMAGE_TOKEN, Template
from redux.image import CLIP_MEAN, CLIP_STD
from redux.model import ReduxForConditionalGeneration
from redux.settings import ImageAspectRatio, TemplateName


def write_chat_template(template: Template, tokenizer: PreTrainedTokenizerBase) -> str | None:
    """Write a conversation template as Jinja text for `apply_chat_template`.

    The content of a message is a string or a list of parts. Each image part becomes `<image>` and a newline before
    the turn's text. A first message with role system replaces the template's system prompt, if there can be one.

    Returns:
        None for "plain", the template of captions, which has no questions.
    """
    if not template.human:
        return None
    text = {
        "bos": "" if template.has_special_tokens else _bos_in_template(tokenizer),
        "system": template.system,
        "human": template.human,
        "assistant": template.assistant,
        "answer": template.answer,
        "end": template.end.replace(EOS_TOKEN, tokenizer.eos_token or EOS_TOKEN) + template.after,
        "image": IMAGE_TOKEN,
        "gap": _text_after_image(tokenizer),
    }
    # JSON strings are Jinja literals, so quotes and line breaks in a template are safe.
    literal = {name: _write_literal(value) for name, value in text.items()}
    literal["strip"] = " | trim" if template.strips else ""
    literal["system_message"] = f"raise_exception({_write_literal(NO_SYSTEM_MESSAGE)})"
    if template.system_message:
        before, after = map(_write_literal, template.system_message)
        literal["system_message"] = f"{before} ~ text_of(messages[0].content){literal['strip']} ~ {after}"
    return _CHAT_TEMPLATE % literal


def _write_literal(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)


NO_SYSTEM_MESSAGE = "messages: got role system, allowed: user and assistant"


_CHAT_TEMPLATE = """\
{%%- macro text_of(content) -%%}
{%%- if content is string -%%}{{ content }}
{%%- else -%%}{%%- for part in content if part.type == "text" -%%}{{ part.text }}{%%- endfor -%%}{%%- endif -%%}
{%%- endmacro -%%}
{%%- macro images_of(content, text) -%%}
{%%- if content is not string -%%}{%%- for part in content if part.type == "image" -%%}
{{- %(image)s -}}{%%- if text or not loop.last -%%}{{- %(gap)s ~ "\n" -}}{%%- endif -%%}
{%%- endfor -%%}{%%- endif -%%}
{%%- endmacro -%%}
{{- %(bos)s -}}
{%%- if messages and messages[0].role == "system" -%%}
{{- %(system_message)s -}}
{%%- else -%%}
{{- %(system)s -}}
{%%- endif -%%}
{%%- for message in messages -%%}
{%%- if message.role == "user" -%%}
{{- %(human)s -}}
{%%- set text = text_of(message.content)%(strip)s -%%}
{%%- set images = images_of(message.content, text | trim) -%%}
{{- images ~ text | trim if images else text -}}
{%%- if not loop.last or add_generation_prompt -%%}{{- %(assistant)s -}}{%%- endif -%%}
{%%- elif message.role == "assistant" -%%}
{{- %(answer)s ~ text_of(message.content)%(strip)s ~ %(end)s -}}
{%%- endif -%%}
{%%- endfor -%%}
"""


def _bos_in_template(tokenizer: PreTrainedTokenizerBase) -> str:
    """Return the token that the tokenizer puts before a text, to be written into the template.

    `apply_chat_template` adds no special tokens. The result is "" if the written token gives other ids.
    """
    probe = "USER: a"
    default_ids = tokenizer(probe)["input_ids"]
    plain_ids = tokenizer(probe, add_special_tokens=False)["input_ids"]
    bos = tokenizer.bos_token
    if default_ids == plain_ids or not bos:
        return ""
    return bos if tokenizer(bos + probe, add_special_tokens=False)["input_ids"] == default_ids else ""


def _text_after_image(tokenizer: PreTrainedTokenizerBase) -> str:
    """Find the text between an image and the text after it that gives the ids of `encode_conversation`.

    SentencePiece puts a blank before a text, and `encode_conversation` tokenizes the text after an image separately.
    Vicuna's tokenizer adds the blank only at the start of the whole text, so here the blank must be written.
    """
    text = "\na"
    expected = [tokenizer.convert_tokens_to_ids(IMAGE_TOKEN), *tokenizer(text, add_special_tokens=False)["input_ids"]]
    return next(
        (
            gap
            for gap in ("", " ")
            if tokenizer(IMAGE_TOKEN + gap + text, add_special_tokens=False)["input_ids"] == expected
        ),
        "",
    )


def build_processor(config: ReduxConfig, tokenizer: PreTrainedTokenizerBase) -> LlavaProcessor:
    """Build the processor of a model from the format in its configuration.

    Its chat template replaces the tokenizer's own, which knows no images. `find_template` reads "chat" from either.
    """
    size = config.vision_config.image_size
    template = None
    if config.conversation_template:
        template = write_chat_template(find_template(config.conversation_template, tokenizer), tokenizer)
    # Programs that load the tokenizer alone find the same template.
    tokenizer.chat_template = template
    options: dict[str, Any] = {
        "size": {"shortest_edge": size},
        "crop_size": {"height": size, "width": size},
        "image_mean": list(CLIP_MEAN),
        "image_std": list(CLIP_STD),
    }
    pads = config.image_aspect_ratio == "pad"
    # transformers subtracts one token for "default", since it counts the class token among the additional ones.
    removes_class_token = config.vision_feature_select_strategy == "default"
    return LlavaProcessor(
        image_processor=LlavaImageProcessorPil(do_pad=True, **options) if pads else CLIPImageProcessorPil(**options),
        tokenizer=tokenizer,
        patch_size=config.vision_config.patch_size,
        vision_feature_select_strategy=config.vision_feature_select_strategy,
        num_additional_image_tokens=config.image_seq_length - config.num_patches + removes_class_token,
        image_token=IMAGE_TOKEN,
        chat_template=template,
    )


def record_training_format(
    model: ReduxForConditionalGeneration,
    tokenizer: PreTrainedTokenizerBase,
    template: TemplateName,
    image_aspect_ratio: ImageAspectRatio,
) -> None:
    """Record the training format in a model's configuration, and greedy generation settings.

    Args:
        model: model to change.
        tokenizer: its tokenizer, whose special tokens end and pad answers. Its end token becomes that of the template.
        template: name of the conversation template.
        image_aspect_ratio: "pad" or "crop".
    """
    set_end_token(tokenizer, find_template(template, tokenizer))
    model.config.conversation_template, model.config.image_aspect_ratio = template, image_aspect_ratio
    special = {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    # Answers are greedy, whatever the language model's own settings were.
    model.generation_config = GenerationConfig(do_sample=False, **special)
