"""CMAI in any image-text-to-text model of transformers whose language model decodes images and text in one sequence.

A few hooks, no subclass and no second `forward` or `generate`: transformers asks for nothing else.

1. The token ids that a model, or the base model within it, is called with tell which tokens are of an image.  The
   `generate` of Q-Former models goes to their language model past their `forward`; there the ids that are embedded tell
   the same.
2. Before the decoder runs, `inhibition` joins its keyword arguments, which transformers hands down to the attention
   function.  Its cache has to be a `FocusCache`: an empty `DynamicCache`, as `generate` makes it, becomes one in place,
   so whoever made it goes on with the same object.
3. After the model ran, or failed, its ids are forgotten: embeddings of unknown origin are refused.

The ids belong to a call, not to the model: threads may call one model at once, and models may call others.  A hook
reads what it needs from the module that it is called for, so hooks are copied, pickled and replicated with their
modules, each alone.  They cost one comparison of the token ids a call, beside what CMAI itself costs (see
`redux.cmai`).  Modules inside the decoder have none: recomputed activations see the same `inhibition`.
"""

import threading
from dataclasses import asdict, dataclass, field
from typing import Any, NamedTuple
from uuid import uuid4

import torch
from jaxtyping import Bool, Int
from torch import Tensor, nn
from transformers import DynamicCache, GenerationMixin, PreTrainedModel

from redux.cmai import ATTENTION_NAME, FocusCache, Inhibition
from redux.settings import CMAI

IMAGE_TOKEN_FIELDS = ("image_token_id", "video_token_id")
"""Where a model's configuration has the ids of tokens that stand for pieces of an image."""


def inhibit(model: PreTrainedModel, cmai: CMAI | None) -> None:
    """Turns CMAI on in an image-text-to-text model, or other settings of it; None turns it off again.

    Off again, the model is what it was before.  A model of ours is saved with its settings.  ValueError for a model
    that CMAI cannot work in: one without image tokens, or whose language model is an encoder-decoder, forgets keys,
    attends to images by cross-attention, or does not use AttentionInterface.
    """
    if not isinstance(cmai, CMAI | None):
        raise ValueError(f"cmai: got {cmai!r}, allowed: redux.CMAI, or None to turn it off")
    if cmai is not None:
        _check_compatible(model)
    if hasattr(model, "_inhibitor"):
        model._inhibitor.remove(model)
        del model._inhibitor
    if cmai is not None:
        model._inhibitor = _Inhibitor.on(model, cmai)
    if hasattr(model.config, "cmai"):
        model.config.cmai = asdict(cmai) if cmai else None


def _check_compatible(model: PreTrainedModel) -> None:
    """ValueError where CMAI has nothing to do, or would do it wrong without a word."""
    kind = type(model).__name__
    if not _image_token_ids(model):
        raise ValueError(f"image_token_id: got None in the configuration of {kind}, allowed: the id of image tokens")
    text = model.config.get_text_config()
    if text.is_encoder_decoder:
        raise ValueError(f"is_encoder_decoder: got True in the language model of {kind}, allowed: False")
    if getattr(text, "cross_attention_layers", None):
        raise ValueError(f"cross_attention_layers: got some in {kind}, allowed: images and text in one sequence")
    forgetful = {type(layer).__name__ for layer in DynamicCache(config=text).layers} - {"DynamicLayer"}
    if forgetful:
        raise ValueError(f"cache: got {', '.join(sorted(forgetful))}, allowed: DynamicLayer, which forgets no token")
    decoder = model.get_decoder()
    if not (decoder._supports_attention_backend and decoder._supports_sdpa):
        raise ValueError(
            f"model: got {type(decoder).__name__}, allowed: a language model that uses AttentionInterface and has "
            "scaled-dot-product attention"
        )


def _image_token_ids(model: PreTrainedModel) -> list[int]:
    """Ids of the tokens that stand for pieces of an image or a video."""
    ids = [getattr(model.config, name, None) for name in IMAGE_TOKEN_FIELDS]
    return [token for token in ids if token is not None]


class _Call(NamedTuple):
    """A call of a model that has not ended yet.

    key: of its inhibitor.
    ids: the token ids that it was called with, if any.
    """

    key: str
    ids: Int[Tensor, "batch rows"] | None


class _Calls(threading.local):
    """Calls in this thread.

    open: calls that have not ended, the innermost last.
    embedded: token ids that were embedded last, outside of any call, for those models whose `generate` does so.
    """

    open: tuple[_Call, ...] = ()
    embedded: _Call | None = None

    def innermost(self, key: str) -> _Call | None:
        """The innermost open call of a model."""
        return next((call for call in reversed(self.open) if call.key == key), None)


_CALLS = _Calls()


@dataclass(frozen=True)
class _EmbeddingHook:
    """Before tokens are embedded: remember them.  Knows no module: PEFT copies embeddings alone, hooks included."""

    key: str

    def __call__(self, embedding: nn.Module, args: tuple[Any, ...]) -> None:
        if _CALLS.innermost(self.key) is None:
            _CALLS.embedded = _Call(self.key, args[0])


@dataclass
class _Inhibitor:
    """The hooks on one model.

    tokens: ids of its image tokens.
    before: the attention implementation to go back to.
    key: names its calls among those of other models.
    """

    cmai: CMAI
    tokens: list[int]
    before: str
    key: str = field(default_factory=lambda: uuid4().hex)
    handles: list[Any] = field(default_factory=list)

    @classmethod
    def on(cls, model: PreTrainedModel, cmai: CMAI) -> "_Inhibitor":
        """Put the hooks on a model; ValueError where its decoder has some of another."""
        decoder = model.get_decoder()
        if getattr(decoder, "_inhibited", False):
            raise ValueError(f"model: got {type(model).__name__}, allowed: the one in which CMAI was turned on before")
        decoder._inhibited = True
        used = decoder.config._attn_implementation
        result = cls(
            cmai, _image_token_ids(model), "sdpa" if used == ATTENTION_NAME else used
        )  # models may share a configuration
        decoder.set_attn_implementation(ATTENTION_NAME)
        result.handles = [
            model.register_forward_pre_hook(result.open, with_kwargs=True),
            model.register_forward_hook(result.close, always_call=True),
            decoder.register_forward_pre_hook(result.add, with_kwargs=True),
            decoder.register_forward_hook(result.forget, always_call=True),
        ]
        base = model.base_model
        if base is not model and base is not decoder:
            # PEFT calls the model's `forward` past its hooks, and that calls the base model
            result.handles.append(base.register_forward_pre_hook(result.open_within, with_kwargs=True))
            result.handles.append(base.register_forward_hook(result.close, always_call=True))
        if type(model).generate is not GenerationMixin.generate:
            model.get_input_embeddings().register_forward_pre_hook(_EmbeddingHook(result.key))
        return result

    def remove(self, model: PreTrainedModel) -> None:
        """Take the hooks off again, those on copies of the embedding as well."""
        for handle in self.handles:
            handle.remove()
        for module in model.modules():
            for number, hook in list(module._forward_pre_hooks.items()):
                if hook == _EmbeddingHook(self.key):
                    del module._forward_pre_hooks[number]
        decoder = model.get_decoder()
        del decoder._inhibited
        decoder.set_attn_implementation(self.before)

    def open(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Before the model: remember the token ids that it is called with."""
        _CALLS.open = (*_CALLS.open, _Call(self.key, kwargs.get("input_ids", args[0] if args else None)))

    def open_within(self, base: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Before the base model: the same; without ids those of the model around it count."""
        ids, around = kwargs.get("input_ids", args[0] if args else None), _CALLS.innermost(self.key)
        if ids is None and around is not None:
            ids = around.ids
        _CALLS.open = (*_CALLS.open, _Call(self.key, ids))

    def close(self, *_: Any) -> None:
        """After the model, also where it failed."""
        if _CALLS.open and _CALLS.open[-1].key == self.key:
            _CALLS.open = _CALLS.open[:-1]

    def add(self, decoder: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        """Before the decoder: its keyword arguments with the inhibition, on a cache that goes with it."""
        if (used := decoder.config._attn_implementation) != ATTENTION_NAME:
            raise ValueError(
                f"attn_implementation: got {used}, allowed: {ATTENTION_NAME} while CMAI is on; "
                "redux.inhibit(model, None) turns it off"
            )
        # recomputation would write a second time into a cache; transformers' layers take theirs away as well
        recomputing = decoder.training and decoder.is_activation_checkpointing
        image = self.image(kwargs)
        cache = None if recomputing else self.cache(decoder, kwargs)
        inhibition = Inhibition.for_forward(self.cmai, decoder.config.num_hidden_layers, image, cache, decoder.training)
        changed = {"inhibition": inhibition} if recomputing else {"inhibition": inhibition, "past_key_values": cache}
        if isinstance(masks := kwargs.get("attention_mask"), dict):
            if "full_attention" not in masks:
                raise ValueError(
                    f"attention_mask: got {', '.join(masks)}, allowed: full_attention, a mask for all layers"
                )
            changed["attention_mask"] = masks["full_attention"]  # CMAI works in no other layers
        return args, {**kwargs, **changed}

    def forget(self, *_: Any) -> None:
        """After the decoder, also where it failed: forget what was embedded for it, or by it."""
        _CALLS.embedded = None

    def image(self, kwargs: dict[str, Any]) -> Bool[Tensor, "batch rows"]:
        """Which of the decoder's new tokens are image tokens; ValueError where nobody knows."""
        ids = kwargs.get("input_ids")
        if ids is None:
            call, embedded = _CALLS.innermost(self.key), _CALLS.embedded
            if call is None and embedded is not None and embedded.key == self.key:
                call = embedded
            batch, rows = kwargs["inputs_embeds"].shape[:2]
            if call is None or call.ids is None or call.ids.shape[1:] != (rows,):
                raise ValueError(
                    "input_ids: got None, allowed: token ids, which tell CMAI image tokens from text; "
                    "where input embeddings were replaced, redux.inhibit again"
                )
            # the generate of Q-Former models embeds the prompt once and repeats it for every beam
            ids = call.ids.repeat_interleave(batch // len(call.ids), dim=0)
        return torch.stack([ids == token for token in self.tokens]).any(dim=0)

    def cache(self, decoder: Any, kwargs: dict[str, Any]) -> FocusCache | None:
        """The cache of this call as a FocusCache; ValueError where it holds tokens unknown to CMAI."""
        cache, use = kwargs.get("past_key_values"), kwargs.get("use_cache")
        if cache is None:
            config = decoder.config
            return FocusCache(config=config) if (config.use_cache if use is None else use) else None
        tokens, kind = cache.get_seq_length(), type(cache)
        if kind is DynamicCache and tokens == 0:
            cache.__class__, cache.t2i = FocusCache, {}
        if not isinstance(cache, FocusCache) or tokens != (0 if cache.is_image is None else cache.is_image.shape[1]):
            raise ValueError(
                f"past_key_values: got {kind.__name__} of {tokens} tokens, "
                "allowed: redux.cmai.FocusCache filled while CMAI was on, or an empty DynamicCache"
            )
        return cache
