"""The interface of DINOv3ViT: outputs, freezing, checkpointing, dtypes, initialisation."""

import subprocess
import sys

import pytest
import torch
from mmengine.registry import MODELS, WEIGHT_INITIALIZERS
from torch import nn

from dinov3_mm.models.backbones import DINOv3ViT, vit_trunk
from tests.golden import assert_parity

TOY = {"embed_dims": 32, "num_layers": 3, "num_heads": 2, "num_registers": 2, "patch_size": 4}


def build(**kwargs) -> DINOv3ViT:
    """A toy model whose every parameter is visible in the output."""
    torch.manual_seed(0)
    model = DINOv3ViT(arch=TOY, **kwargs)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.3)
    return model.eval()


def image(*size: int) -> torch.Tensor:
    return torch.randn(size[0], 3, *size[1:])


def test_registered_in_the_root_registry():
    model = MODELS.build({"type": "DINOv3ViT", "arch": TOY})
    assert isinstance(model, DINOv3ViT)


def test_import_needs_no_host_package():
    # None in sys.modules makes an import fail; MMEngine itself tries transformers and goes on.
    hosts = dict.fromkeys(("mmpretrain", "mmseg", "mmdet", "transformers", "timm", "xformers"))
    code = f"import sys; sys.modules.update({hosts}); import dinov3_mm.models.backbones"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_public_attributes():
    model = build()
    assert model.embed_dims == model.embed_dim == model.num_features == 32
    assert model.num_layers == model.n_blocks == 3
    assert model.num_registers == model.n_storage_tokens == 2
    assert (model.num_heads, model.patch_size, model.chunked_blocks) == (2, 4, False)
    assert model.cls_norm is None and model.local_cls_norm is None
    assert isinstance(model.head, nn.Identity)


@torch.no_grad()
def test_out_types_agree_with_the_tokens():
    model, x = build(), image(2, 8, 13)
    tokens = model.forward_tokens(x)
    featmap = tokens.patches.transpose(1, 2).view(2, 32, 2, 3)
    expected = {
        "featmap": featmap,
        "cls_token": tokens.cls,
        "avg_featmap": featmap.mean((2, 3)),
        "raw": torch.cat((tokens.cls[:, None], tokens.registers, tokens.patches), 1),
    }
    for out_type, value in expected.items():
        (output,) = build(out_type=out_type)(x)
        assert_parity(output, value)
        assert output.is_contiguous() or out_type == "cls_token"
    ((featmap_output, cls),) = build(out_type="featmap+cls")(x)
    assert torch.equal(featmap_output, featmap) and torch.equal(cls, tokens.cls)


@torch.no_grad()
@pytest.mark.parametrize("norm", [False, True])
def test_out_indices_are_the_intermediate_layers(norm):
    model, x = build(out_indices=(0, -1), final_norm=norm), image(2, 8, 12)
    expected = model.get_intermediate_layers(x, n=[0, 2], reshape=True, norm=norm)
    outputs = model(x)
    assert len(outputs) == 2 and all(map(torch.equal, outputs, expected))
    if not norm:
        assert_parity(outputs[1].flatten(2).mT, model.forward_tokens(x).prenorm[:, 3:])


@torch.no_grad()
def test_intermediate_layers_come_in_ascending_order():
    model, x = build(), image(1, 8, 8)
    shuffled = model.get_intermediate_layers(x, n=[2, 0])
    assert all(map(torch.equal, shuffled, model.get_intermediate_layers(x, n=[0, 2])))
    assert len(model.get_intermediate_layers(x, n=2)) == 2
    for n in ([-1], [1, 1], [3], [], 4, 0):
        with pytest.raises(ValueError, match="distinct block indices"):
            model.get_intermediate_layers(x, n=n)


def test_list_equals_single_calls():
    model = build()
    images, mask = [image(2, 8, 12), image(3, 4, 8), image(1, 16, 4)], torch.rand(2, 6) < 0.5
    together = model.forward_tokens(images, [mask, None, None])
    for output, x, m in zip(together, images, (mask, None, None), strict=True):
        for a, b in zip(output, model.forward_tokens(x, m)):
            assert_parity(a, b)
    dicts = model.forward_features(images, [mask, None, None])
    assert dicts[0]["masks"] is mask and dicts[1]["masks"] is None
    assert torch.equal(dicts[2]["x_prenorm"], together[2].prenorm)


@torch.no_grad()
def test_mask_token_replaces_patches():
    model, x = build(), image(2, 8, 8)
    mask = torch.ones(2, 4, dtype=torch.bool)
    other = model.forward_tokens(image(2, 8, 8), mask)
    assert torch.equal(model.forward_tokens(x, mask).cls, other.cls)
    mask[0, 0] = False
    output = model.forward_tokens(x, mask)
    assert not torch.allclose(output.cls[0], other.cls[0])
    assert torch.equal(output.cls[1], other.cls[1])


def test_every_parameter_gets_a_gradient():
    for masks in (None, [torch.rand(2, 4) < 0.5, None]):
        model = build().train()
        images = [image(2, 8, 8), image(2, 4, 4)]
        sum(t.sum() for output in model.forward_tokens(images, masks) for t in output).backward()
        assert [n for n, p in model.named_parameters() if p.grad is None] == []


def test_local_cls_norm_needs_training_and_the_second_place():
    model = build(untie_global_and_local_cls_norm=True)
    images = [image(2, 8, 8), image(2, 4, 8), image(2, 4, 8)]
    plain = model.forward_tokens(images)
    trained = model.train().forward_tokens(images)
    for index, (a, b) in enumerate(zip(plain, trained)):
        assert torch.equal(a.patches, b.patches)
        assert torch.equal(a.cls, b.cls) == (index != 1)
        assert torch.equal(a.registers, b.registers) == (index != 1)
    expected = model.local_cls_norm(trained[1].prenorm[:, :3])
    assert_parity(trained[1].cls, expected[:, 0])
    assert_parity(trained[1].registers, expected[:, 1:])


def test_checkpointing_changes_nothing():
    images, mask = [image(6, 8, 8), image(4, 4, 8)], torch.rand(6, 4) < 0.5
    results = []
    for with_cp in (False, True):
        model = build(with_cp=with_cp, drop_path_rate=0.3, rope_rescale_coords=2.0).train()
        torch.manual_seed(1)
        outputs = model.forward_tokens(images, [mask, None])
        sum((t * t).sum() for output in outputs for t in output).backward()
        results.append((outputs, [p.grad for p in model.parameters()], torch.rand(3)))
    (outputs, grads, after), (outputs_cp, grads_cp, after_cp) = results
    for a, b in zip(outputs, outputs_cp):
        assert all(map(torch.equal, a, b))
    assert all(map(torch.equal, grads, grads_cp))
    assert torch.equal(after, after_cp)


def test_checkpointing_stores_less():
    def stored(with_cp: bool) -> int:
        sizes = []
        with torch.autograd.graph.saved_tensors_hooks(
            lambda t: sizes.append(t.numel()) or t, lambda t: t
        ):
            build(with_cp=with_cp).train().forward_tokens(image(4, 16, 16))
        return sum(sizes)

    assert stored(True) < 0.4 * stored(False)


@pytest.mark.parametrize("stages", [-1, 0, 2, 3])
def test_frozen_stages(stages):
    model = build(frozen_stages=stages, drop_path_rate=0.5, rope_rescale_coords=2.0).train()
    frozen = {name for name, p in model.named_parameters() if not p.requires_grad}
    expected = set()
    if stages >= 0:
        prefixes = ("cls_token", "storage_tokens", "mask_token", "patch_embed.")
        prefixes += tuple(f"blocks.{i}." for i in range(stages))
        prefixes += ("norm.",) * (stages == 3)
        expected = {name for name, _ in model.named_parameters() if name.startswith(prefixes)}
    assert frozen == expected
    assert [block.training for block in model.blocks] == [i >= stages for i in range(3)]
    x = image(4, 8, 8)
    deterministic = torch.equal(model.forward_tokens(x).cls, model.forward_tokens(x).cls)
    assert deterministic == (stages == 3)
    if stages == 3:
        assert torch.equal(model.forward_tokens(x).cls, model.eval().forward_tokens(x).cls)
    assert not model.eval().blocks[2].training


def test_drop_path_and_augmentation_are_off_in_eval():
    model, x = (
        build(drop_path_rate=0.5, rope_shift_coords=0.1, rope_jitter_coords=1.2),
        image(4, 8, 8),
    )
    expected = build().forward_tokens(x).cls
    assert torch.equal(model.forward_tokens(x).cls, expected)
    assert not torch.allclose(model.train().forward_tokens(x).cls, expected)


@torch.no_grad()
@pytest.mark.parametrize("layers", [(2,), (0, 2)])
def test_chunks_equal_the_whole_batch(layers, monkeypatch):
    model = build(out_indices=layers)
    images = [image(5, 8, 8), image(3, 8, 12)]
    whole = model.forward_tokens(images), model(images[0])
    rows = []
    monkeypatch.setattr(vit_trunk, "_CHUNK_BYTES", 4 * 128 * 20)  # 20 tokens of 128 hidden values
    model.blocks[0].register_forward_pre_hook(lambda _, inputs: rows.append(len(inputs[0])))
    chunked = model.forward_tokens(images), model(images[0])
    assert rows == [14, 14, 7, 18, 9, 14, 14, 7]
    for a, b in zip(whole[0], chunked[0]):
        for x, y in zip(a, b):
            assert_parity(y, x)
    for x, y in zip(whole[1], chunked[1]):
        assert_parity(y, x)
    with torch.enable_grad():
        rows.clear()
        model.forward_tokens(images)
    assert rows == [62]


@pytest.mark.parametrize("rope_dtype", ["fp32", "bf16"])
def test_bf16_model(rope_dtype):
    model, x = build(rope_dtype=rope_dtype), image(2, 8, 12)
    exact = model.forward_tokens(x)
    rounded = model.to(torch.bfloat16).forward_tokens(x)
    for a, b in zip(exact, rounded):
        assert b.dtype == torch.bfloat16
        assert_parity(b, a, 5e-2)


def test_autocast_keeps_the_residual_stream_in_bf16():
    model, x = build().train(), image(2, 8, 12)
    exact = model.forward_tokens(x)
    dtypes = set()
    for module in (*model.blocks, *(block.norm1 for block in model.blocks), model.norm):
        module.register_forward_hook(lambda *args: dtypes.add(args[-1].dtype))
    with torch.autocast("cpu", torch.bfloat16):
        outputs = model.forward_tokens(x)
    assert dtypes == {torch.bfloat16}
    for a, b in zip(exact, outputs):
        assert_parity(b, a, 5e-2)
    sum(t.float().sum() for t in outputs).backward()
    assert {p.grad.dtype for p in model.parameters()} == {torch.float32}


def test_compiled_model_traces_without_a_break():
    model, x = build(), image(2, 8, 12)
    expected = model.forward_tokens(x).cls
    compiled = torch.compile(model.forward_tokens, backend="eager", fullgraph=True)
    assert_parity(compiled(x).cls, expected)


def test_compiled_blocks_train_alike():
    model = build(drop_path_rate=0.3, rope_rescale_coords=2.0).train()
    images, mask = [image(6, 8, 8), image(4, 4, 8)], torch.rand(6, 4) < 0.5

    def gradients() -> list[torch.Tensor]:
        torch.manual_seed(1)
        outputs = model.forward_tokens(images, [mask, None])
        loss = sum((t * t).sum() for output in outputs for t in output)
        return torch.autograd.grad(loss, list(model.parameters()))

    expected = gradients()
    for block in model.blocks:
        block.compile(backend="aot_eager", fullgraph=True)
    for grad, other in zip(gradients(), expected):
        assert_parity(grad, other)


def test_exported_program():
    model, x = build(), image(2, 8, 12)
    program = torch.export.export(model, (x,))
    assert_parity(program.module()(x)[0], model(x)[0])


def test_initialisation_replaces_garbage_and_runs_init_cfg():
    model = DINOv3ViT(arch=TOY, init_cfg={"type": "Constant", "layer": "Linear", "val": 0.5})
    for tensor in model.state_dict().values():
        tensor.fill_(float("nan"))
    model.init_weights()
    assert all(torch.isfinite(t).all() for t in model.state_dict().values())
    assert (model.blocks[0].attn.proj.weight == 0.5).all()
    assert model.is_init


def test_meta_models_initialise_like_others():
    torch.manual_seed(3)
    expected = DINOv3ViT(arch=TOY)
    torch.manual_seed(4)
    expected.init_weights()
    with torch.device("meta"):
        model = DINOv3ViT(arch=TOY)
    model.to_empty(device="cpu")
    torch.manual_seed(4)
    model.init_weights()
    for key, value in expected.state_dict().items():
        assert torch.equal(model.state_dict()[key], value), key


def test_init_cfg_finds_registered_initialisers():
    class MarkCLS:
        def __init__(self, value):
            self.value = value

        def __call__(self, module):
            nn.init.constant_(module.cls_token, self.value)

    WEIGHT_INITIALIZERS.register_module(name="MarkCLSForTest", module=MarkCLS)
    try:
        parent = nn.ModuleList([build(init_cfg={"type": "MarkCLSForTest", "value": 3.0})])
        parent[0].init_weights()
        assert (parent[0].cls_token == 3).all()
    finally:
        WEIGHT_INITIALIZERS.module_dict.pop("MarkCLSForTest")


def test_a_new_model_has_finite_values():
    assert all(torch.isfinite(t).all() for t in DINOv3ViT(arch=TOY).state_dict().values())


@pytest.mark.parametrize(
    "arguments, error, message",
    [
        ((torch.zeros(2, 1, 8, 8),), ValueError, r"expected \(B, 3, H, W\)"),
        ((torch.zeros(3, 8, 8),), ValueError, "images have shape"),
        ((torch.zeros(2, 3, 8, 3),), ValueError, r"one patch \(4 pixels\)"),
        ((torch.zeros(2, 3, 8, 8, dtype=torch.uint8),), TypeError, "normalised floating-point"),
        ((torch.zeros(2, 3, 8, 8), torch.zeros(2, 4)), TypeError, "a mask is torch.float32"),
        ((torch.zeros(2, 3, 8, 8), [None]), TypeError, "a mask is list"),
        ((torch.zeros(2, 3, 8, 8), torch.zeros(2, 5).bool()), ValueError, "one value per patch"),
        (([torch.zeros(2, 3, 8, 8)], [None, None]), ValueError, "1 batches of images and 2 masks"),
        (([],), ValueError, "at least one batch"),
    ],
)
def test_input_errors(arguments, error, message):
    with pytest.raises(error, match=message):
        build().forward_tokens(*arguments)
