"""The interface of DINOv3ConvNeXt: outputs, freezing, checkpointing, dtypes, wrong arguments."""

import copy

import pytest
import torch
from mmengine.registry import MODELS
from torch import nn

from dinov3_mm.models.backbones import CONVNEXT_ARCHITECTURES, DINOv3ConvNeXt, DINOv3ViT
from dinov3_mm.models.layers import Linear, convnext_block
from tests.golden import assert_parity
from tests.parity.backbone_oracles import redraw

DIMS = (8, 12, 16, 24)
TOY = {"depths": [1, 1, 2, 1], "dims": list(DIMS)}


def build(**kwargs) -> DINOv3ConvNeXt:
    """A toy model whose every parameter is visible in the output."""
    torch.manual_seed(0)
    return redraw(DINOv3ConvNeXt(arch=TOY, **kwargs))


def image(*size: int) -> torch.Tensor:
    return torch.randn(size[0], 3, *size[1:])


def test_registered_in_the_root_registry():
    assert isinstance(MODELS.build({"type": "DINOv3ConvNeXt", "arch": TOY}), DINOv3ConvNeXt)


def test_public_attributes():
    model = build(patch_size=16)
    assert model.embed_dims == model.embed_dim == model.num_features == 24
    assert model.feature_dims == DIMS
    assert model.num_layers == model.n_blocks == 4
    assert model.num_registers == model.n_storage_tokens == 0
    assert (model.patch_size, model.input_pad_size, model.token_stride) == (16, 4, 32)
    assert build().patch_size is None and model.chunked_blocks is False
    assert DINOv3ViT("tiny", patch_size=8).token_stride == 8


def test_settings_rebuild_the_architecture():
    for changes in ({}, {"patch_size": 16, "in_channels": 2, "layer_scale_init_value": 0.0}):
        model = build(**changes)
        twin = DINOv3ConvNeXt(arch=model.arch_settings)
        assert twin.arch_settings == model.arch_settings
        twin.load_state_dict(model.state_dict())
    assert model.arch_settings["layer_scale_init_value"] == 0.0
    assert not any("gamma" in name for name in model.state_dict())
    for name, settings in CONVNEXT_ARCHITECTURES.items():
        with torch.device("meta"):
            assert DINOv3ConvNeXt(name).arch_settings == settings


@torch.no_grad()
def test_out_types_agree_with_the_tokens():
    model, x = build(), image(2, 64, 101)
    tokens = model.forward_tokens(x)
    featmap = tokens.patches.mT.unflatten(2, (2, 3))
    expected = {
        "featmap": featmap,
        "cls_token": tokens.cls,
        "avg_featmap": featmap.mean((2, 3)),
        "raw": torch.cat((tokens.cls[:, None], tokens.patches), 1),
    }
    for out_type, value in expected.items():
        (output,) = build(out_type=out_type)(x)
        assert_parity(output, value)
        assert output.is_contiguous()
    ((featmap_output, cls),) = build(out_type="featmap+cls")(x)
    assert_parity(featmap_output, featmap)
    assert_parity(cls, tokens.cls)
    assert tokens.registers.shape == (2, 0, 24) and tokens.prenorm.shape == (2, 6, 24)


@torch.no_grad()
@pytest.mark.parametrize("norm", [False, True])
def test_out_indices_are_the_pyramid_and_the_intermediate_layers(norm):
    model, x = build(out_indices=(0, 1, 2, -1), final_norm=norm), image(2, 64, 96)
    outputs = model(x)
    for stride, dims, output in zip((4, 8, 16, 32), DIMS, outputs, strict=True):
        assert output.shape == (2, dims, 64 // stride, 96 // stride)
    expected = model.get_intermediate_layers(x, n=4, reshape=True, norm=norm)
    assert all(map(torch.equal, outputs, expected))
    (single,) = build(out_indices=1)(x)
    assert torch.equal(single, outputs[1])


@torch.no_grad()
def test_intermediate_layers():
    model, x = build(patch_size=8), image(1, 70, 64)
    shuffled = model.get_intermediate_layers(x, n=[3, 0], return_class_token=True)
    ordered = model.get_intermediate_layers(x, n=[0, 3], return_class_token=True)
    for (patches, cls), (other, other_cls), dims in zip(shuffled, ordered, (8, 24), strict=True):
        assert torch.equal(patches, other) and torch.equal(cls, other_cls)
        assert patches.shape == (1, 8 * 8, dims)
    for n in ([-1], [1, 1], [4], [], 5, 0):
        with pytest.raises(ValueError, match="distinct stage indices"):
            model.get_intermediate_layers(x, n=n)
    with pytest.raises(TypeError, match="return_extra_tokens"):
        model.get_intermediate_layers(x, return_extra_tokens=True)


def test_patch_size_changes_no_tokens():
    x = image(1, 64, 64)
    with torch.no_grad():
        for a, b in zip(build().forward_tokens(x), build(patch_size=16).forward_tokens(x)):
            assert torch.equal(a, b)


@torch.no_grad()
def test_a_list_of_sizes_equals_single_calls_and_ignores_masks():
    model = build()
    images = [image(2, 64, 96), image(3, 32, 33), image(1, 100, 36)]
    mask = torch.ones(2, 24, dtype=torch.bool)
    together = model.forward_tokens(images, [mask, None, None])
    for output, x in zip(together, images, strict=True):
        assert all(map(torch.equal, output, model.forward_tokens(x)))
    dicts = model.forward_features(images, [mask, None, None])
    assert dicts[0]["masks"] is mask and dicts[1]["masks"] is None
    assert torch.equal(dicts[0]["x_norm_clstoken"], together[0].cls)
    assert torch.equal(dicts[2]["x_prenorm"], together[2].prenorm)
    single = model.forward_features(images[0], mask)
    assert single["masks"] is mask


def test_the_final_norm_is_one_module_under_two_names():
    model = build()
    names = [name for name, _ in model.named_parameters()]
    assert "norm.weight" in names and "norms.3.weight" not in names
    with torch.device("meta"):
        empty = DINOv3ConvNeXt(arch=TOY)
    for other in (model, copy.deepcopy(model), empty, empty.to_empty(device="cpu")):
        state = other.state_dict(keep_vars=True)
        assert state["norm.weight"] is state["norms.3.weight"] is other.norm.weight
    other.load_state_dict(model.state_dict())
    x = image(1, 32, 32)
    with torch.no_grad():
        assert torch.equal(other.eval().forward_tokens(x).cls, model.forward_tokens(x).cls)


def test_every_parameter_gets_a_gradient_and_no_pass_differs():
    x = image(2, 64, 64)
    results = []
    for with_cp in (False, True):
        model = build(with_cp=with_cp, drop_path_rate=0.5).train()
        torch.manual_seed(1)
        output = model.forward_tokens([x, image(2, 32, 32)])
        sum((t * t).sum() for tokens in output for t in tokens).backward()
        assert [n for n, p in model.named_parameters() if p.grad is None] == []
        # DDP's buckets have the strides of the parameters.
        assert all(p.grad.stride() == p.stride() for p in model.parameters())
        results.append([p.grad for p in model.parameters()] + [torch.rand(3)])
    assert all(map(torch.equal, *results))


@torch.no_grad()
def test_inference_equals_the_differentiable_pass(monkeypatch):
    monkeypatch.setattr(convnext_block, "_CHUNK_BYTES", 4000)
    model, x = build(), image(3, 64, 96)
    with torch.enable_grad():
        expected = model.forward_tokens(x)
    for actual, wanted in zip(model.forward_tokens(x), expected):
        assert_parity(actual, wanted.detach())


def test_stochastic_depth_rises_from_zero_and_is_off_in_eval():
    model = build(drop_path_rate=0.4)
    rates = [block.drop_rate for stage in model.stages for block in stage]
    assert rates == pytest.approx([0, 0.1, 0.2, 0.3, 0.4])
    x = image(2, 32, 32)
    assert torch.equal(model.forward_tokens(x).cls, build().forward_tokens(x).cls)
    scale = model.train().stages[3][0].draw_scale(1000, torch.device("cpu"))
    assert scale.unique().tolist() == pytest.approx([0, 1 / 0.6])
    assert 500 < (scale > 0).sum() < 700


@pytest.mark.parametrize("frozen", range(-1, 5))
def test_frozen_stages(frozen):
    model = build(frozen_stages=frozen, drop_path_rate=0.5).train()
    parts = [(model.downsample_layers[k], model.stages[k]) for k in range(4)]
    for stage, pair in enumerate(parts):
        for part in pair:
            assert part.training == (stage >= frozen)
            assert all(p.requires_grad == (stage >= frozen) for p in part.parameters())
    assert model.norm.weight.requires_grad == (frozen < 4)
    if frozen < 4:
        model.forward_tokens(image(2, 32, 32)).cls.sum().backward()
        assert (model.downsample_layers[0][0].weight.grad is None) == (frozen > 0)


@pytest.mark.parametrize("grad", [False, True])
def test_bf16_autocast(grad):
    model, x = build(), image(2, 64, 64)
    with torch.set_grad_enabled(grad):
        exact = model.forward_tokens(x).cls
        with torch.autocast("cpu", torch.bfloat16):
            output = model.forward_tokens(x)
    assert (output.cls - exact).abs().mean() < 0.02
    assert not torch.equal(output.cls.float(), exact)


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_linear_equals_the_one_of_torch(dtype):
    layer = Linear(24, 40).to(dtype)
    for shape in ((24,), (7, 24), (2, 3, 5, 24)):
        x = torch.randn(shape, dtype=dtype)
        assert_parity(layer(x), nn.functional.linear(x, layer.weight, layer.bias), 1e-2)
        exact = nn.functional.linear(x.double(), layer.weight.double(), layer.bias.double())
        assert_parity(layer(x), exact, 1e-6 if dtype == torch.float32 else 4e-3)


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"arch": "tinny"}, "did you mean 'tiny'"),
        ({"arch": {**TOY, "width": 3}}, "unknown key 'width'"),
        ({"arch": {"depths": [1, 1, 1, 1]}}, "lacks dims"),
        ({"arch": {**TOY, "dims": [8, 16, 32]}}, r"dims is \[8, 16, 32\]; expected"),
        ({"arch": {**TOY, "depths": [1, 0, 1, 1]}}, r"depths is \[1, 0, 1, 1\]; expected"),
        ({"arch": TOY, "out_type": "tokens"}, "out_type is 'tokens'"),
        ({"arch": TOY, "out_indices": (4,)}, r"distinct stages out of 4"),
        ({"arch": TOY, "out_indices": (2, 1)}, r"ascending"),
        ({"arch": TOY, "frozen_stages": 5}, "expected -1 to 4"),
        ({"arch": TOY, "drop_path_rate": 1.0}, r"drop_path_rate is 1\.0"),
    ],
)
def test_wrong_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        DINOv3ConvNeXt(**arguments)


def test_wrong_images():
    model = build()
    for x in (image(1, 31, 64), torch.zeros(3, 64, 64), torch.zeros(1, 1, 64, 64)):
        with pytest.raises(ValueError, match=r"expected \(B, 3, H, W\) with sides of at least 32"):
            model.forward_tokens(x)
    with pytest.raises(ValueError, match="at least one"):
        model.forward_tokens([])
    with pytest.raises(TypeError, match=r"dtype torch\.uint8"):
        model(torch.zeros(1, 3, 64, 64, dtype=torch.uint8))
    assert build(out_indices=0)(image(1, 8, 4))[0].shape == (1, 8, 2, 1)
