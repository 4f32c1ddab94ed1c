"""The depth estimator: sizes, flips, frozen backbones, resuming, what users type wrong."""

import copy

import pytest
import torch
from mmengine.optim import build_optim_wrapper
from mmengine.registry import MODELS
from mmengine.structures import PixelData
from torch import nn

import dinov3_mm.hosts  # noqa: F401  (before mmseg)
from tests.checkpoints.toys import redraw
from tests.golden import assert_parity
from tests.hosts.lane import require_hosts

require_hosts()

from mmseg.structures import SegDataSample  # noqa: E402

from dinov3_mm.models.depth import DINOv3DepthEstimator  # noqa: E402

ARCH = dict(embed_dims=32, num_layers=4, num_heads=2)
BACKBONE = dict(type="DINOv3ViT", arch=ARCH, out_type="featmap+cls", frozen_stages=4)
HEAD = dict(type="DINOv3LinearDepthHead", in_channels=32, num_bins=8)
PREPROCESSOR = dict(
    type="mmseg.SegDataPreProcessor",
    mean=[120.0] * 3,
    std=[60.0] * 3,
    bgr_to_rgb=True,
    size_divisor=1,
    pad_val=0,
    seg_pad_val=0,
)


def estimator(seed: int = 0, **changes) -> DINOv3DepthEstimator:
    config = dict(
        type="DINOv3DepthEstimator",
        backbone=BACKBONE,
        decode_head=HEAD,
        data_preprocessor=PREPROCESSOR,
    )
    model = MODELS.build(copy.deepcopy({**config, **changes}))
    model.init_weights()
    with torch.no_grad():
        redraw(model, seed)
    return model


def batch(*sizes: tuple[int, int], valid: bool = True) -> dict:
    inputs, samples = [], []
    for height, width in sizes:
        depth = torch.linspace(1, 6, width).repeat(1, height, 1) * valid
        sample = SegDataSample(metainfo=dict(ori_shape=(height, width), img_shape=(height, width)))
        sample.gt_depth_map = PixelData(data=depth)
        inputs.append(torch.randint(0, 256, (3, height, width), dtype=torch.uint8))
        samples.append(sample)
    return dict(inputs=inputs, data_samples=samples)


@pytest.mark.parametrize("input_size", ["pad", "stretch", "keep"])
@pytest.mark.parametrize("size", [(33, 50), (64, 48), (16, 90)])
def test_predictions_have_the_size_of_the_image(input_size, size):
    model = estimator(input_size=input_size)
    (sample,) = model.test_step(batch(size))
    assert sample.pred_depth_map.data.shape == (1, *size)
    assert sample.pred_depth_map.data.min() > 0


def test_prediction_is_resized_to_the_original_image_without_cutting():
    model = estimator()
    inputs = torch.randn(1, 3, 40, 57)
    sample = SegDataSample(metainfo=dict(ori_shape=(80, 114)))
    (predicted,) = model.predict(inputs, [sample])
    expected = nn.functional.interpolate(model(inputs), (80, 114), mode="bilinear")
    assert torch.equal(predicted.pred_depth_map.data, expected[0])
    assert model(inputs).shape == (1, 1, 3, 4)


def test_what_the_preprocessor_padded_is_cut_off():
    model = estimator()
    inputs = torch.randn(1, 3, 48, 64)
    meta = dict(ori_shape=(32, 48), img_padding_size=(0, 16, 0, 16))
    (predicted,) = model.predict(inputs, [SegDataSample(metainfo=meta)])
    whole = nn.functional.interpolate(model(inputs), (48, 64), mode="bilinear")
    torch.testing.assert_close(predicted.pred_depth_map.data, whole[0, :, :32, :48])


def test_flip_is_the_mean_of_both_predictions():
    inputs = torch.randn(1, 3, 40, 57)
    model = estimator()
    flipped = estimator(test_cfg=dict(flip=True))
    (one,), (two,) = model.predict(inputs), model.predict(inputs.flip(-1))
    (mean,) = flipped.predict(inputs)
    expected = (one.pred_depth_map.data + two.pred_depth_map.data.flip(-1)) / 2
    assert_parity(mean.pred_depth_map.data, expected)
    assert (one.pred_depth_map.data - mean.pred_depth_map.data).abs().max() > 1e-3


def test_convnext_and_dpt():
    dims = [8, 16, 24, 32]
    model = estimator(
        backbone=dict(
            type="DINOv3ConvNeXt",
            arch=dict(depths=[1] * 4, dims=dims),
            out_indices=[0, 1, 2, 3],
            out_type="featmap+cls",
        ),
        decode_head=dict(
            type="DINOv3DPTDepthHead",
            in_channels=dims,
            channels=8,
            post_process_channels=[8] * 4,
            num_bins=4,
            rescale=False,
        ),
    )
    assert model.input_multiple == 4
    (sample,) = model.test_step(batch((64, 96)))
    assert sample.pred_depth_map.data.shape == (1, 64, 96)


def test_only_the_head_trains():
    model = estimator()
    wrapper = build_optim_wrapper(model, dict(optimizer=dict(type="AdamW", lr=1e-2)))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    model.train()
    for _ in range(2):
        losses = model.train_step(batch((48, 64), (48, 64)), wrapper)
    assert losses["loss"] > 0
    after = model.state_dict()
    for name, value in before.items():
        assert torch.equal(value, after[name]) == name.startswith("backbone."), name
    heads = {id(parameter) for parameter in model.decode_head.parameters()}
    assert {id(parameter) for parameter in wrapper.optimizer.state} == heads
    assert all(parameter.grad is None for parameter in model.backbone.parameters())


def test_warm_up_of_the_loss_goes_on_after_resuming():
    model = estimator(decode_head=dict(HEAD, loss_decode=dict(type="DINOv3SigLoss", warm_up=2)))
    model.train()
    values = [model(**prepared(model), mode="loss")["loss_sig"].item() for _ in range(3)]
    assert values[0] == pytest.approx(values[1], rel=1e-3)
    assert values[2] > 2 * values[1]
    resumed = estimator(decode_head=dict(HEAD, loss_decode=dict(type="DINOv3SigLoss", warm_up=2)))
    resumed.load_state_dict(model.state_dict())
    resumed.train()
    assert resumed(**prepared(resumed), mode="loss")["loss_sig"].item() > 2 * values[1]


def prepared(model) -> dict:
    torch.manual_seed(7)
    return model.data_preprocessor(batch((48, 64), (48, 64)), training=True)


def test_images_of_other_sizes_are_padded_and_padding_does_not_count():
    model = estimator().eval()
    torch.manual_seed(0)
    data = model.data_preprocessor(batch((48, 64), (32, 48)), training=True)
    assert data["inputs"].shape == (2, 3, 48, 64)
    assert not data["data_samples"][1].gt_depth_map.data[:, 32:].any()
    assert model.loss(**data)["loss_sig"].isfinite()


def test_a_batch_without_any_measurement_trains_nothing():
    model = estimator().train()
    data = model.data_preprocessor(batch((48, 64), valid=False), training=True)
    loss = model.loss(**data)["loss_sig"]
    loss.backward()
    assert loss == 0
    gradients = [parameter.grad for parameter in model.decode_head.parameters()]
    assert all(gradient.isfinite().all() and not gradient.any() for gradient in gradients)


def test_zero_counts_where_it_is_a_height():
    data = batch((48, 64), valid=False)
    head = dict(HEAD, zero_is_valid=True, loss_decode=dict(type="DINOv3DepthL1Loss"))
    model = estimator(decode_head=head, data_preprocessor=dict(PREPROCESSOR, seg_pad_val=-1))
    assert model.loss(**model.data_preprocessor(data, training=True))["loss_l1"] > 0.1


def test_samples_without_depth():
    model = estimator()
    data = batch((48, 64))
    del data["data_samples"][0].gt_depth_map
    with pytest.raises(ValueError, match="LoadDepthMap"):
        model.loss(**model.data_preprocessor(data, training=True))


@pytest.mark.parametrize(
    "changes, message",
    [
        (dict(input_size="padd"), "did you mean 'pad'"),
        (dict(pretrained="weights.pth"), "DINOv3Pretrained"),
        (dict(test_cfg=dict(filp=True)), "did you mean 'flip'"),
        (dict(data_preprocessor=dict(PREPROCESSOR, seg_pad_val=255)), "set seg_pad_val=0"),
        (dict(decode_head=dict(HEAD, zero_is_valid=True)), "set seg_pad_val=-1"),
    ],
)
def test_options_that_are_wrong(changes, message):
    with pytest.raises(ValueError, match=message):
        estimator(**changes)


def test_head_of_another_width():
    model = estimator(decode_head=dict(HEAD, in_channels=48))
    with pytest.raises(ValueError, match=r"in_channels=\[32\]"):
        model.test_step(batch((48, 64)))
