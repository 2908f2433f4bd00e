"""Any image-text-to-text model in lmms-eval, asked as `redux.respondent` asks it.

lmms-eval has adapters of its own for many models.  This one is for LLaVAs with fewer image tokens, for which
transformers' processor would write too many, and for comparing others with them: all are asked in batches, greedily.

Cost: requests are sorted by length, so that batches are padded little; images are read when their batch is due.
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
from redux.generation import Answers
from redux.settings import ImageAspectRatio, TemplateName

MAX_NEW_TOKENS = 1024
"""Where a task does not say, as in lmms-eval's own adapters."""


class Redux(lmms):
    """lmms-eval's model `redux`.

    pretrained: folder, hub id or URL of the model.
    template, fit, allow_mismatch, image, dtype: as `redux.respondent.load` takes them; without them the model is asked
        as it was trained.
    batch_size: prompts that are answered together.
    device: of a single process; of several, as `accelerate launch` starts them, each has its own.
    """

    def __init__(
        self,
        pretrained: str,
        template: TemplateName | None = None,
        image_aspect_ratio: ImageAspectRatio | None = None,
        allow_mismatch: bool = False,
        image_input: ImageInput = "pixels",
        dtype: str | None = None,
        batch_size: int | str = 1,
        max_batch_size: int | None = None,
        device: str | None = None,
    ) -> None:
        super().__init__()
        if not str(batch_size).isdecimal() or int(batch_size) < 1:
            raise ValueError(f"batch_size: got {batch_size}, allowed: at least 1")
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
        """Greedy answers in the order of the requests, each cut off before the first of its task's stops."""
        results: dict[int, GenerationResult] = {}
        batches: list[Answers] = []
        for limit, places in self._batches(requests):
            told = [requests[place].args for place in places]
            images = [self._image(*arguments[2:]) for arguments in told]
            prompts = [_strip_image_token(context) for context, *_ in told]
            batches.append(answers := self.answerer(prompts, images, limit))
            for place, (context, settings, *_), text, tokens in zip(
                places, told, answers.texts, answers.tokens, strict=True
            ):
                text = _cut_at_stop(text, settings)
                results[place] = GenerationResult(text, TokenCounts(output_tokens=tokens))
                self.cache_hook.add_partial("generate_until", (context, settings), text)
        _log_throughput(batches)
        return [results[place] for place in range(len(requests))]

    def loglikelihood(self, requests: Sequence[Instance]) -> list[tuple[float, bool]]:
        """Not to be had: who answers says no likelihoods."""
        raise NotImplementedError("model redux: got a task of loglikelihood, allowed: tasks of generate_until")

    def generate_until_multi_round(self, requests: Sequence[Instance]) -> list[str]:
        """Not to be had: one prompt, one answer."""
        raise NotImplementedError("model redux: got a task of several rounds, allowed: tasks of generate_until")

    def _batches(self, requests: Sequence[Instance]) -> Iterator[tuple[int, list[int]]]:
        """(new tokens at most, places of requests) of each batch, the longest prompts first."""
        keys = [(_max_new_tokens(request.args[1]), self.answerer.count_tokens(request.args[0])) for request in requests]
        order = sorted(range(len(requests)), key=keys.__getitem__, reverse=True)
        for limit, group in groupby(order, key=lambda place: keys[place][0]):
            places = list(group)
            for start in range(0, len(places), self.batch_size):
                yield limit, places[start : start + self.batch_size]

    def _image(self, doc_to_visual: Any, doc_id: int, task: str, split: str) -> bytes | None:
        """The one image of a request, as a file without loss; None where it has none."""
        seen = doc_to_visual(self.task_dict[task][split][doc_id]) if doc_to_visual else None
        if not seen:
            return None
        if len(seen) > 1 or not isinstance(seen[0], Image.Image):
            kinds = ", ".join(type(each).__name__ for each in seen)
            raise ValueError(f"{task}: document {doc_id}: got {kinds}, allowed: one image or none")
        file = io.BytesIO()
        seen[0].convert("RGB").save(file, "PPM")
        return file.getvalue()


def _max_new_tokens(settings: Mapping[str, Any]) -> int:
    """New tokens at most, by a task's generation_kwargs; ValueError where they are not greedy."""
    if settings.get("do_sample") or (settings.get("temperature") or 0) > 0 or (settings.get("num_beams") or 1) > 1:
        raise ValueError(
            f"generation_kwargs: got {dict(settings)}, allowed: do_sample false, temperature 0, num_beams 1"
        )
    return settings.get("max_new_tokens") or MAX_NEW_TOKENS


def _strip_image_token(context: str) -> str:
    """The prompt without a task's own mark for the image, which templates and processors put in."""
    return context.replace(IMAGE_TOKEN, "").strip() if IMAGE_TOKEN in context else context


def _cut_at_stop(text: str, settings: Mapping[str, Any]) -> str:
    stops = settings.get("until") or []
    for stop in [stops] if isinstance(stops, str) else stops:
        text = text.partition(stop)[0] if stop else text
    return text


def _log_throughput(batches: Sequence[Answers]) -> None:
    """Tokens and seconds, as lmms-eval adds them up."""
    tokens = sum(sum(answers.tokens) for answers in batches)
    prefill, decode = (sum(getattr(answers, name) for answers in batches) for name in ("prefill_s", "decode_s"))
    seconds = prefill + decode
    log_metrics(seconds, tokens, tokens / seconds if seconds else 0.0, {"prefill_s": prefill, "decode_s": decode})
