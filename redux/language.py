"""Check that a causal language model of transformers can be the language model of a LLaVA, with CMAI and without.

LlavaModel runs the base class of a language model on embeddings, and puts a plain linear head on top. transformers
does not check that this computes what the language model's own class computes. A logit scale or a soft cap would be
lost, a factor of the embeddings would apply to image features, without an error. So a small copy of the model with
random weights is built and compared with LLaVA's way, and CMAI is tried on it. No list of names is needed.

Cost: about a tenth of a second, and 20 MB for heads of 128 dimensions; once per process and configuration.
"""

import json
from functools import lru_cache
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers import AutoModel, CLIPVisionConfig, DynamicCache, PreTrainedConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from redux.cmai import record_decisions
from redux.configuration import ReduxConfig
from redux.model import ReduxForConditionalGeneration
from redux.settings import CMAI

ALLOWED_LANGUAGE = "a dense decoder of LLaMA's build, see redux/README.md"

SMALL_VOCABULARY = 64
SMALL_LAYERS = 4
"""Most layers of a small copy. Patterns of layers, such as every fourth without positions, are no longer."""

OTHER_ATTENTION = {"diffllama": "whose attention is the difference of two maps, and CMAI would read their mean"}
"""Reasons against types of models whose build shows nothing of them."""

IMAGE_ID = SMALL_VOCABULARY - 1


def find_language_class(model_type: str | None) -> Any:
    """Return transformers' class of causal language models of a model_type; None if there is none."""
    name = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.get(model_type or "")
    return getattr(transformers, name, None) if name else None


def drop_idle_window(config: PreTrainedConfig) -> None:
    """Drop a sliding window that reaches over all positions, so that no token leaves it."""
    window = getattr(config, "sliding_window", None)
    if window and window >= config.max_position_embeddings and not getattr(config, "layer_types", None):
        config.sliding_window = None


def check_language(config: PreTrainedConfig) -> None:
    """Check that LLaVA and CMAI compute with a language model what its own class computes.

    Args:
        config: configuration of the language model.

    Raises:
        ValueError: tells what LLaVA would compute otherwise, or why CMAI cannot work. It begins with "which".
    """
    config_class: Any = type(config)
    if problem := _find_problem(config_class, json.dumps(config.to_dict(), sort_keys=True, default=str)):
        raise ValueError(problem)


def check_packing(config: PreTrainedConfig) -> None:
    """Check that a language model computes for packed conversations what it computes for each alone.

    Args:
        config: configuration of the language model, which `check_language` admits.

    Raises:
        ValueError: tokens attend to those of another conversation.
    """
    config_class: Any = type(config)
    # Of a quantized model the build is the same.
    values = {name: value for name, value in config.to_dict().items() if name != "quantization_config"}
    with torch.random.fork_rng(devices=[]), torch.device("cpu"), torch.no_grad():
        torch.manual_seed(0)
        base = AutoModel.from_config(shrink_config(config_class(**values))).eval()
        parts = base.get_input_embeddings()(torch.arange(3, 15)[None]).split([7, 1, 4], dim=1)
        alone = [base(inputs_embeds=part, use_cache=False).last_hidden_state for part in parts]
        # No attention mask: transformers finds conversations where positions restart.
        positions = torch.cat([torch.arange(part.shape[1]) for part in parts])[None]
        packed = base(inputs_embeds=torch.cat(parts, dim=1), position_ids=positions, use_cache=False).last_hidden_state
    if not torch.allclose(packed, torch.cat(alone, dim=1), rtol=1e-3, atol=1e-4):
        raise ValueError(f"which computes something else with packed conversations ({config.model_type})")


@lru_cache(maxsize=64)
def _find_problem(config_class: Any, saved: str) -> str:
    """Find a reason against a language model by its configuration as JSON; "" without any."""
    values = json.loads(saved)
    # Of a quantized model the build is the same.
    values.pop("quantization_config", None)
    config = config_class(**values)
    if config.is_encoder_decoder or config.get_text_config() is not config:
        return "which has more parts than a decoder"
    unsupported_layers = {type(layer).__name__ for layer in DynamicCache(config=config).layers} - {"DynamicLayer"}
    if unsupported_layers:
        return f"which does not keep the keys of all tokens ({', '.join(sorted(unsupported_layers))})"
    if reason := OTHER_ATTENTION.get(config.model_type):
        return reason
    if getattr(config, "attn_logit_softcapping", None):
        return "whose attention scores have a soft cap (attn_logit_softcapping)"
    # The caller's seed decides the weights of a new projector.
    with torch.random.fork_rng(devices=[]), torch.device("cpu"), torch.no_grad():
        torch.manual_seed(0)
        language_class = find_language_class(config.model_type)
        try:
            small = shrink_config(config)
            # Without memory first, because experts are many and not small.
            with torch.device("meta"):
                problem = _find_other_build(language_class(small))
            language = None if problem else language_class(small).eval()
        except Exception as error:  # Each configuration class has checks of its own
            return f"of which no small copy can be built ({' '.join(str(error).split())[:200]})"
        return problem or _find_other_output(language) or _find_obstacle_of_cmai(small)


def shrink_config(config: PreTrainedConfig) -> PreTrainedConfig:
    """Return the configuration of a small model of the same build, with heads of the same size."""
    layers, heads = config.num_hidden_layers, config.num_attention_heads
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
    values = config.to_dict()
    for name, value in values.items():
        # Such as the kind of each layer.
        if isinstance(value, list) and len(value) == layers:
            values[name] = value[:SMALL_LAYERS]
    key_heads = getattr(config, "num_key_value_heads", None) or heads
    values |= {
        "num_hidden_layers": min(layers, SMALL_LAYERS),
        "num_attention_heads": 2,
        "num_key_value_heads": 2 if key_heads == heads else 1,
        "hidden_size": 2 * head_dim,
        "intermediate_size": 32,
        "vocab_size": SMALL_VOCABULARY,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 0,
        "dtype": "float32",
    }
    return type(config)(**values)


def _find_other_build(language: Any) -> str:
    """Find a part that a language model of LLaMA's build does not have."""
    config, head, base = language.config, language.get_output_embeddings(), language.base_model
    if type(head) is not nn.Linear or len(list(head.parameters())) > 1:
        return "whose head is not a linear layer without bias"
    decoder_name = type(AutoModel.from_config(config)).__name__
    if type(base).__name__ != decoder_name or language.base_model_prefix != "model":
        return f"whose decoder {type(base).__name__} has other names than LLaMA's"
    if missing := [name for name in ("embed_tokens", "layers", "norm") if not hasattr(base, name)]:
        return f"whose decoder has no {missing[0]}"
    # Cost and adapters count on the products of attention and a gated MLP.
    hidden = config.hidden_size
    head_dim = getattr(config, "head_dim", None) or hidden // config.num_attention_heads
    heads = config.num_attention_heads + (getattr(config, "num_key_value_heads", None) or config.num_attention_heads)
    expected = 2 * hidden * heads * head_dim + 3 * hidden * config.intermediate_size
    for layer in base.layers:
        linear = [module.weight for module in layer.modules() if isinstance(module, nn.Linear)]
        other_weights = {weight for weight in layer.parameters() if weight.dim() > 1} - set(linear)
        if other_weights or sum(weight.numel() for weight in linear) != expected:
            return "whose layers have other products than attention and a gated MLP"
    return ""


def _find_other_output(language: Any) -> str:
    """Find an output of a language model that differs if LLaVA runs its decoder, or that depends on the cache."""
    # The input of the first layer: LLaVA puts image features there, so nothing may change it.
    base = language.base_model
    ids = torch.arange(3, 15)[None]
    embeddings = base.embed_tokens(ids)
    received: list[Tensor] = []
    hook = base.layers[0].register_forward_pre_hook(
        lambda _, args, kwargs: received.append(args[0] if args else kwargs["hidden_states"]), with_kwargs=True
    )
    hidden = base(inputs_embeds=embeddings, use_cache=False).last_hidden_state
    hook.remove()
    if not torch.equal(received[0], embeddings):
        return "which changes its embeddings before the first layer, so that image features would change, too"
    logits = language.get_output_embeddings()(hidden)
    if not torch.equal(language(input_ids=ids, use_cache=False).logits, logits):
        return "whose logits are more than the product of decoder and head"
    # Positions must come from position_ids: the given ones change nothing, others do.
    positions = torch.arange(ids.shape[1])[None]
    at_positions = base(inputs_embeds=embeddings, position_ids=positions, use_cache=False).last_hidden_state
    apart = base(inputs_embeds=embeddings, position_ids=3 * positions, use_cache=False).last_hidden_state
    if not torch.equal(at_positions, hidden) or torch.equal(apart, hidden):
        return "which does not take positions from position_ids"
    # A prompt, decoded tokens and several tokens on a cache.
    cache = DynamicCache(config=language.config)
    parts = [
        base(inputs_embeds=part, past_key_values=cache, use_cache=True).last_hidden_state
        for part in embeddings.split([8, 1, 1, 2], dim=1)
    ]
    if not torch.allclose(torch.cat(parts, dim=1), hidden, rtol=1e-3, atol=1e-4):
        return "which computes something else with a cache"
    return ""


def _find_obstacle_of_cmai(text_config: PreTrainedConfig) -> str:
    """Find a layer to which CMAI's decisions do not come."""
    tower = CLIPVisionConfig(
        hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2, image_size=4, patch_size=2
    )
    config = ReduxConfig(
        vision_config=tower.to_dict(), text_config=text_config.to_dict(), image_token_index=IMAGE_ID, cmai=CMAI()
    )
    try:
        model = ReduxForConditionalGeneration(config).eval()
    except ValueError as error:
        return f"in which CMAI cannot work ({error})"
    image = [IMAGE_ID] * config.image_seq_length
    with record_decisions() as decisions:
        model(input_ids=torch.tensor([[3, *image, 4, 5, 6]]), pixel_values=torch.randn(1, 3, 4, 4))
    gammas = CMAI().compute_gammas(text_config.num_hidden_layers)
    inhibiting = {layer for layer, gamma in enumerate(gammas) if gamma > 0}
    return "" if decisions.keys() == inhibiting else "whose attention functions do not get the arguments of CMAI"
