"""The contrastive objective is CLIP's, but equal captions are not negatives of each other."""

import copy
import math
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import CLIPModel, PreTrainedTokenizerFast

from redux.architecture import TowerSizes
from redux.contrastive import ContrastiveClip, build_clip, contrastive_loss


@pytest.fixture
def clip(tower: TowerSizes, tokenizer: PreTrainedTokenizerFast) -> CLIPModel:
    torch.manual_seed(0)
    return build_clip(tower, tokenizer).eval()


@pytest.fixture(scope="module")
def pairs(tokenizer: PreTrainedTokenizerFast) -> dict[str, Tensor]:
    """Four images, each with another caption; the captions have different lengths."""
    captions = ["A red circle.</s>", "a blue square</s>", "triangle!</s>", "What is it? yes, it is.</s>"]
    encoded = tokenizer(captions, padding=True, return_tensors="pt")
    images = torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    return {"pixel_values": images, "input_ids": encoded["input_ids"], "attention_mask": encoded["attention_mask"]}


def test_the_loss_is_clips_own_where_all_captions_differ(clip: CLIPModel, pairs: dict[str, Tensor]) -> None:
    clip_loss = clip(**pairs, return_loss=True).loss
    loss = ContrastiveClip(copy.deepcopy(clip))(**pairs)
    torch.testing.assert_close(loss, clip_loss)
    assert loss.item() != pytest.approx(math.log(4), abs=1e-4), "blind to the pairs"


def test_the_gradients_are_clips_own(clip: CLIPModel, pairs: dict[str, Tensor]) -> None:
    ours = ContrastiveClip(copy.deepcopy(clip))
    ours(**pairs).backward()
    clip(**pairs, return_loss=True).loss.backward()
    assert ours.scale.grad is not None
    torch.testing.assert_close(ours.scale.grad[0], clip.logit_scale.grad)
    theirs = {name: weight.grad for name, weight in clip.named_parameters() if name != "logit_scale"}
    assert theirs.keys() == dict(ours.clip.named_parameters()).keys()
    for name, weight in ours.clip.named_parameters():
        torch.testing.assert_close(weight.grad, theirs[name])


def test_the_order_of_the_pairs_does_not_matter(clip: CLIPModel, pairs: dict[str, Tensor]) -> None:
    model = ContrastiveClip(clip)
    order = torch.tensor([2, 0, 3, 1])
    permuted = {name: value[order] for name, value in pairs.items()}
    torch.testing.assert_close(model(**permuted), model(**pairs))
    permuted["pixel_values"] = pairs["pixel_values"]
    assert not torch.allclose(model(**permuted), model(**pairs), atol=1e-4), "blind to which image goes with which"


def test_equal_captions_are_no_negatives() -> None:
    """Images 0, 1, 2 share a caption, 3 has its own: logits that say so reach the least loss there can be."""
    captions = torch.tensor([[7, 8], [7, 8], [7, 8], [7, 9]])
    same = (captions.unsqueeze(0) == captions.unsqueeze(1)).all(dim=-1).float()
    least = 3 / 4 * math.log(3)  # Entropy of the targets: three pairs share theirs among three
    assert float(contrastive_loss(100 * same, captions)) == pytest.approx(least, abs=1e-5)
    # To tell equal captions apart costs, and so does to take the different one for equal.
    assert float(contrastive_loss(100 * torch.eye(4), captions)) > least + 1
    assert float(contrastive_loss(torch.zeros(4, 4), captions)) == pytest.approx(math.log(4), abs=1e-5)


def test_the_loss_is_the_mean_over_both_directions() -> None:
    logits = torch.randn(4, 4, generator=torch.Generator().manual_seed(0))
    captions = torch.arange(4).unsqueeze(1)
    rows, columns = (F.cross_entropy(side, torch.arange(4)) for side in (logits, logits.T))
    torch.testing.assert_close(contrastive_loss(logits, captions), (rows + columns) / 2)


def test_what_was_trained_comes_back_from_its_folder(clip: CLIPModel, pairs: dict[str, Tensor], tmp_path: Path) -> None:
    model = ContrastiveClip(clip)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    before = model.scale.item()
    model(**pairs).backward()
    optimizer.step()
    assert model.scale.item() != before
    model.export_clip().save_pretrained(tmp_path)
    again, loading = CLIPModel.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(loading.values())
    torch.testing.assert_close(again.logit_scale, model.scale[0])
    with torch.no_grad():
        output = again.eval()(**pairs, return_loss=True)
        torch.testing.assert_close(output.loss, model(**pairs))
        assert torch.equal(output.logits_per_image, model.export_clip()(**pairs).logits_per_image)


def test_captions_are_read_at_their_end_whatever_the_padding(clip: CLIPModel, pairs: dict[str, Tensor]) -> None:
    ids, mask = pairs["input_ids"], pairs["attention_mask"]
    for row in range(4):
        length = int(mask[row].sum())
        alone = clip.get_text_features(input_ids=ids[row : row + 1, :length]).pooler_output
        together = clip.get_text_features(input_ids=ids, attention_mask=mask).pooler_output[row]
        torch.testing.assert_close(alone[0], together, rtol=1e-4, atol=1e-5)


def test_an_end_of_number_two_is_refused(tower: TowerSizes, tokenizer: PreTrainedTokenizerFast) -> None:
    wrong = copy.deepcopy(tokenizer)
    wrong.eos_token = "<pad>"
    assert wrong.eos_token_id == 2
    with pytest.raises(ValueError, match="tokenizer: </s> has number 2, allowed: any other"):
        build_clip(tower, wrong)
