"""Linear and DPT heads: released vectors, mmseg's DPT head, the released key sets, errors.

``heads_dpt_chmv2`` is trimmed: it holds the features of the tiny backbone, which other tests hold
against the release, instead of its weights. ``heads_dpt_synthmix`` holds the reassembly alone; the
rest of that decoder is compared with mmseg's ``DPTHead``.
"""

import pytest
import torch
from torch import nn

import dinov3_mm.hosts  # noqa: F401  (before mmseg)
from tests.checkpoints.toys import redraw
from tests.golden import assert_parity, load_golden
from tests.hosts.lane import require_hosts

require_hosts()

from mmengine.registry import DefaultScope  # noqa: E402
from mmseg.models.decode_heads.dpt_head import DPTHead  # noqa: E402

from dinov3_mm.checkpoints.head_names import depth_to_ours, dpt_to_mmseg  # noqa: E402
from dinov3_mm.models.depth import DINOv3DPTDepthHead, DINOv3LinearDepthHead  # noqa: E402

WIDTH = 32
CANOPY = dict(
    channels=16,
    post_process_channels=(8, 12, 16, 20),
    hidden_channels=10,
    readout="project",
    use_batchnorm=False,
    use_bias=True,
    projection_after_fusion=False,
    num_bins=16,
    max_depth=96.0,
    bins="mixlog",
    norm="mixlog",
    zero_is_valid=True,
)
SYNTHMIX = dict(channels=16, post_process_channels=(12, 12, 12, 12), num_bins=16, max_depth=100.0)


def levels(golden: dict) -> list:
    """Recorded features of four layers."""
    return [
        (golden[f"out.enc_patch.{i}"], golden.get(f"out.enc_cls.{i}", torch.zeros(1, WIDTH)))
        for i in range(4)
    ]


def random_levels(size=(5, 7), widths=(WIDTH,) * 4, batch=2) -> list:
    return [(torch.randn(batch, c, *size), torch.randn(batch, c)) for c in widths]


def part(golden: dict, prefix: str) -> dict:
    return {k.removeprefix(prefix): v for k, v in golden.items() if k.startswith(prefix)}


def without_gradients(head: nn.Module) -> nn.Module:
    return head.eval().requires_grad_(False)


@pytest.mark.parametrize(
    "name, options",
    [
        ("bn", dict(use_batchnorm=True)),
        ("cls", dict(use_batchnorm=False, use_cls_token=True)),
    ],
)
def test_released_linear_head(name, options):
    _, golden = load_golden("heads_linear_depth")
    head = without_gradients(DINOv3LinearDepthHead([WIDTH, WIDTH], num_bins=16, **options))
    head.load_state_dict(part(golden, f"sd.{name}."))
    feats = [(golden[f"in.f.{i}.0"], golden[f"in.f.{i}.1"]) for i in range(2)]
    assert_parity(head(feats), golden[f"out.{name}_logits"])


def test_released_canopy_height_head():
    _, golden = load_golden("heads_dpt_chmv2")
    head = without_gradients(DINOv3DPTDepthHead([WIDTH] * 4, **CANOPY))
    head.load_state_dict(depth_to_ours(part(golden, "sd.")))
    feats = levels(golden)
    for i, featmap in enumerate(head.reassemble_blocks(feats)):
        assert_parity(featmap, golden[f"out.reassembled.{i}"])
    assert_parity(head.predict(feats), golden["out.depth"])


def test_released_reassembly_with_batch_norm():
    _, golden = load_golden("heads_dpt_synthmix")
    head = without_gradients(DINOv3DPTDepthHead([WIDTH] * 4, **SYNTHMIX))
    blocks = head.reassemble_blocks
    blocks.load_state_dict(part(golden, "sd.decoder.reassemble_blocks."))
    for i, featmap in enumerate(blocks(levels(golden))):
        assert_parity(featmap, golden[f"out.reassembled.{i}"])


def test_trunk_is_that_of_mmseg():
    head = without_gradients(redraw(DINOv3DPTDepthHead([WIDTH] * 4, **SYNTHMIX), 3))
    with DefaultScope.overwrite_default_scope("mmseg"):
        theirs = DPTHead(
            in_channels=[WIDTH] * 4,
            in_index=[0, 1, 2, 3],
            input_transform="multiple_select",
            embed_dims=WIDTH,
            channels=16,
            post_process_channels=[12] * 4,
            norm_cfg=None,
            num_classes=5,
        )
    missing, unexpected = theirs.load_state_dict(dpt_to_mmseg(head.state_dict()), strict=False)
    assert not unexpected
    assert set(missing) == {"conv_seg.weight", "conv_seg.bias"}
    fused = []
    theirs.cls_seg = fused.append
    feats = random_levels()
    without_gradients(theirs)(feats)
    assert fused[0].abs().max() > 0.1
    assert_parity(fused[0], head.fuse(feats))


def test_canopy_head_has_no_form_in_mmseg():
    head = DINOv3DPTDepthHead([WIDTH] * 4, **CANOPY)
    with pytest.raises(ValueError, match="no biases in its residual units"):
        dpt_to_mmseg(head.state_dict())


@pytest.mark.parametrize("size, expected", [((4, 6), (64, 96)), ((3, 5), (64, 96))])
def test_size_of_dpt_maps(size, expected):
    head = without_gradients(DINOv3DPTDepthHead([WIDTH] * 4, **SYNTHMIX))
    assert head.predict(random_levels(size)).shape == (2, 1, *expected)


def test_add_readout_adds_cls_to_every_patch():
    options = dict(CANOPY, readout="add")
    head = without_gradients(redraw(DINOv3DPTDepthHead([WIDTH] * 4, **options), 2))
    ignoring = without_gradients(DINOv3DPTDepthHead([WIDTH] * 4, **dict(CANOPY, readout="ignore")))
    ignoring.load_state_dict(head.state_dict())
    feats = random_levels()
    added = [(featmap + cls[..., None, None], cls) for featmap, cls in feats]
    torch.testing.assert_close(head(feats), ignoring(added))


def test_pyramid_is_not_rescaled():
    widths = (8, 16, 24, WIDTH)
    head = DINOv3DPTDepthHead(widths, **dict(SYNTHMIX, rescale=False))
    feats = [
        (torch.randn(1, c, 32 // 2**i, 32 // 2**i), torch.randn(1, c)) for i, c in enumerate(widths)
    ]
    assert head.predict(feats).shape == (1, 1, 128, 128)


def test_layers_of_other_sizes_are_resized_to_the_first():
    head = without_gradients(redraw(DINOv3LinearDepthHead([8, 8], num_bins=4), 0))
    first, second = torch.randn(1, 8, 4, 6), torch.randn(1, 8, 2, 3)
    resized = nn.functional.interpolate(second, (4, 6), mode="bilinear")
    assert torch.equal(head([first, second]), head([first, resized]))


def test_initial_weights():
    head = DINOv3LinearDepthHead(512, num_bins=256)
    head.init_weights()
    assert head.conv_depth.weight.detach().std() == pytest.approx(0.01, rel=0.05)
    assert not head.conv_depth.bias.any()
    dpt = DINOv3DPTDepthHead([64] * 4, channels=64)
    dpt.init_weights()
    conv = dpt.fusion_blocks[1].res_conv_unit1.conv1.conv.weight
    assert conv.detach().std() == pytest.approx((2 / (64 * 9)) ** 0.5, rel=0.05)


@pytest.mark.parametrize(
    "feats, message",
    [
        ([torch.randn(1, 16, 4, 4)], r"in_channels=\[16\]"),
        ([torch.randn(1, WIDTH, 4, 4)] * 2, "takes 1 layers, the backbone gives 2"),
        ([torch.randn(1, WIDTH)], "featmap\\+cls"),
        ([torch.randn(1, WIDTH, 4, 4)], "uses CLS, which the backbone does not give"),
    ],
)
def test_features_that_do_not_fit(feats, message):
    head = DINOv3LinearDepthHead(WIDTH, use_cls_token=True)
    with pytest.raises(ValueError, match=message):
        head(feats)


@pytest.mark.parametrize(
    "options, message",
    [
        (dict(readout="projct"), "did you mean 'project'"),
        (dict(post_process_channels=(8, 8, 8)), "takes four layers and makes four maps"),
        (dict(norm="sofmax"), "did you mean 'softmax'"),
        (dict(loss_decode=[dict(type="DINOv3SigLoss")] * 2), "a loss_name of its own"),
    ],
)
def test_options_that_are_wrong(options, message):
    with pytest.raises(ValueError, match=message):
        DINOv3DPTDepthHead([WIDTH] * 4, **options)
