"""CMAI in any image-text-to-text model of transformers whose language model decodes images and text in one sequence.

Hooks add CMAI; no subclass and no second `forward` or `generate` is needed.

1. The token ids of a call of the model, or of its base model, show which tokens are image tokens. Q-Former models
   generate with their language model alone, without their own `forward`; then the ids that were embedded show the same.
2. Before the decoder runs, a hook adds `inhibition` to its keyword arguments, which transformers passes on to the
   attention function. The cache must be a `FocusCache` or a `StaticFocusCache`. An empty `DynamicCache` or
   `StaticCache`, as `generate` makes it, becomes one in place, so its owner keeps the same object.
3. After the model, also after an error, its ids are dropped. Embeddings of unknown origin are refused.

Token ids belong to a call, not to the model: several threads may call one model, and models may call each other. A
hook reads all it needs from the module of the call, so modules can be copied, pickled and replicated with their hooks.
The hooks cost one comparison of token ids in each call, in addition to CMAI's own cost (see `redux.cmai`). Modules
inside the decoder have no hooks, so recomputed activations see the same `inhibition`.
"""

import threading
from dataclasses import asdict, dataclass, field
from typing import Any, NamedTuple
from uuid import uuid4

from jaxtyping import Bool, Int
from torch import Tensor, nn
from transformers import DynamicCache, GenerationMixin, PreTrainedModel

from redux.attention import ATTENTION_NAME
from redux.cmai import Inhibition, is_recording
from redux.focus_cache import FocusCache, FocusRows, adopt_cache
from redux.packed import PackedConversations, PackedInhibition
from redux.settings import CMAI

IMAGE_TOKEN_FIELDS = ("image_token_id", "video_token_id")
"""Fields of a model's configuration with the ids of tokens that stand for pieces of an image."""


def inhibit(model: PreTrainedModel, cmai: CMAI | None) -> None:
    """Turn CMAI on in an image-text-to-text model, change its settings, or turn it off.

    After it is turned off, the model is as before. A ReduxForConditionalGeneration is saved with its settings.

    Args:
        model: a model of transformers.
        cmai: settings; None turns CMAI off.

    Raises:
        ValueError: CMAI cannot work in the model. It has no image tokens, or its language model is an encoder-decoder,
            forgets keys, attends to images by cross-attention, or does not use AttentionInterface.
    """
    if not isinstance(cmai, CMAI | None):
        raise ValueError(f"cmai: got {cmai!r}, allowed: redux.CMAI, or None to turn it off")
    if cmai is not None:
        _check_compatible(model)
        _check_heads(model, cmai)
    if hasattr(model, "_inhibitor"):
        model._inhibitor.remove(model)
        del model._inhibitor
    if cmai is not None:
        model._inhibitor = _Inhibitor.attach(model, cmai)
    if hasattr(model.config, "cmai"):
        model.config.cmai = asdict(cmai) if cmai else None


def _check_compatible(model: PreTrainedModel) -> None:
    """Raise a ValueError if CMAI would do nothing in the model, or silently compute a wrong mask."""
    model_class = type(model).__name__
    if not _image_token_ids(model):
        raise ValueError(
            f"image_token_id: got None in the configuration of {model_class}, allowed: the id of image tokens"
        )
    # Image and text must be one sequence of a decoder.
    text_config = model.config.get_text_config()
    if text_config.is_encoder_decoder:
        raise ValueError(f"is_encoder_decoder: got True in the language model of {model_class}, allowed: False")
    if getattr(text_config, "cross_attention_layers", None):
        raise ValueError(f"cross_attention_layers: got some in {model_class}, allowed: images and text in one sequence")
    # A cache that drops keys, such as that of sliding windows, no longer has image tokens at their positions.
    unsupported_layers = {type(layer).__name__ for layer in DynamicCache(config=text_config).layers} - {"DynamicLayer"}
    if unsupported_layers:
        raise ValueError(
            f"cache: got {', '.join(sorted(unsupported_layers))}, allowed: DynamicLayer, which forgets no token"
        )
    if getattr(text_config, "attn_logit_softcapping", None):
        raise ValueError(
            f"attn_logit_softcapping: got {text_config.attn_logit_softcapping} in the language model of {model_class}, "
            "allowed: None, because scaled-dot-product attention would leave the cap out"
        )
    decoder = model.get_decoder()
    if not (decoder._supports_attention_backend and decoder._supports_sdpa):
        raise ValueError(
            f"model: got {type(decoder).__name__}, allowed: a language model that uses AttentionInterface and has "
            "scaled-dot-product attention"
        )


def _check_heads(model: PreTrainedModel, cmai: CMAI) -> None:
    """Raise a ValueError if the settings number a head that the model does not have."""
    text_config = model.config.get_text_config()
    num_heads = text_config.num_hidden_layers * text_config.num_attention_heads
    if not isinstance(cmai.heads, str) and max(cmai.heads) >= num_heads:
        raise ValueError(f"heads: got {max(cmai.heads)}, allowed: 0 to {num_heads - 1}, the heads of all layers")


def _image_token_ids(model: PreTrainedModel) -> list[int]:
    """List the ids of tokens that stand for pieces of an image or a video."""
    ids = [getattr(model.config, name, None) for name in IMAGE_TOKEN_FIELDS]
    return [token_id for token_id in ids if token_id is not None]


class _Call(NamedTuple):
    """A call of a model.

    Args:
        key: key of the model's inhibitor.
        ids: token ids of the call; None without any.
    """

    key: str
    ids: Int[Tensor, "batch rows"] | None


class _Calls(threading.local):
    """Calls in this thread.

    Attributes:
        running: calls that have not ended, the innermost last.
        embedded: token ids that were embedded last outside of any call, as `generate` of Q-Former models does.
    """

    running: tuple[_Call, ...] = ()
    embedded: _Call | None = None

    def innermost(self, key: str) -> _Call | None:
        """Return the innermost running call of a model, None without one."""
        return next((call for call in reversed(self.running) if call.key == key), None)


_CALLS = _Calls()


@dataclass(frozen=True)
class _EmbeddingHook:
    """Pre-hook of the input embeddings that records token ids.

    It refers to no module, since PEFT copies embeddings alone, hooks included.
    """

    key: str

    def __call__(self, embedding: nn.Module, args: tuple[Any, ...]) -> None:
        if _CALLS.innermost(self.key) is None:
            _CALLS.embedded = _Call(self.key, args[0])


@dataclass
class _Inhibitor:
    """The hooks of one model.

    Args:
        cmai: settings.
        image_token_ids: ids of its image tokens.
        original_attention: attention implementation to restore.
        key: distinguishes its calls from those of other models.
        handles: handles that remove the hooks.
    """

    cmai: CMAI
    image_token_ids: list[int]
    original_attention: str
    key: str = field(default_factory=lambda: uuid4().hex)
    handles: list[Any] = field(default_factory=list)

    @classmethod
    def attach(cls, model: PreTrainedModel, cmai: CMAI) -> "_Inhibitor":
        """Register the hooks on a model; ValueError if another model has hooks on the same decoder."""
        decoder = model.get_decoder()
        if getattr(decoder, "_inhibited", False):
            raise ValueError(f"model: got {type(model).__name__}, allowed: the one in which CMAI was turned on before")
        decoder._inhibited = True
        # Models may share a configuration, in which another one has already set CMAI's attention.
        current = decoder.config._attn_implementation
        original_attention = "sdpa" if current == ATTENTION_NAME else current
        inhibitor = cls(cmai, _image_token_ids(model), original_attention)
        decoder.set_attn_implementation(ATTENTION_NAME)
        # always_call: hooks after a module also run after an error in it.
        inhibitor.handles = [
            model.register_forward_pre_hook(inhibitor.before_model, with_kwargs=True),
            model.register_forward_hook(inhibitor.after_model, always_call=True),
            decoder.register_forward_pre_hook(inhibitor.before_decoder, with_kwargs=True),
            decoder.register_forward_hook(inhibitor.after_decoder, always_call=True),
        ]
        base = model.base_model
        if base is not model and base is not decoder:
            # PEFT calls the model's `forward` without its hooks, and that calls the base model.
            inhibitor.handles.append(base.register_forward_pre_hook(inhibitor.before_base_model, with_kwargs=True))
            inhibitor.handles.append(base.register_forward_hook(inhibitor.after_model, always_call=True))
        if type(model).generate is not GenerationMixin.generate:
            # Q-Former models embed the prompt outside of `forward`; this hook has no handle, since copies have it too.
            model.get_input_embeddings().register_forward_pre_hook(_EmbeddingHook(inhibitor.key))
        return inhibitor

    def remove(self, model: PreTrainedModel) -> None:
        """Remove the hooks, also from copies of the embedding, and restore the attention implementation."""
        for handle in self.handles:
            handle.remove()
        for module in model.modules():
            for hook_id, hook in list(module._forward_pre_hooks.items()):
                if hook == _EmbeddingHook(self.key):
                    del module._forward_pre_hooks[hook_id]
        decoder = model.get_decoder()
        del decoder._inhibited
        decoder.set_attn_implementation(self.original_attention)

    def before_model(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Record the token ids of the call."""
        ids = kwargs.get("input_ids", args[0] if args else None)
        _CALLS.running = (*_CALLS.running, _Call(self.key, ids))

    def before_base_model(self, base: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Record the token ids of a call of the base model; without ids, take those of the model around it."""
        ids = kwargs.get("input_ids", args[0] if args else None)
        outer = _CALLS.innermost(self.key)
        if ids is None and outer is not None:
            ids = outer.ids
        _CALLS.running = (*_CALLS.running, _Call(self.key, ids))

    def after_model(self, *_: Any) -> None:
        """End the call. Runs after an error, too."""
        if _CALLS.running and _CALLS.running[-1].key == self.key:
            _CALLS.running = _CALLS.running[:-1]

    def before_decoder(self, decoder: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        """Add the inhibition and its cache to the decoder's keyword arguments."""
        attention = decoder.config._attn_implementation
        if attention != ATTENTION_NAME:
            raise ValueError(
                f"attn_implementation: got {attention}, allowed: {ATTENTION_NAME} while CMAI is on; "
                "redux.inhibit(model, None) turns it off"
            )
        # Recomputation would write into the cache a second time; transformers' layers drop their cache for it, too.
        # transformers has a property for this, whose name differs between 5.19 and 5.23.
        checkpointing = (getattr(module, "gradient_checkpointing", False) for module in decoder.modules())
        recomputing = decoder.training and any(checkpointing)
        is_image = self._find_image_tokens(kwargs)
        cache = None if recomputing else self._prepare_cache(decoder, kwargs, is_image.shape[1])
        conversations = None if cache is not None else self._find_conversations(kwargs, is_image)
        inhibition: Any = Inhibition.for_forward(
            self.cmai,
            decoder.config.num_hidden_layers,
            conversations.split_flags(is_image) if conversations else is_image,
            cache,
            decoder.training,
        )
        if conversations and inhibition:
            inhibition = PackedInhibition(conversations, inhibition)
        changes: dict[str, Any] = {"inhibition": inhibition}
        if not recomputing:
            changes["past_key_values"] = cache
        masks = kwargs.get("attention_mask")
        if isinstance(masks, dict):
            # generate passes a mask for each kind of layer; `_check_compatible` admits full attention only.
            if "full_attention" not in masks:
                raise ValueError(
                    f"attention_mask: got {', '.join(masks)}, allowed: full_attention, a mask for all layers"
                )
            changes["attention_mask"] = masks["full_attention"]
        return args, {**kwargs, **changes}

    def after_decoder(self, *_: Any) -> None:
        """Drop the ids that were embedded for the decoder, or by it. Runs after an error, too."""
        _CALLS.embedded = None

    def _find_image_tokens(self, kwargs: dict[str, Any]) -> Bool[Tensor, "batch rows"]:
        """Find the image tokens among the decoder's new tokens; ValueError if their ids are unknown."""
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
            # generate of Q-Former models embeds the prompt once and repeats it for every beam.
            ids = call.ids.repeat_interleave(batch // len(call.ids), dim=0)
        is_image = ids == self.image_token_ids[0]
        for token_id in self.image_token_ids[1:]:
            is_image = is_image | (ids == token_id)
        return is_image

    def _find_conversations(
        self, kwargs: dict[str, Any], is_image: Bool[Tensor, "batch rows"]
    ) -> PackedConversations | None:
        """Find the conversations of packed rows; None if rows are not packed, or masked by the caller."""
        position_ids = kwargs.get("position_ids")
        if position_ids is None or position_ids.dim() != 2 or kwargs.get("attention_mask") is not None:
            return None
        # As in transformers, only a call without earlier tokens has packed rows; recorded decisions are those of rows.
        if kwargs.get("past_key_values") is not None or is_recording():
            return None
        return PackedConversations.find(position_ids.expand(is_image.shape))

    def _prepare_cache(self, decoder: Any, kwargs: dict[str, Any], rows: int) -> FocusRows | None:
        """Return the cache of the call as one of `redux.focus_cache`; ValueError if it holds tokens unknown to CMAI."""
        cache, use_cache = kwargs.get("past_key_values"), kwargs.get("use_cache")
        if cache is None:
            if use_cache is None:
                use_cache = decoder.config.use_cache
            return FocusCache(config=decoder.config) if use_cache else None
        if isinstance(cache, FocusRows) and cache.is_static and cache.is_ready(rows):
            # The length lies on the device, and a decoded token waits for nothing.
            return cache
        cache_class = type(cache)
        cache = adopt_cache(cache)
        if not isinstance(cache, FocusRows) or not cache.fits_tokens():
            raise ValueError(
                f"past_key_values: got {cache_class.__name__} of {int(cache.get_seq_length())} tokens, "
                "allowed: redux.focus_cache.FocusCache or StaticFocusCache filled while CMAI was on, "
                "or an empty DynamicCache or StaticCache"
            )
        return cache
