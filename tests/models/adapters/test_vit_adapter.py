"""The ViT adapter: released vectors and manifest, gradients, frozen parts, errors.

``heads_mask2former`` holds parts of the reference vectors; its JSON file says which. With
``DINOV3_MM_GOLDEN`` naming the folder of the complete vectors they are compared as well.
"""

import json
import os
from pathlib import Path

import pytest
import torch
from mmengine.registry import MODELS
from safetensors.torch import load_file
from torch import nn

from dinov3_mm.checkpoints.heads import export_head, load_head
from tests.checkpoints.toys import redraw
from tests.golden import assert_parity, load_golden
from tests.hosts.lane import require_hosts

require_hosts()

from mmcv.ops.multi_scale_deform_attn import MultiScaleDeformableAttention  # noqa: E402

from dinov3_mm.models.adapters.vit_adapter import (  # noqa: E402
    DeformableAttention,
    DINOv3ViTAdapter,
)

ARCH = {"embed_dims": 32, "num_layers": 4, "num_heads": 2, "ffn_ratio": 2}
KIND = "mask2former_adapter"
SMALL = {"conv_channels": 8, "num_heads": 4}
MANIFEST = Path(__file__).parents[2] / "data/manifest_mask2former.json"
COMPLETE = os.environ.get("DINOV3_MM_GOLDEN")


def make(frozen=4, backbone=None, **arguments):
    """A small adapter, redrawn, with running statistics that are not the initial ones."""
    config = {"type": "DINOv3ViT", "arch": ARCH, "frozen_stages": frozen, **(backbone or {})}
    adapter = DINOv3ViTAdapter(config, interaction_indexes=[0, 1, 2, 3], **{**SMALL, **arguments})
    return redraw(adapter, seed=2)


def pictures(batch=2, size=(64, 96), seed=0):
    return torch.randn(batch, 3, *size, generator=torch.Generator().manual_seed(seed))


class Recorded(nn.Module):
    """A ViT that returns recorded tokens."""

    embed_dims, num_layers, patch_size = 32, 4, 16

    def __init__(self, tokens):
        super().__init__()
        self.arch_settings = {"in_channels": 3}
        self.tokens = tokens

    def get_intermediate_layers(self, x, *, n, norm):
        assert norm
        return [self.tokens[index] for index in n]


def part(tensors, prefix):
    return {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}


def test_recorded_vectors():
    tensors = part(load_golden("heads_mask2former")[1], "adapter.")
    backbone = Recorded([tensors[f"in.tokens.{i}"] for i in range(4)])
    adapter = DINOv3ViTAdapter(backbone, interaction_indexes=[0, 1, 2, 3], **SMALL)
    adapter.load_state_dict(part(tensors, "sd."))
    with torch.no_grad():
        outputs = adapter.eval()(tensors["in.x"])
    assert_parity(outputs[0][:, ::8], tensors["out.f.1"])
    for index in (1, 2, 3):
        assert_parity(outputs[index], tensors[f"out.f.{index + 1}"])


@pytest.mark.skipif(
    COMPLETE is None, reason="needs the complete vectors; DINOV3_MM_GOLDEN names their folder"
)
def test_complete_recorded_vectors():
    tensors = load_file(Path(COMPLETE) / "heads_adapter.safetensors")
    arch = {**ARCH, "norm_layer": "layernormbf16", "num_registers": 4}
    adapter = make(backbone={"arch": arch})
    adapter.load_state_dict(part(tensors, "sd."))
    with torch.no_grad():
        outputs = adapter.eval()(tensors["in.x"])
    for index, output in enumerate(outputs):
        assert_parity(output, tensors[f"out.f.{index + 1}"])


def test_deformable_attention_recorded_vectors():
    description, tensors = load_golden("heads_msdeform")
    kwargs = description["kwargs"]
    attention = DeformableAttention(
        embed_dims=kwargs["d_model"],
        num_levels=kwargs["n_levels"],
        num_heads=kwargs["n_heads"],
        num_points=kwargs["n_points"],
        value_proj_ratio=kwargs["ratio"],
        dropout=0.0,
        batch_first=True,
    )
    assert_parity(attention.sampling_offsets.bias, tensors["out.init_sampling_bias"], 1e-6)
    attention.load_state_dict(part(tensors, "sd."))
    names = ("query", "value", "ref", "spatial_shapes", "level_start_index")
    assert_parity(attention.attend(*(tensors[f"in.{name}"] for name in names)), tensors["out.y"])


@torch.no_grad()
def test_deformable_attention_in_place_of_the_hosts():
    arguments = {"embed_dims": 16, "num_levels": 2, "num_heads": 4, "dropout": 0.0}
    theirs = redraw(MultiScaleDeformableAttention(**arguments, batch_first=True), seed=1)
    ours = DeformableAttention(**arguments, batch_first=True)
    ours.load_state_dict(theirs.state_dict())
    shapes = torch.tensor([[3, 4], [2, 2]])
    inputs = {
        "query": torch.randn(2, 16, 16),
        "query_pos": torch.randn(2, 16, 16),
        "key_padding_mask": torch.rand(2, 16) < 0.3,
        "reference_points": torch.rand(2, 16, 2, 2),
        "spatial_shapes": shapes,
        "level_start_index": torch.tensor([0, 12]),
    }
    assert_parity(ours(**inputs), theirs(**inputs), 1e-6)
    with torch.autocast("cpu", torch.bfloat16):
        assert (ours(**inputs) - theirs(**inputs)).abs().max() < 0.2


def test_names_shapes_and_parameters_of_the_released_adapter():
    arch = {"embed_dims": 4096, "num_layers": 40, "num_heads": 32}
    with torch.device("meta"):
        adapter = DINOv3ViTAdapter(
            {"type": "DINOv3ViT", "arch": arch}, interaction_indexes=[9, 19, 29, 39]
        )
    own = adapter.own_modules().state_dict()
    facts = json.loads(MANIFEST.read_text())
    prefix = "segmentation_model.0."
    expected = {k.removeprefix(prefix): s for k, s in facts.items() if k.startswith(prefix)}
    assert {name: list(tensor.shape) for name, tensor in own.items()} == expected


@pytest.mark.parametrize("with_cp", [False, True])
def test_only_the_adapter_gets_gradients(with_cp):
    adapter = make(with_cp=with_cp, drop_path_rate=0.0).train()
    before = {k: v.clone() for k, v in adapter.state_dict().items()}
    torch.manual_seed(0)
    loss = sum((output**2).mean() for output in adapter(pictures()))
    loss.backward()
    for name, parameter in adapter.named_parameters():
        if name.startswith("backbone."):
            assert parameter.grad is None, name
        else:
            assert parameter.grad.abs().sum() > 0, name
    blocks = adapter.backbone.blocks
    assert not any(module.training for block in blocks for module in block.modules())
    for name, value in adapter.backbone.state_dict().items():
        assert torch.equal(value, before[f"backbone.{name}"]), name
    assert not torch.equal(adapter.norm1.running_mean, before["norm1.running_mean"])


def test_recomputation_changes_nothing():
    results = []
    for with_cp in (False, True):
        adapter = make(with_cp=with_cp, drop_path_rate=0.5).train()
        torch.manual_seed(3)
        loss = sum((output**2).mean() for output in adapter(pictures()))
        loss.backward()
        grads = [p.grad for p in adapter.own_modules().parameters()]
        results.append((loss.detach(), *grads))
    for plain, recomputed in zip(*results):
        assert_parity(recomputed, plain, 1e-6)


def test_a_backbone_that_trains_gets_gradients():
    adapter = make(frozen=-1)
    sum(output.mean() for output in adapter.train()(pictures())).backward()
    names = {n for n, p in adapter.backbone.named_parameters() if p.grad is not None}
    assert any(name.startswith("blocks.0.") for name in names)


def test_a_frozen_backbone_stores_no_activations():
    adapter = make()
    stored = []
    keep = torch.autograd.graph.saved_tensors_hooks(lambda t: stored.append(t) or t, lambda t: t)
    with keep:
        adapter._run_backbone(pictures())
    assert not stored


@pytest.mark.parametrize("patch", [8, 16])
def test_strides_do_not_depend_on_the_patch_size(patch):
    outputs = make(backbone={"patch_size": patch}).eval()(pictures(1))
    assert [tuple(o.shape) for o in outputs] == [
        (1, 32, 64 // stride, 96 // stride) for stride in DINOv3ViTAdapter.strides
    ]


def test_initial_weights_and_head_file(tmp_path):
    adapter = make()
    path = export_head(adapter.own_modules(), tmp_path / "a.safetensors", kind=KIND)
    assert all(name.startswith("segmentation_model.0.") for name in load_file(path))
    config = {"type": "DINOv3HeadPretrained", "kind": KIND, "checkpoint": str(path)}
    loaded = make(init_cfg=config)
    nn.init.zeros_(loaded.level_embed)
    loaded.init_weights()
    for name, value in adapter.own_modules().state_dict().items():
        assert torch.equal(loaded.own_modules().state_dict()[name], value), name
    blank = make()
    blank.init_weights()
    assert blank.up.bias.abs().sum() == 0
    assert 0.5 < blank.up.weight.std() / (2 / (4 * 32)) ** 0.5 < 1.5
    assert blank.norm1.running_mean.abs().sum() == 0
    offsets = blank.interactions[0].extractor.attn.sampling_offsets
    assert offsets.weight.abs().sum() == 0 and offsets.bias.abs().sum() > 0


def test_file_of_another_width_is_refused(tmp_path):
    path = export_head(make().own_modules(), tmp_path / "a.safetensors", kind=KIND)
    wide = make(backbone={"arch": {**ARCH, "embed_dims": 48}})
    with pytest.raises(ValueError, match=r"wrong shape.*level_embed"):
        load_head(wide.own_modules(), path, kind=KIND)


@pytest.mark.parametrize("size", [(64, 80), (48, 64), (70, 64)])
def test_sides_must_be_multiples(size):
    with pytest.raises(ValueError, match=r"multiples of 32.*size_divisor=32"):
        make()(pictures(1, size))


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        ({"interaction_indexes": [1, 2, 3]}, "4 blocks"),
        ({"interaction_indexes": [0, 1, 2, 4]}, "out of 4"),
        ({"interaction_indexes": [0, 2, 1, 3]}, "ascending"),
        ({"num_heads": 3}, "divisor of the ViT's width 32"),
        ({"num_heads": 32}, "values' width 16"),
        ({"backbone": {"type": "DINOv3ConvNeXt", "arch": "tiny"}}, "pyramid of its own"),
    ],
)
def test_wrong_arguments(arguments, reason):
    config = {
        "type": "DINOv3ViTAdapter",
        "backbone": {"type": "DINOv3ViT", "arch": ARCH},
        "interaction_indexes": [0, 1, 2, 3],
        **SMALL,
        **arguments,
    }
    with pytest.raises(ValueError, match=reason):
        MODELS.build(config)
