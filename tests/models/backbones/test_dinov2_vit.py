"""DINOv2ViT: tokens, masks, freezing, precisions, names, architectures."""

import json

import pytest
import torch
from mmengine.registry import MODELS

from dinov3_mm.models.backbones import DINOV2_ARCHITECTURES, ZOO, DINOv2ViT
from dinov3_mm.models.layers import Linear
from tests.dinov2_toys import GEOMETRY, REGISTERS, SIZES, noise, toy_dinov2
from tests.golden import assert_parity

# Names of a block in the official files.
BLOCK = [
    f"{layer}.{leaf}"
    for layer in ("norm1", "attn.qkv", "attn.proj", "ls1", "norm2")
    for leaf in (("gamma",) if layer == "ls1" else ("weight", "bias"))
]


@pytest.mark.parametrize(
    ("name", "extra", "ffn"),
    [
        ("small", [], ["mlp.fc1", "mlp.fc2"]),
        ("large_reg", ["register_tokens"], ["mlp.fc1", "mlp.fc2"]),
        ("giant_reg", ["register_tokens"], ["mlp.w12", "mlp.w3"]),
    ],
)
def test_names_and_shapes_are_the_official_ones(name, extra, ffn):
    with torch.device("meta"):
        state = DINOv2ViT(arch=name).state_dict()
    depth, dims = DINOV2_ARCHITECTURES[name]["num_layers"], state["cls_token"].shape[-1]
    leaves = [f"{layer}.{leaf}" for layer in ffn for leaf in ("weight", "bias")]
    blocks = [f"blocks.{i}.{n}" for i in range(depth) for n in (*BLOCK, *leaves, "ls2.gamma")]
    top = ["cls_token", "pos_embed", *extra, "mask_token"]
    patch_embed = ["patch_embed.proj.weight", "patch_embed.proj.bias"]
    assert list(state) == [*top, *patch_embed, *blocks, "norm.weight", "norm.bias"]
    assert state["pos_embed"].shape == (1, 1370, dims)
    assert state["mask_token"].shape == (1, dims)
    assert state["patch_embed.proj.weight"].shape == (dims, 3, 14, 14)
    if extra:
        assert state["register_tokens"].shape == (1, 4, dims)
    if "mlp.w12" in ffn:
        assert state["blocks.0.mlp.w12.weight"].shape == (8192, 1536)
        assert state["blocks.0.mlp.w3.weight"].shape == (1536, 4096)


def test_the_zoo_has_the_eight_released_models():
    rows = {name: row for name, row in ZOO.items() if row.backbone == "DINOv2ViT"}
    assert sorted(row.arch for row in rows.values()) == sorted(DINOV2_ARCHITECTURES)
    row = rows["dinov2_vitb14_reg"]
    assert row.file == "dinov2_vitb14_reg4_pretrain.pth"
    assert row.url == f"https://dl.fbaipublicfiles.com/dinov2/dinov2_vitb14/{row.file}"
    assert row.hf_id == "facebook/dinov2-with-registers-base"
    assert row.timm_name == "vit_base_patch14_reg4_dinov2.lvd142m"
    assert rows["dinov2_vitg14"].hf_id == "facebook/dinov2-giant"
    assert rows["dinov2_vitg14"].timm_name == "vit_giant_patch14_dinov2.lvd142m"
    for name, row in rows.items():
        assert name == row.official_name and row.released
        assert (row.licence, row.data) == ("Apache-2.0", "LVD-142M")
    assert all(row.url is None for name, row in ZOO.items() if name not in rows)


def test_registered_with_its_public_attributes():
    model = MODELS.build(dict(type="DINOv2ViT", arch="small_reg"))
    assert isinstance(model, DINOv2ViT)
    assert model.embed_dims == model.num_features == 384
    assert (model.num_layers, model.num_heads) == (12, 6)
    assert model.num_registers == model.num_register_tokens == 4
    assert model.patch_size == model.token_stride == 14
    assert "small_reg" in model.arch_zoo


@torch.no_grad()
@pytest.mark.parametrize("arguments", [{}, REGISTERS])
def test_outputs_agree_with_the_tokens(arguments):
    model, x = toy_dinov2(out_indices=(0, 1), out_type="featmap+cls", **arguments), noise(8, 13)
    tokens = model.forward_tokens(x)
    assert tokens.registers.shape == (2, arguments.get("num_registers", 0), 32)
    featmap, cls = model(x)[-1]
    assert torch.equal(featmap, tokens.patches.mT.reshape(2, 32, 2, 3))
    assert torch.equal(cls, tokens.cls)
    features = model.forward_features(x)
    assert torch.equal(features["x_norm_clstoken"], tokens.cls)
    assert torch.equal(features["x_norm_regtokens"], tokens.registers)
    assert torch.equal(features["x_norm_patchtokens"], tokens.patches)
    assert torch.equal(features["x_prenorm"], tokens.prenorm) and features["masks"] is None
    ((patches, cls_token),) = model.get_intermediate_layers(x, return_class_token=True)
    assert torch.equal(patches, tokens.patches) and torch.equal(cls_token, tokens.cls)


def test_list_equals_single_calls():
    model = toy_dinov2(**REGISTERS)
    images, mask = [noise(8, 12), noise(16, 16, 3), noise(4, 8, 1)], torch.rand(2, 6) < 0.5
    together = model.forward_tokens(images, [mask, None, None])
    for output, x, m in zip(together, images, (mask, None, None), strict=True):
        for a, b in zip(output, model.forward_tokens(x, m)):
            assert_parity(a, b)


@torch.no_grad()
def test_masked_patches_keep_their_position():
    model, mask = toy_dinov2(), torch.ones(2, 16, dtype=torch.bool)
    tokens = model.forward_tokens(noise(16, 16), mask)
    assert torch.equal(model.forward_tokens(noise(16, 16).flip(0), mask).cls, tokens.cls)
    distances = (tokens.patches[0, 1:] - tokens.patches[0, :-1]).abs().amax(-1)
    assert (distances > 0.1).all()


def test_every_parameter_gets_a_gradient():
    for masks in (None, [torch.rand(2, 4) < 0.5, None]):
        model = toy_dinov2(**REGISTERS).train()
        outputs = model.forward_tokens([noise(8, 8), noise(16, 16)], masks)
        sum(t.sum() for output in outputs for t in output).backward()
        assert [n for n, p in model.named_parameters() if p.grad is None] == []


@pytest.mark.parametrize("stages", [-1, 0, 1, 2])
def test_frozen_stages(stages):
    model = toy_dinov2(frozen_stages=stages, **REGISTERS).train()
    frozen = {name for name, p in model.named_parameters() if not p.requires_grad}
    prefixes = ("cls_token", "pos_embed", "register_tokens", "mask_token", "patch_embed.")
    prefixes += tuple(f"blocks.{i}." for i in range(stages)) + ("norm.",) * (stages == 2)
    names = {name for name, _ in model.named_parameters()}
    assert frozen == {name for name in names if stages >= 0 and name.startswith(prefixes)}


def test_drop_path_drops_images_in_training_only():
    model, x = toy_dinov2(drop_path_rate=0.5), noise(16, 16, 4)
    expected = toy_dinov2().forward_tokens(x)
    assert torch.equal(model.forward_tokens(x).cls, expected.cls)
    model.train()
    torch.manual_seed(0)
    block_inputs = []
    model.blocks[0].attn.register_forward_pre_hook(lambda _, args: block_inputs.append(args[1]))
    assert not torch.allclose(model.forward_tokens(x).cls, expected.cls)
    assert block_inputs == [[(2, 17)]]  # two of four images, 1 + 16 tokens each


def test_checkpointing_changes_nothing():
    results = []
    for with_cp in (False, True):
        model = toy_dinov2(with_cp=with_cp, drop_path_rate=0.3, **REGISTERS).train()
        torch.manual_seed(1)
        outputs = model.forward_tokens([noise(16, 16, 6), noise(8, 8, 4)])
        loss = sum((t * t).sum() for output in outputs for t in output)
        results.append(torch.autograd.grad(loss, list(model.parameters())))
    assert all(map(torch.equal, *results))


def test_bf16_and_autocast():
    x = noise(24, 20)
    exact = toy_dinov2(**REGISTERS).forward_tokens(x)
    with torch.autocast("cpu", torch.bfloat16):
        mixed = toy_dinov2(**REGISTERS).forward_tokens(x)
    rounded = toy_dinov2(**REGISTERS).to(torch.bfloat16).forward_tokens(x)
    for a, b, c in zip(exact, mixed, rounded):
        assert b.dtype == c.dtype == torch.bfloat16
        assert_parity(b, a, 5e-2)
        assert_parity(c, a, 5e-2)


@pytest.mark.parametrize("arguments", [{}, REGISTERS])
@pytest.mark.parametrize("size", [(16, 16), (24, 20)])
def test_compiled_and_exported_programs(arguments, size):
    model, x = toy_dinov2(**arguments), noise(*size)
    expected = model.forward_tokens(x).cls
    compiled = torch.compile(model.forward_tokens, backend="eager", fullgraph=True)
    assert_parity(compiled(x).cls, expected)
    program = torch.export.export(model, (x,))
    assert_parity(program.module()(x)[0], model(x)[0])


def test_initialisation_replaces_garbage():
    model = toy_dinov2(**REGISTERS)
    for tensor in model.state_dict().values():
        tensor.fill_(float("nan"))
    model.init_weights()
    assert all(torch.isfinite(tensor).all() for tensor in model.state_dict().values())
    assert (model.mask_token == 0).all() and (model.blocks[0].ls1.gamma == 1e-5).all()
    assert 0.015 < model.pos_embed.std() < 0.025


@pytest.mark.parametrize("name", DINOV2_ARCHITECTURES)
def test_settings_rebuild_the_architecture(name):
    with torch.device("meta"):
        model = DINOv2ViT(arch=name)
        again = DINOv2ViT(arch=json.loads(json.dumps(model.arch_settings)))
    assert again.arch_settings == model.arch_settings == DINOV2_ARCHITECTURES[name]


def test_released_rules_of_resampling():
    for name, row in DINOV2_ARCHITECTURES.items():
        rule = (row["interpolate_offset"], row["interpolate_antialias"])
        assert rule == ((0.0, True) if name.endswith("_reg") else (0.1, False))


def test_no_rope_and_no_bias_mask():
    model = toy_dinov2()
    assert model.rope_embed is None
    assert type(model.blocks[0].attn.qkv) is Linear
    assert not list(model.buffers())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"arch": "smal"}, "did you mean 'small'"),
        ({"arch": {**SIZES, "rope_base": 100.0}}, "unknown key 'rope_base'"),
        ({"arch": SIZES, "img_size": 224, "patch_size": 15}, "img_size 224 is not a multiple"),
        ({"arch": SIZES, "ffn_layer": "swiglu"}, r"expected one of \('mlp', 'swiglufused'\)"),
        ({"arch": SIZES, "interpolate_offset": 1.0}, "interpolate_offset is 1.0"),
        ({"arch": {**SIZES, "num_heads": 3}}, "not a multiple of"),
        ({"arch": SIZES, "out_indices": 2}, "out_indices is 2"),
        ({"arch": SIZES, "frozen_stages": 3}, "frozen_stages is 3"),
    ],
)
def test_errors(arguments, message):
    with pytest.raises(ValueError, match=message):
        DINOv2ViT(**{**GEOMETRY, **arguments})


def test_an_image_smaller_than_a_patch_is_an_error():
    with pytest.raises(ValueError, match=r"one patch \(4 pixels\)"):
        toy_dinov2().forward_tokens(noise(8, 3))
