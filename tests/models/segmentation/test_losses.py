"""Training losses against recorded values of the official trainer, and empty label maps."""

import pytest
import torch
from mmengine.structures import PixelData

from tests.golden import assert_parity, load_golden
from tests.hosts.lane import require_hosts

require_hosts()
from mmseg.models.losses import CrossEntropyLoss  # noqa: E402
from mmseg.structures import SegDataSample  # noqa: E402

from dinov3_mm.models.segmentation import DINOv3DiceLoss, DINOv3LinearSegHead  # noqa: E402

_, GOLDEN = load_golden("heads_seg_losses")


def test_cross_entropy_over_all_pixels():
    loss = CrossEntropyLoss()(GOLDEN["in.logits"], GOLDEN["in.target"], ignore_index=255)
    print(f"cross entropy: {assert_parity(loss, GOLDEN['out.ce']):.1e}")


def test_dice():
    loss = DINOv3DiceLoss()(GOLDEN["in.logits"], GOLDEN["in.target"])
    print(f"dice: {assert_parity(loss, GOLDEN['out.dice']):.1e}")
    weighted = DINOv3DiceLoss(loss_weight=2.0)(GOLDEN["in.logits"], GOLDEN["in.target"])
    assert weighted.item() == pytest.approx(2 * loss.item())
    with pytest.raises(ValueError, match="sampler=None"):
        DINOv3DiceLoss()(GOLDEN["in.logits"], GOLDEN["in.target"], weight=torch.ones(1))


@pytest.mark.parametrize("kind", ["CrossEntropyLoss", "DINOv3DiceLoss"])
def test_maps_with_nothing_to_learn_from(kind):
    """All ignored, or of one class only: finite losses, and no gradient from the former."""
    head = DINOv3LinearSegHead(8, 5, loss_decode={"type": kind})
    features = [torch.randn(2, 8, 4, 4)]

    def gradient(label):
        sample = SegDataSample(gt_sem_seg=PixelData(data=torch.full((1, 32, 32), label)))
        head.zero_grad()
        losses = head.loss(features, [sample, sample], {})
        (loss,) = [value for name, value in losses.items() if name.startswith("loss")]
        loss.backward()
        assert torch.isfinite(loss)
        assert all(torch.isfinite(parameter.grad).all() for parameter in head.parameters())
        return head.conv_seg.weight.grad.abs().max().item()

    assert gradient(3) > 0
    if kind == "CrossEntropyLoss":
        assert gradient(255) == 0
    else:
        gradient(255)
