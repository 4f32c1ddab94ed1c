"""Folding of low-rank adapters, with an adapter written here; mmpretrain's own: tests/hosts."""

import pytest
import torch
from torch import Tensor, nn

from dinov3_mm.checkpoints import build_backbone, export_backbone
from dinov3_mm.checkpoints.export import merged_state_dict, unwrap_lora
from tests.checkpoints.toys import (
    assert_same_tensors,
    redraw,
    tensors_of,
    toy_backbone,
    toy_images,
)
from tests.golden import assert_parity


class Adapted(nn.Module):
    """A linear layer with an adapter, under the names that mmpretrain gives the parts."""

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__()
        self.original_layer = layer
        self.lora_down = nn.Linear(layer.in_features, 3, bias=False)
        self.lora_up = nn.Linear(3, layer.out_features, bias=False)
        self.scaling = 1.5

    def forward(self, x: Tensor) -> Tensor:
        return self.original_layer(x) + self.scaling * self.lora_up(self.lora_down(x))


class Wrapper(nn.Module):
    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module


@torch.no_grad()
def test_the_exported_backbone_computes_the_same(tmp_path):
    backbone = toy_backbone(1, ffn_layer="swiglu")
    block = backbone.blocks[1]
    block.attn.qkv = Adapted(block.attn.qkv)
    block.mlp.w3 = Adapted(block.mlp.w3)
    redraw(backbone, seed=2)
    before = tensors_of(backbone)
    path = export_backbone(Wrapper(backbone), tmp_path / "merged.safetensors")
    assert_same_tensors(backbone.state_dict(), before)
    merged = build_backbone(path)
    assert torch.equal(merged.blocks[1].attn.qkv.bias_mask, block.attn.qkv.original_layer.bias_mask)
    assert_parity(merged(toy_images())[0], backbone(toy_images())[0])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@torch.no_grad()
def test_the_weight_is_the_sum_in_its_own_dtype(dtype):
    layer = redraw(Adapted(nn.Linear(8, 6))).to(dtype)
    state = merged_state_dict(layer)
    assert set(state) == {"weight", "bias"}
    up, down = layer.lora_up.weight.double(), layer.lora_down.weight.double()
    expected = layer.original_layer.weight.double() + 1.5 * up @ down
    assert state["weight"].dtype == dtype
    assert_parity(state["weight"].float(), expected.to(dtype).float())
    assert torch.equal(state["bias"], layer.original_layer.bias)


def test_a_module_without_adapters_is_left_as_it_is():
    backbone = toy_backbone()
    assert_same_tensors(merged_state_dict(backbone), backbone.state_dict())
    wrapper = Wrapper(backbone)
    assert unwrap_lora(wrapper) is wrapper
