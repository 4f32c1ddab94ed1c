"""Sliding windows, flips and whole images against recorded results of the official inference."""

import pytest
import torch
from mmengine.config import ConfigDict
from torch import nn
from torch.nn import functional as F

from tests.golden import assert_parity, load_golden
from tests.hosts.lane import require_hosts

require_hosts()
from mmseg.structures import SegDataSample  # noqa: E402

from dinov3_mm.models.segmentation import DINOv3PaddedEncoderDecoder  # noqa: E402

_, GOLDEN = load_golden("heads_slide")
WINDOWS = dict(mode="slide", crop_size=(32, 32), stride=(21, 21))


class Resizer(nn.Module):
    """The head of the toy: what comes from the convolution, at the size of the image."""

    def predict(self, x, metas, test_cfg):
        return F.interpolate(x, tuple(metas[0]["img_shape"]), mode="bilinear")


class Toy(DINOv3PaddedEncoderDecoder):
    """A segmentor whose network is the recorded toy convolution."""

    def __init__(self, **test_cfg):
        nn.Module.__init__(self)
        self.conv = nn.Conv2d(3, 4, 5, stride=4, padding=2)
        self.conv.weight.data = GOLDEN["sd.toy.c.weight"]
        self.conv.bias.data = GOLDEN["sd.toy.c.bias"]
        self.size_divisor = 1
        self.out_channels, self.align_corners = 4, False
        self.test_cfg = ConfigDict(test_cfg)
        self.decode_head = Resizer()

    def extract_feat(self, inputs):
        return self.conv(inputs)

    @torch.no_grad()
    def merged(self, image):
        return self.inference(image, [{"ori_shape": tuple(image.shape[-2:])}])


@pytest.mark.parametrize(
    ("image", "expected", "step"),
    [("x", "lin_slide", 3), ("x_mixed", "lin_mixed", 3), ("x_small", "lin_small", 1)],
)
def test_windows(image, expected, step):
    """An image larger than the window, one smaller in height, and one smaller in both."""
    logits = Toy(**WINDOWS).merged(GOLDEN[f"in.{image}"])[..., ::step, ::step]
    print(f"{expected}: {assert_parity(logits, GOLDEN[f'out.{expected}']):.1e}")


def test_resized_to_the_original():
    """After the windows mmseg resizes to the original's 55 x 90 pixels; what is recorded is after
    the softmax of that."""
    toy = Toy(**WINDOWS)
    logits = toy.merged(GOLDEN["in.x"])
    sample = SegDataSample(metainfo={"ori_shape": (55, 90), "img_shape": (40, 70)})
    (result,) = toy.postprocess_result(logits, [sample])
    full = result.seg_logits.data[None, :, ::5, ::5]
    print(f"lin_full: {assert_parity(full.softmax(1), GOLDEN['out.lin_full']):.1e}")
