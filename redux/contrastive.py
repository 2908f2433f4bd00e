"""CLIP's contrastive objective on captions, to train an image tower that starts from random weights.

Shapes: images = captions = pairs of the micro-batch, length (caption tokens).
"""

from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import CLIPConfig, CLIPModel, PreTrainedTokenizerBase

from redux.architecture import TowerSizes
from redux.configuration import build_caption_config, build_vision_config


def build_clip(tower: TowerSizes, tokenizer: PreTrainedTokenizerBase) -> CLIPModel:
    """Build a CLIP with random weights for captions of at most CLIP_MAX_LENGTH tokens. Seed torch before."""
    if tokenizer.eos_token_id == 2:
        # For id 2 transformers' CLIP pools at the largest id instead of the end token, as old checkpoints need.
        raise ValueError("tokenizer: </s> has number 2, allowed: any other, or CLIP's text tower reads the wrong token")
    config = CLIPConfig(
        text_config=build_caption_config(tower, tokenizer).to_dict(),
        vision_config=build_vision_config(tower).to_dict(),
        projection_dim=tower.hidden_size,
    )
    return CLIPModel(config)


class ContrastiveClip(nn.Module):
    """A CLIPModel whose forward returns the loss, as the training loop expects.

    Attributes:
        scale: log of the logits' scale, (1,). CLIP's own parameter has no dimension, and DeepSpeed cannot broadcast
            it.
        clip: the CLIPModel, with the scale as a buffer.
    """

    def __init__(self, clip: CLIPModel) -> None:
        super().__init__()
        self.scale = nn.Parameter(clip.logit_scale.detach().reshape(1).clone())
        del clip.logit_scale
        # CLIPModel reads the name, so a buffer stands in for the parameter.
        clip.register_buffer("logit_scale", self.scale.detach()[0].clone())
        self.clip = clip

    def forward(
        self,
        pixel_values: Float[Tensor, "pairs 3 height width"],
        input_ids: Int[Tensor, "pairs length"],
        attention_mask: Int[Tensor, "pairs length"],
    ) -> Float[Tensor, ""]:
        output = self.clip(input_ids=input_ids, pixel_values=pixel_values, attention_mask=attention_mask)
        return contrastive_loss(output.image_embeds @ output.text_embeds.T * self.scale.exp(), input_ids)

    def export_clip(self) -> CLIPModel:
        """Return the CLIPModel with the trained scale, to be saved."""
        self.clip.logit_scale.copy_(self.scale.detach()[0])
        return self.clip


def contrastive_loss(
    logits: Float[Tensor, "images captions"], captions: Int[Tensor, "captions length"]
) -> Float[Tensor, ""]:
    """Symmetric cross-entropy of images and captions (Radford et al. 2021, figure 3).

    Pairs with equal captions are positives of each other and share the target evenly (Yang et al. 2022, UniCL, eq. 3).
    With a small vocabulary many captions of a batch are equal, and none of them is a negative.
    """
    equal = (captions.unsqueeze(0) == captions.unsqueeze(1)).all(dim=-1).to(logits.dtype)
    target = equal / equal.sum(dim=1, keepdim=True)
    return (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2
