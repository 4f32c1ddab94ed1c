"""Recomputed activations: the same values and gradients, less memory between the passes."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from dinov3_mm.models.backbones import DINOv3ConvNeXt, DINOv3ViT

TOYS = {
    "vit": lambda mode: DINOv3ViT(
        arch=dict(embed_dims=32, num_layers=3, num_heads=2, layer_scale_init_value=1.0),
        patch_size=8,
        drop_path_rate=0.3,
        rope_rescale_coords=2.0,
        with_cp=mode,
    ),
    "convnext": lambda mode: DINOv3ConvNeXt(
        arch=dict(depths=[1, 1, 2, 1], dims=[8, 8, 16, 16], layer_scale_init_value=1.0),
        drop_path_rate=0.3,
        with_cp=mode,
    ),
}


def _step(name: str, mode: bool | str) -> tuple[torch.Tensor, list[torch.Tensor], int]:
    """Loss, gradients, and bytes that autograd kept between forward and backward pass."""
    torch.manual_seed(0)
    model = TOYS[name](mode)
    model.init_weights()
    model.train()
    images = [torch.randn(4, 3, 64, 64), torch.randn(4, 3, 32, 32)]
    kept: dict[int, int] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    torch.manual_seed(1)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        outputs = model.forward_tokens(images)
        loss = sum(out.cls.square().mean() + out.patches.square().mean() for out in outputs)
    loss.backward()
    grads = [p.grad for p in model.parameters() if p.grad is not None]
    return loss.detach(), grads, sum(kept.values())


@pytest.mark.parametrize("name", TOYS)
@pytest.mark.parametrize("mode", [True, "selective"])
def test_values_and_gradients_are_unchanged(name, mode):
    plain, recomputed = _step(name, False), _step(name, mode)
    assert torch.equal(plain[0], recomputed[0])
    for expected, actual in zip(plain[1], recomputed[1], strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-6, atol=1e-8)


def test_full_keeps_less_than_nothing_recomputed():
    assert _step("vit", True)[2] < 0.5 * _step("vit", False)[2]


def test_selective_runs_no_matrix_product_twice():
    counts = {}
    for mode in (False, True, "selective"):
        with FlopCounterMode(display=False) as counter:
            _step("vit", mode)
        counts[mode] = counter.get_total_flops()
    assert counts[False] == counts["selective"] < counts[True]


def test_unknown_mode():
    with pytest.raises(ValueError, match="with_cp is 'some'"):
        TOYS["vit"]("some")
