"""A model of lmms-eval for every image-text-to-text model, which is asked through `redux.answering`.

lmms-eval has adapters for many models. This one is for LLaVAs with fewer image tokens, for which transformers'
processor would write too many, and for models to compare with them. All answer in batches, greedily.

Cost: requests are sorted by length, so that batches have little padding. Images are read when their batch is next.
"""

import io
from collections.abc import Iterator, Mapping, Sequence
from itertools import groupby
from typing import Any

from accelerate import Accelerator
from lmms_eval.api.instance import GenerationResult, Instance, TokenCounts
from lmms_eval.api.model import lmms
from lmms_eval.models.model_utils.gen_metrics import log_metrics
from PIL import Image

from redux.answering import ImageInput, load
from redux.conversation import IMAGE_TOKEN
from redux.generation import Answers, drop_warm_up
from redux.kernels import set_kernels
from redux.settings import ImageAspectRatio, KernelChoice, TemplateName

MAX_NEW_TOKENS = 1024
"""Default for tasks without a limit, as in lmms-eval's adapters."""


class Redux(lmms):
    """lmms-eval's model `redux`.

    Args:
        pretrained: folder, hub id or URL of the model.
        template, image_aspect_ratio, allow_mismatch, image_input, dtype: as for `redux.answering.load`. By default the
            model is asked as it was trained.
        batch_size: prompts in a batch.
        max_batch_size: ignored; lmms-eval passes it to every model.
        kernels: choice between fused kernels and plain code, as for `redux.set_kernels`.
        device: device of a single process. Of several processes, as `accelerate launch` starts them, each takes its
            own.
    """

    def __init__(
        self,
        pretrained: str,
        template: TemplateName | None = None,
        image_aspect_ratio: ImageAspectRatio | None = None,
        allow_mismatch: bool = False,
        image_input: ImageInput = "pixels",
        dtype: str | None = None,
        kernels: KernelChoice = "auto",
        batch_size: int | str = 1,
        max_batch_size: int | None = None,
        device: str | None = None,
    ) -> None:
        super().__init__()
        if not str(batch_size).isdecimal() or int(batch_size) < 1:
            raise ValueError(f"batch_size: got {batch_size}, allowed: at least 1")
        set_kernels(kernels)
        self.batch_size = int(batch_size)
        self.accelerator = Accelerator()
        self._rank, self._world_size = self.accelerator.process_index, self.accelerator.num_processes
        self.answerer = load(
            pretrained,
            template=template,
            image_aspect_ratio=image_aspect_ratio,
            allow_mismatch=allow_mismatch,
            image_input=image_input,
            dtype=dtype,
            device=self.accelerator.device if self._world_size > 1 else device,
        )

    def generate_until(self, requests: Sequence[Instance]) -> list[GenerationResult]:
        """Answer requests greedily, in their order; each answer is cut before the first stop text of its task."""
        results: dict[int, GenerationResult] = {}
        batches: list[Answers] = []
        for limit, positions in self._batches(requests):
            arguments = [requests[position].args for position in positions]
            images = [self._encode_image(*request_arguments[2:]) for request_arguments in arguments]
            prompts = [_strip_image_token(context) for context, *_ in arguments]
            answers = self.answerer(prompts, images, limit)
            batches.append(answers)
            for position, (context, settings, *_), text, tokens in zip(
                positions, arguments, answers.texts, answers.tokens, strict=True
            ):
                text = _cut_at_stop(text, settings)
                results[position] = GenerationResult(text, TokenCounts(output_tokens=tokens))
                self.cache_hook.add_partial("generate_until", (context, settings), text)
        _log_throughput(batches)
        return [results[position] for position in range(len(requests))]

    def loglikelihood(self, requests: Sequence[Instance]) -> list[tuple[float, bool]]:
        """Raise NotImplementedError: an Answerer computes no likelihoods."""
        raise NotImplementedError("model redux: got a task of loglikelihood, allowed: tasks of generate_until")

    def generate_until_multi_round(self, requests: Sequence[Instance]) -> list[str]:
        """Raise NotImplementedError: an Answerer answers single prompts."""
        raise NotImplementedError("model redux: got a task of several rounds, allowed: tasks of generate_until")

    def _batches(self, requests: Sequence[Instance]) -> Iterator[tuple[int, list[int]]]:
        """Yield (limit of new tokens, positions of requests) of each batch, the longest prompts first."""
        keys = [(_max_new_tokens(request.args[1]), self.answerer.count_tokens(request.args[0])) for request in requests]
        # The longest first, so that a lack of memory shows at once.
        order = sorted(range(len(requests)), key=keys.__getitem__, reverse=True)
        # A batch has one limit, so requests are grouped by it.
        for limit, group in groupby(order, key=lambda position: keys[position][0]):
            positions = list(group)
            for start in range(0, len(positions), self.batch_size):
                yield limit, positions[start : start + self.batch_size]

    def _encode_image(self, doc_to_visual: Any, doc_id: int, task: str, split: str) -> bytes | None:
        """Encode the image of a request without loss; None without an image, ValueError for several."""
        visuals = doc_to_visual(self.task_dict[task][split][doc_id]) if doc_to_visual else None
        if not visuals:
            return None
        if len(visuals) > 1 or not isinstance(visuals[0], Image.Image):
            kinds = ", ".join(type(visual).__name__ for visual in visuals)
            raise ValueError(f"{task}: document {doc_id}: got {kinds}, allowed: one image or none")
        file = io.BytesIO()
        # PPM is lossless, and takes no time to compress.
        visuals[0].convert("RGB").save(file, "PPM")
        return file.getvalue()


def _max_new_tokens(settings: Mapping[str, Any]) -> int:
    """Return the limit of new tokens in a task's generation_kwargs; ValueError unless they are greedy."""
    if settings.get("do_sample") or (settings.get("temperature") or 0) > 0 or (settings.get("num_beams") or 1) > 1:
        raise ValueError(
            f"generation_kwargs: got {dict(settings)}, allowed: do_sample false, temperature 0, num_beams 1"
        )
    return settings.get("max_new_tokens") or MAX_NEW_TOKENS


def _strip_image_token(context: str) -> str:
    """Remove a task's own `<image>` from the prompt, since templates and processors add it."""
    return context.replace(IMAGE_TOKEN, "").strip() if IMAGE_TOKEN in context else context


def _cut_at_stop(text: str, settings: Mapping[str, Any]) -> str:
    stops = settings.get("until") or []
    for stop in [stops] if isinstance(stops, str) else stops:
        text = text.partition(stop)[0] if stop else text
    return text


def _log_throughput(batches: Sequence[Answers]) -> None:
    """Log tokens and seconds in the form that lmms-eval adds up, without those of warm-up."""
    batches = drop_warm_up(batches)
    tokens = sum(sum(answers.tokens) for answers in batches)
    prefill, decode = (sum(getattr(answers, name) for answers in batches) for name in ("prefill_s", "decode_s"))
    seconds = prefill + decode
    log_metrics(seconds, tokens, tokens / seconds if seconds else 0.0, {"prefill_s": prefill, "decode_s": decode})
