"""SimpleFeaturePyramid: shapes, and values from matrix products, pixel shuffles and maxima."""

import pytest
import torch
from mmengine.registry import MODELS
from torch import Tensor
from torch.nn import functional as F

from dinov3_mm.models.adapters import SimpleFeaturePyramid
from tests.checkpoints.toys import redraw
from tests.golden import assert_parity


def build(**arguments) -> SimpleFeaturePyramid:
    """A pyramid of 8 to 6 channels with every parameter redrawn."""
    arguments = {"in_channels": 8, "out_channels": 6, **arguments}
    neck = MODELS.build({"type": "SimpleFeaturePyramid", **arguments})
    neck.init_weights()
    return redraw(neck)


def norm(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """LayerNorm of the channels of (B, C, H, W) from its definition."""
    x = x - x.mean(1, keepdim=True)
    x = x / (x.square().mean(1, keepdim=True) + 1e-6).sqrt()
    return x * weight[:, None, None] + bias[:, None, None]


def upsample(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """Transposed convolution with kernel and stride 2: a matrix product and a pixel shuffle."""
    pixels = torch.einsum("bchw,cdij->bdijhw", x, weight) + bias[:, None, None, None, None]
    return F.pixel_shuffle(pixels.flatten(1, 3), 2)


def halve(x: Tensor) -> Tensor:
    """Maxima of 2 x 2 windows; a last odd row or column is left out."""
    rows, columns = x.shape[2] // 2, x.shape[3] // 2
    x = x[:, :, : 2 * rows, : 2 * columns]
    return x.reshape(*x.shape[:2], rows, 2, columns, 2).amax((3, 5))


def project(x: Tensor, parameters: list[Tensor]) -> Tensor:
    """1x1 convolution, norm, 3x3 convolution, norm."""
    weight1, scale1, shift1, weight3, scale3, shift3 = parameters
    x = norm(torch.einsum("bchw,dc->bdhw", x, weight1[:, :, 0, 0]), scale1, shift1)
    columns = F.unfold(x, 3, padding=1)
    x = (weight3.flatten(1) @ columns).unflatten(2, x.shape[2:])
    return norm(x, scale3, shift3)


@torch.no_grad()
def test_values_of_every_level():
    neck = build(in_stride=16, strides=(4, 8, 16, 32, 64))
    x = torch.randn(2, 8, 5, 8)
    quarter, half, same, double, quadruple = (
        list(level.state_dict().values()) for level in neck.levels
    )
    finer = upsample(F.gelu(norm(upsample(x, *quarter[:2]), *quarter[2:4])), *quarter[4:6])
    expected = [
        project(finer, quarter[6:]),
        project(upsample(x, *half[:2]), half[2:]),
        project(x, same),
        project(halve(x), double),
        project(halve(halve(x)), quadruple),
    ]
    outputs = neck((torch.full_like(x, torch.nan), x))  # the last map counts
    assert len(outputs) == 5
    for actual, reference in zip(outputs, expected):
        assert_parity(actual, reference)
        assert actual.is_contiguous()


@pytest.mark.parametrize(
    ("in_stride", "strides", "expected"),
    [
        (16, None, (4, 8, 16, 32)),
        (14, None, (3.5, 7, 14, 28)),
        (8, (4, 8, 16, 32), (4, 8, 16, 32)),
    ],
)
@torch.no_grad()
def test_levels_have_the_strides_they_state(in_stride, strides, expected):
    neck = build(in_stride=in_stride, strides=strides, num_outs=5)
    assert neck.strides == (*expected, 2 * expected[-1])
    side = 16
    outputs = neck(torch.randn(1, 8, side, side))
    sizes = [round(side * in_stride / stride) for stride in neck.strides]
    assert [tuple(output.shape) for output in outputs] == [(1, 6, size, size) for size in sizes]
    assert torch.equal(outputs[-1], F.max_pool2d(outputs[-2], 1, stride=2))


def test_the_dtype_of_the_map_is_kept_and_gradients_arrive():
    neck = build().bfloat16()
    outputs = neck(torch.randn(1, 8, 4, 4, dtype=torch.bfloat16))
    assert {output.dtype for output in outputs} == {torch.bfloat16}
    sum(output.sum() for output in outputs).backward()
    assert all(parameter.grad is not None for parameter in neck.parameters())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            {"in_stride": 14, "strides": (4, 8)},
            r"stride 14 has no level of stride 4; .* 3.5, 7, 14",
        ),
        ({"strides": (2, 4)}, "no level of stride 2"),
        ({"strides": (0, 4)}, "no level of stride 0"),
        ({"strides": (8, 4)}, "expected distinct strides, ascending"),
        ({"strides": ()}, "expected distinct strides, ascending"),
        ({"num_outs": 3}, "num_outs is 3 for 4 levels"),
    ],
)
def test_wrong_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        SimpleFeaturePyramid(8, 6, **arguments)
