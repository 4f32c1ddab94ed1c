"""Batch-subset stochastic depth."""

import pytest
import torch
from torch import nn

from dinov3_mm.models.layers import (
    Block,
    ImageSubset,
    RotaryEmbedding2D,
    draw_subset,
    draw_subsets,
)
from tests.golden import assert_parity

SHAPES, GRIDS = [(5, 5), (3, 8)], [(2, 2), (1, 7)]


def _block(**kwargs) -> tuple[Block, torch.Tensor, list]:
    block = Block(16, 2, layer_scale_init_value=0.7, **kwargs)
    for parameter in block.parameters():
        nn.init.normal_(parameter, std=0.5)
    rope = RotaryEmbedding2D(8)
    return block, torch.randn(49, 16, requires_grad=True), [rope(*grid) for grid in GRIDS]


@pytest.mark.parametrize(
    "images, rate, kept", [(90, 0.3, 62), (10, 0.9, 1), (5, 0.4, 3), (1, 0.5, 1), (4, 0.0, 4)]
)
def test_number_of_kept_images(images, rate, kept):
    subset = draw_subset([(images, 7)], rate, torch.device("cpu"))
    assert subset.shapes == [(kept, 7)] and subset.scales == [images / kept]
    assert len(set(subset.indices[0].tolist())) == kept


def test_one_draw_gives_every_branch_subsets_of_its_own():
    """Each image is kept as often as any other, within five standard deviations."""
    count, shapes = 4000, [(10, 3), (4, 7), (1, 2)]
    subsets = draw_subsets(shapes, 0.3, torch.device("cpu"), count)
    one = draw_subset(shapes, 0.3, torch.device("cpu"))
    assert len(subsets) == count
    for entry, (images, _) in enumerate(shapes):
        kept = one.shapes[entry][0]
        frequency = torch.zeros(images)
        for subset in subsets:
            assert (subset.shapes, subset.scales) == (one.shapes, one.scales)
            index = subset.indices[entry]
            assert index.dtype == torch.int64 and len(set(index.tolist())) == len(index) == kept
            frequency[index] += 1
        share = kept / images
        deviation = 5 * (count * share * (1 - share)) ** 0.5
        assert (frequency - count * share).abs().max() <= deviation
    # Branches are independent: neighbours agree on an image as often as chance has it.
    kept = torch.zeros(count, 10)
    kept.scatter_(1, torch.stack([subset.indices[0] for subset in subsets]), 1)
    both = (kept[1:] * kept[:-1]).mean()
    assert abs(both - 0.49) < 0.02


def test_subset_equals_masked_residuals():
    """Computing a branch on a subset equals computing it for all and scaling or zeroing it."""
    block, x, tables = _block()
    subsets = [
        ImageSubset([torch.tensor([4, 0]), torch.tensor([1])], [(2, 5), (1, 8)], [2.5, 3.0]),
        ImageSubset([torch.tensor([3]), torch.tensor([2, 0])], [(1, 5), (2, 8)], [5.0, 1.5]),
    ]

    def factor(subset: ImageSubset) -> torch.Tensor:
        parts = []
        for (images, tokens), index, scale in zip(SHAPES, subset.indices, subset.scales):
            keep = torch.zeros(images)
            keep[index] = scale
            parts.append(keep.repeat_interleave(tokens))
        return torch.cat(parts)[:, None]

    branch = block.ls1(block.attn(block.norm1(x), SHAPES, tables))
    expected = x + factor(subsets[0]) * branch
    expected = expected + factor(subsets[1]) * block.ls2(block.mlp(block.norm2(expected)))
    actual = block(x, SHAPES, tables, *subsets)
    assert_parity(actual, expected)
    weight = torch.randn_like(expected)
    parameters = [x, *block.parameters()]
    expected_grads = torch.autograd.grad((expected * weight).sum(), parameters)
    for grad, other in zip(
        torch.autograd.grad((actual * weight).sum(), parameters), expected_grads
    ):
        assert_parity(grad, other)


def test_without_layer_scale():
    block, x, tables = _block()
    plain = Block(16, 2)
    assert not any("ls" in key for key in plain.state_dict())
    state = {k: v for k, v in block.state_dict().items() if "ls" not in k}
    plain.load_state_dict(state)
    for layer_scale in (block.ls1, block.ls2):
        nn.init.ones_(layer_scale.gamma)
    assert_parity(plain(x, SHAPES, tables), block(x, SHAPES, tables))
