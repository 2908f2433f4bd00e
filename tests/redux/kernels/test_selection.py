"""The threshold without a sort decides as `select_above_quantile`, ties included."""

from typing import Any

import pytest
import torch

from redux.focus import select_above_quantile
from redux.kernels.masked_attention import make_key_mask
from redux.kernels.selection import drop_below_quantile
from tests.redux.kernels.comparison import DEVICE

LENGTH, FIRST = 14, 4


def decide(kind: str, quantile: Any, gamma: float, padded: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the pairs that the kernel keeps, and those that the plain code keeps."""
    generator = torch.Generator().manual_seed(len(kind))
    is_image = torch.rand(3, LENGTH, generator=generator) < 0.5
    is_image[0, 9:], is_image[1, :3], is_image[2] = False, False, False  # Sequences of several lengths, and none
    columns = is_image.long().argsort(dim=1, descending=True, stable=True)[:, : int(is_image.sum(dim=1).max())]
    valid = is_image.gather(1, columns)
    slots = (is_image.cumsum(dim=1) - 1).masked_fill(~is_image, -1).int()
    focus = torch.randn(3, LENGTH - FIRST, columns.shape[1], generator=generator)
    if kind == "ties":
        focus = (focus * 2).round() / 8  # Also 0 and -0
    elif kind == "equal":
        focus = torch.full_like(focus, 0.25)
    padding = None
    if padded:
        padding = torch.ones(3, LENGTH, dtype=torch.uint8)
        padding[0, :2], padding[1, -1:] = 0, 0
    seen = valid.unsqueeze(1) & (columns.unsqueeze(1) <= torch.arange(FIRST, LENGTH).unsqueeze(1))
    if padding is not None:
        seen &= padding.bool().gather(1, columns).unsqueeze(1)
    kept = select_above_quantile(focus, seen, gamma, quantile) | ~seen
    expected = torch.ones(3, LENGTH, LENGTH, dtype=torch.bool)
    for sequence, row in ((sequence, row) for sequence in range(3) for row in range(FIRST, LENGTH)):
        if not is_image[sequence, row]:
            sequence_columns = columns[sequence][valid[sequence]]
            expected[sequence, row, sequence_columns] = kept[sequence, row - FIRST, : len(sequence_columns)]
    mask = make_key_mask(3, LENGTH, DEVICE)
    focus, columns, valid, slots = (tensor.to(DEVICE) for tensor in (focus, columns, valid, slots))
    padding = padding.to(DEVICE) if padding is not None else None
    drop_below_quantile(mask, focus, columns, valid, slots, gamma, quantile, padding)
    return mask.cpu(), expected


@pytest.mark.parametrize(
    ("kind", "gamma", "padded", "quantile"),
    [
        ("noise", 0.6, False, "lower"),
        ("noise", 0.6, True, "linear"),
        ("noise", 0.45, True, "count"),
        ("ties", 0.5, True, "lower"),
        ("ties", 0.5, True, "linear"),
        ("ties", 0.95, False, "count"),
        ("equal", 0.6, True, "linear"),
        ("equal", 0.6, True, "count"),
    ],
)
def test_the_kernel_decides_as_the_sort(kind: str, gamma: float, padded: bool, quantile: str) -> None:
    mask, expected = decide(kind, quantile, gamma, padded)
    assert torch.equal(mask, expected)
    assert expected.all() == (kind == "equal" and quantile != "count")
