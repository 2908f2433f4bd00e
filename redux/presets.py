"""The paper's configurations by name: two readings, budgets, the rows of its ablations, and its baselines.

Two readings exist where the paper is silent or contradicts itself. "default" follows its argument, "paper-literal" its
printed equations: raw merge weights (eq. 7), tokens by rank (eq. 8), QK^T as attention score.

Table 4 starts from CMAI alone and Table 5 from VMTC alone, since their first rows equal those of Table 3.
"""

from dataclasses import dataclass

from redux.configuration import ReduxConfig
from redux.settings import CMAI, VMTC, Reduction


@dataclass(frozen=True, kw_only=True)
class Preset:
    """Settings of the method under a name.

    Args:
        description: its place in the paper.
        vmtc, cmai, reduction: settings; None turns a part off.
    """

    description: str
    vmtc: VMTC | None = VMTC()
    cmai: CMAI | None = CMAI()
    reduction: Reduction | None = None

    @property
    def methods(self) -> dict[str, VMTC | CMAI | Reduction | None]:
        """Arguments for `ReduxForConditionalGeneration.from_pretrained` and `ReduxConfig`."""
        return {"vmtc": self.vmtc, "cmai": self.cmai, "reduction": self.reduction}


def _reduction_preset(description: str, reduction: Reduction) -> Preset:
    return Preset(description=description, vmtc=None, cmai=None, reduction=reduction)


PRESETS = {
    "default": Preset(description="Redux, default: as the text of the paper argues, with half of the tokens"),
    "paper-literal": Preset(
        description="Redux, literal: as the equations of the paper are printed",
        vmtc=VMTC(weights="raw", order="rank"),
        cmai=CMAI(scores="scores"),
    ),
    "tokens-64": Preset(description="Table 2, 64 visual tokens", vmtc=VMTC(tokens=64)),
    "tokens-36": Preset(description="Table 2, 36 visual tokens", vmtc=VMTC(tokens=36)),
    "llava": Preset(description="Table 3, neither module: LLaVA-1.5", vmtc=None, cmai=None),
    "vmtc": Preset(description="Table 3, VMTC alone", cmai=None),
    "cmai": Preset(description="Table 3, CMAI alone", vmtc=None),
    "llp": Preset(description="Table 4, pruning in the last layer", vmtc=VMTC(stages=(-1,), clusters=0)),
    "lwp": Preset(description="Table 4, pruning layer by layer", vmtc=VMTC(clusters=0)),
    "lwp-mg": Preset(description="Table 4, and merging into one token", vmtc=VMTC(clusters=1)),
    "lwp-mg-clst": Preset(description="Table 4, and clustering before: the default"),
    "tia": Preset(description="Table 5, text-to-image attention alone", cmai=CMAI(focus="tia")),
    "sum-tia": Preset(description="Table 5, its sum over text tokens", cmai=CMAI(focus="sum")),
    "discounted-sum-tia": Preset(description="Table 5, its discounted sum", cmai=CMAI(focus="discounted")),
    "spd": _reduction_preset("Table 1, spatial down-sampling", Reduction(method="average", ratio=0.75)),
    "resize": _reduction_preset(
        "images of half the side, a quarter of the tokens", Reduction(method="resize", ratio=0.75)
    ),
    "random": _reduction_preset("random patches, half of the tokens", Reduction(method="random", ratio=0.5)),
    "prumerge": _reduction_preset("Table 2, LLaVA-PruMerge", Reduction(method="prumerge", tokens=36)),
    "each-head": Preset(description="the default, with a mask of CMAI for each head", cmai=CMAI(heads="each")),
    "no-sinks": Preset(
        description="the default, whose primary tokens are not attention sinks", vmtc=VMTC(sink_norm=3.0)
    ),
    "evit": Preset(
        description="EViT: pruning layer by layer, one fused token",
        vmtc=VMTC(clusters=1, weights="raw", order="rank"),
        cmai=None,
    ),
}


VICUNA_SIZES = {"7b": (4096, 32, 32, 11008), "13b": (5120, 40, 40, 13824)}
"""Sizes of Vicuna-v1.5: width, layers, heads and width of the MLP."""


def build_llava_config(size: str, preset: Preset = PRESETS["llava"]) -> ReduxConfig:
    """Build LLaVA-1.5's configuration, without weights: CLIP-ViT-L/14 at 336 pixels and Vicuna-v1.5.

    Args:
        size: a name in VICUNA_SIZES.
        preset: settings of the method.
    """
    width, layers, heads, mlp = VICUNA_SIZES[size]
    language = {"hidden_size": width, "num_hidden_layers": layers, "num_attention_heads": heads}
    tower = {"hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16, "intermediate_size": 4096}
    return ReduxConfig(
        vision_config={"model_type": "clip_vision_model", "image_size": 336, "patch_size": 14, **tower},
        text_config={"model_type": "llama", "vocab_size": 32064, "intermediate_size": mlp, **language},
        **preset.methods,
    )
