"""Attention of an answer to the image and to the text of its prompt, and the Modality Dominance Index.

The index is that of "When Language Overrules" (arXiv 2508.10552): the attention that the answer pays to a text token
over the attention that it pays to an image token, each a mean over the tokens of its kind:

    MDI = (A_text / |text|) / (A_image / |image|)

Its paper leaves some choices open.  Here A is the attention weight after any inhibition, mean over heads and over the
rows that choose the answer's tokens.  "text" is the prompt with its template, before the answer; attention of the
answer to itself counts for neither.  Both sums are means over layers before the ratio, since a layer that hardly sees
the image would else decide it.

`redux.trace.measure_attention` measures it.  This module needs no torch, so answers can be scored without it.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean


@dataclass(frozen=True, kw_only=True)
class AttentionMass:
    """Attention of an answer, by layer of the language model.

    Args:
        image: attention to all image tokens, a share of 1.
        text: attention to all text tokens of the prompt, a share of 1.
        image_tokens: number of image tokens.
        text_tokens: number of text tokens of the prompt.
    """

    image: Sequence[float]
    text: Sequence[float]
    image_tokens: int
    text_tokens: int

    @property
    def dominance(self) -> float:
        """Modality Dominance Index: above 1, a text token gets more attention than an image token.

        >>> AttentionMass(image=[0.3, 0.1], text=[0.4, 0.4], image_tokens=100, text_tokens=20).dominance
        10.0
        """
        return (fmean(self.text) / self.text_tokens) / (fmean(self.image) / self.image_tokens)
