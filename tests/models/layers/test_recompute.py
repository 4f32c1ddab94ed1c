"""Recomputed activations: the same values and gradients, less memory between the passes."""

from collections import Counter

import pytest
import torch
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode

from dinov3_mm.models.backbones import DINOv3ConvNeXt, DINOv3ViT
from dinov3_mm.models.layers import Block, ConvNeXtBlock, RotaryEmbedding2D, draw_subset

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


SHAPES, GRIDS = [(4, 65), (6, 17)], [(8, 8), (4, 4)]
PRODUCTS = ("aten::mm", "aten::addmm", "aten::_scaled_dot_product_flash_attention_for_cpu")


def _vit_block(mode: bool | str, *, drop: bool) -> tuple[Block, tuple]:
    block = Block(32, 2, layer_scale_init_value=1.0, mask_k_bias=True, with_cp=mode)
    rope = RotaryEmbedding2D(16)
    subsets = [draw_subset(SHAPES, 0.3, torch.device("cpu")) for _ in range(2 * drop)]
    return block, (SHAPES, [rope(*grid) for grid in GRIDS], *subsets)


def _convnext_block(mode: bool | str) -> tuple[ConvNeXtBlock, tuple]:
    return ConvNeXtBlock(16, layer_scale_init_value=1.0, with_cp=mode), ()


BLOCKS = {
    "vit": lambda mode: (*_vit_block(mode, drop=False), torch.randn(362, 32)),
    "stochastic depth": lambda mode: (*_vit_block(mode, drop=True), torch.randn(362, 32)),
    "convnext": lambda mode: (*_convnext_block(mode), torch.randn(2, 12, 12, 16)),
}


def _run_block(name: str, mode: bool | str, *, compiled: bool):
    """Output and gradients, bytes that the allocator gave for good in the forward pass, and how
    often each kind of product ran in both passes, of a step that is not the first.
    """
    torch.manual_seed(0)
    block, inputs, x = BLOCKS[name](mode)
    for parameter in block.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    x.requires_grad_()
    if compiled:
        torch._dynamo.reset()
        block.compile(fullgraph=True)
    leaves = [x, *block.parameters()]
    torch.autograd.grad(block(x, *inputs).square().sum(), leaves)
    settings = dict(activities=[ProfilerActivity.CPU], profile_memory=True, acc_events=True)
    with profile(**settings) as forward:
        output = block(x, *inputs)
    with profile(activities=[ProfilerActivity.CPU], acc_events=True) as backward:
        grads = torch.autograd.grad(output.square().sum(), leaves)
    events = forward.profiler.kineto_results.events()
    kept = sum(event.nbytes() for event in events if event.name() == "[memory]")
    products = Counter(
        event.name()
        for part in (forward, backward)
        for event in part.profiler.kineto_results.events()
        if event.name() in PRODUCTS
    )
    return [output.detach(), *grads], kept, products


@pytest.mark.parametrize("name", BLOCKS)
def test_compiled_blocks_keep_what_the_others_keep(name):
    """The order is checkpoint, then compiler: around compiled code the policy would see that code's
    own operators, keep none of them, and run every product again.
    """
    plain, everything, products = _run_block(name, False, compiled=False)
    for mode in ("selective", True):
        _, expected, _ = _run_block(name, mode, compiled=False)
        values, kept, ran = _run_block(name, mode, compiled=True)
        # With the input alone the compiler keeps some vectors too, which it finds cheaper.
        slack = 0.02 * (expected if mode == "selective" else everything)
        # Its map, once more in the layout that the compiled convolution wants.
        slack += values[1].nbytes if name == "convnext" else 0
        assert abs(kept - expected) <= slack, (mode, kept, expected, everything)
        for actual, reference in zip(values, plain, strict=True):
            torch.testing.assert_close(actual, reference, rtol=1e-5, atol=1e-5)
        if mode == "selective":
            assert ran == products
        elif name != "convnext":
            assert ran["aten::addmm"] > products["aten::addmm"]
