"""Attention of an answer to the image and to the text of its prompt, and the Modality Dominance Index.

The index is that of "When Language Overrules" (arXiv 2508.10552, eq. 1): the attention that the answer pays to a text
token over the attention that it pays to an image token, each a mean over the tokens of its kind:

    MDI = (A_text / |text|) / (A_image / |image|)

The paper itself was readable only up to its introduction. The equation is that of two public implementations
(Song-haJo/LangOverrule, commit 6989a8e, src/metrics/mdi.py; JuncyLu/trl_DAPO), which agree on it: attention of the
generated tokens, mean over heads, to the tokens of the prompt. Both divide A_text and A_image by their sum, which
leaves the ratio as it is. They differ in the layers. The paper prints an index for early, middle and late layers
(LLaVA-1.5-7B: 1.58, 10.23, 17.37). By the first implementation these are two layers each, and here, too;
by the second they are thirds. The second also leaves out special tokens of the text and attention to the first token.

Here A is the attention weight after any inhibition. "text" is the prompt with its template, special tokens included.
Both sums are means over layers before the ratio, since a layer that hardly sees the image would else decide it.

`redux.trace.measure_attention` measures it. This module needs no torch, so answers can be scored without it.
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
        """Modality Dominance Index over all layers: above 1, a text token gets more attention than an image token.

        >>> AttentionMass(image=[0.3, 0.1], text=[0.4, 0.4], image_tokens=100, text_tokens=20).dominance
        10.0
        """
        return self._compute_dominance(range(len(self.image)))

    @property
    def dominance_by_group(self) -> dict[str, float]:
        """Modality Dominance Index of the early, middle and late layers, two each; of fewer layers some of them twice.

        >>> image = [0.5, 0.5, 0.25, 0.25, 0.125, 0.125]
        >>> AttentionMass(image=image, text=[0.5] * 6, image_tokens=10, text_tokens=10).dominance_by_group
        {'early': 1.0, 'middle': 2.0, 'late': 4.0}
        """
        count = len(self.image)
        middle = max(count // 2 - 1, 0)
        groups = {"early": range(2), "middle": range(middle, middle + 2), "late": range(count - 2, count)}
        return {
            name: self._compute_dominance([layer for layer in layers if 0 <= layer < count])
            for name, layers in groups.items()
        }

    def _compute_dominance(self, layers: Sequence[int]) -> float:
        text, image = (fmean(mass[layer] for layer in layers) for mass in (self.text, self.image))
        return (text / self.text_tokens) / (image / self.image_tokens)
