"""CMAI in any image-text-to-text model of transformers whose language model decodes images and text in one sequence.

A few hooks, no subclass and no second `forward` or `generate`: transformers asks for nothing else.

1. The token ids that the model is called with tell which tokens are of an image.  The `generate` of Q-Former models
   goes to their language model past their `forward`; there the ids that are embedded tell the same.
2. Before the decoder runs, `inhibition` joins its keyword arguments, which transformers hands down to the attention
   function.  Its cache has to be a `FocusCache`: an empty `DynamicCache`, as `generate` makes it, becomes one in place,
   so whoever made it goes on with the same object.
3. After the decoder ran, or failed, the image tokens are forgotten: embeddings of unknown origin are refused.

The hooks are methods of one object on the model, so they are copied, pickled and wrapped with it.  They cost one
comparison of the token ids a call, beside what CMAI itself costs (see `redux.cmai`).  Modules inside the decoder have
none: recomputed activations see the same `inhibition`.
"""

from dataclasses import asdict
from typing import Any

import torch
from jaxtyping import Bool, Int
from torch import Tensor, nn
from transformers import DynamicCache, PreTrainedModel

from redux.cmai import ATTENTION, FocusCache, Inhibition
from redux.settings import CMAI

TOKENS = ("image_token_id", "video_token_id")
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
        _check(model)
    if hasattr(model, "_inhibitor"):
        model._inhibitor.remove()
        del model._inhibitor
    if cmai is not None:
        model._inhibitor = _Inhibitor(model, cmai)
    if hasattr(model.config, "cmai"):
        model.config.cmai = asdict(cmai) if cmai else None


def _check(model: PreTrainedModel) -> None:
    """ValueError where CMAI has nothing to do, or would do it wrong without a word."""
    kind = type(model).__name__
    if not _tokens(model):
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
    if not decoder._supports_attention_backend:
        raise ValueError(f"model: got {type(decoder).__name__}, allowed: a language model that uses AttentionInterface")


def _tokens(model: PreTrainedModel) -> list[int]:
    """Ids of the tokens that stand for pieces of an image or a video."""
    ids = [getattr(model.config, name, None) for name in TOKENS]
    return [token for token in ids if token is not None]


class _Inhibitor:
    """The hooks on one model and what they tell each other.

    image: which of the tokens on their way to the decoder are image tokens; None once it had them.
    told: whether the call of the model said so; otherwise what is embedded does.
    before: the attention implementation to go back to.
    """

    def __init__(self, model: PreTrainedModel, cmai: CMAI) -> None:
        self.cmai = cmai
        self.tokens = _tokens(model)
        self.image: Bool[Tensor, "*any"] | None = None
        self.told = False
        self.decoder = model.get_decoder()
        if getattr(self.decoder, "_inhibited", False):
            raise ValueError(f"model: got {type(model).__name__}, allowed: the one in which CMAI was turned on before")
        self.decoder._inhibited = True
        used = self.decoder.config._attn_implementation
        self.before = "sdpa" if used == ATTENTION else used  # models may share a configuration
        self.decoder.set_attn_implementation(ATTENTION)
        self.handles = [
            model.register_forward_pre_hook(self.look, with_kwargs=True),
            model.get_input_embeddings().register_forward_pre_hook(self.note),
            self.decoder.register_forward_pre_hook(self.add, with_kwargs=True),
            self.decoder.register_forward_hook(self.forget, always_call=True),
        ]

    def remove(self) -> None:
        """Takes the hooks off again."""
        for handle in self.handles:
            handle.remove()
        del self.decoder._inhibited
        self.decoder.set_attn_implementation(self.before)

    def look(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Before the model: which of the tokens that it is called with are image tokens."""
        ids = kwargs.get("input_ids", args[0] if args else None)
        self.told = ids is not None
        self.image = None if ids is None else self.is_image(ids)

    def note(self, embedding: nn.Module, args: tuple[Any, ...]) -> None:
        """Before tokens are embedded: which of them are image tokens."""
        if not self.told:
            self.image = self.is_image(args[0])

    def add(self, decoder: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        """Before the decoder: its keyword arguments with the inhibition, on a cache that goes with it."""
        if (used := self.decoder.config._attn_implementation) != ATTENTION:
            raise ValueError(
                f"attn_implementation: got {used}, allowed: {ATTENTION} while CMAI is on; "
                "redux.inhibit(model, None) turns it off"
            )
        # recomputation would write a second time into a cache; transformers' layers take theirs away as well
        recomputing = decoder.training and self.decoder.is_activation_checkpointing
        image = self.expected(kwargs)
        cache = None if recomputing else self.cache(kwargs)
        inhibition = Inhibition.of(self.cmai, self.decoder.config.num_hidden_layers, image, cache, decoder.training)
        caching = {} if recomputing else {"past_key_values": cache}
        return args, {**kwargs, **caching, "inhibition": inhibition}

    def forget(self, *_: Any) -> None:
        """After the decoder."""
        self.image, self.told = None, False

    def is_image(self, ids: Int[Tensor, "*any"]) -> Bool[Tensor, "*any"]:
        return torch.stack([ids == token for token in self.tokens]).any(dim=0)

    def expected(self, kwargs: dict[str, Any]) -> Bool[Tensor, "batch rows"]:
        """Which of the decoder's new tokens are image tokens; ValueError where nobody knows."""
        if kwargs.get("input_ids") is not None:
            return self.is_image(kwargs["input_ids"])
        batch, rows = kwargs["inputs_embeds"].shape[:2]
        if self.image is None or self.image.shape[1:] != (rows,):
            raise ValueError("input_ids: got None, allowed: token ids, which tell CMAI image tokens from text")
        # the generate of Q-Former models embeds the prompt once and repeats it for every beam
        return self.image.repeat_interleave(batch // len(self.image), dim=0)

    def cache(self, kwargs: dict[str, Any]) -> FocusCache | None:
        """The cache of this call as a FocusCache; ValueError where it holds tokens unknown to CMAI."""
        cache, use = kwargs.get("past_key_values"), kwargs.get("use_cache")
        if cache is None:
            config = self.decoder.config
            return FocusCache(config=config) if (config.use_cache if use is None else use) else None
        tokens, kind = cache.get_seq_length(), type(cache)
        if kind is DynamicCache and tokens == 0:
            cache.__class__, cache.rows = FocusCache, {}
        if not isinstance(cache, FocusCache) or tokens != (0 if cache.image is None else cache.image.shape[1]):
            raise ValueError(
                f"past_key_values: got {kind.__name__} of {tokens} tokens, "
                "allowed: redux.cmai.FocusCache filled while CMAI was on, or an empty DynamicCache"
            )
        return cache
