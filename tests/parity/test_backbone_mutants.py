"""The parity check must notice each typical mistake: every mutant has to fail it."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from dinov3_mm.models.backbones import DINOv3ViT
from dinov3_mm.models.layers import (
    LayerScale,
    MaskedKBiasLinear,
    RotaryEmbedding2D,
    attention,
    build_norm,
)
from dinov3_mm.models.layers import (
    block as feed_forward,
)
from dinov3_mm.models.layers import (
    rope as rotation,
)
from tests.dinov2_toys import all_tokens
from tests.golden import assert_parity, load_golden
from tests.parity.backbone_cases import build_from_recorded, check_golden
from tests.parity.backbone_oracles import assert_each_epsilon_matters, redraw, to_transformers

_TABLES, _COORDINATES = RotaryEmbedding2D._tables, RotaryEmbedding2D._coordinates


def _tables_mutant(change):
    def apply(monkeypatch):
        monkeypatch.setattr(
            RotaryEmbedding2D, "_tables", lambda self, coords: change(*_TABLES(self, coords))
        )

    return apply


def _no_rope(sin, cos):
    return torch.zeros_like(sin), torch.ones_like(cos)


def _swapped_axes(monkeypatch):
    monkeypatch.setattr(
        RotaryEmbedding2D, "_coordinates", lambda *args: _COORDINATES(*args).flip(-1)
    )


def _column_major(monkeypatch):
    def coordinates(self, height, width):
        return _COORDINATES(self, width, height).flip(-1)

    monkeypatch.setattr(RotaryEmbedding2D, "_coordinates", coordinates)


def _interleaved(monkeypatch):
    original = rotation._rotate_entry

    def rotate(qkv, sin, cos):
        to_halves = torch.arange(qkv.shape[-1]).view(-1, 2).t().flatten()
        back = to_halves.argsort()
        q, k, _ = original(qkv[..., to_halves], sin, cos)
        return q[..., back], k[..., back], qkv[:, :, 2].transpose(1, 2)

    monkeypatch.setattr(rotation, "_rotate_entry", rotate)


def _rotated_values(monkeypatch):
    original = rotation._rotate_entry

    def rotate(qkv, sin, cos):
        q, k, _ = original(qkv, sin, cos)
        return q, k, original(qkv.flip(2), sin, cos)[0]

    monkeypatch.setattr(rotation, "_rotate_entry", rotate)


def _unmasked_k_bias(monkeypatch):
    monkeypatch.setattr(MaskedKBiasLinear, "forward", nn.Linear.forward)


def _tanh_gelu(monkeypatch):
    monkeypatch.setattr(feed_forward.F, "gelu", lambda x: torch._C._nn.gelu(x, approximate="tanh"))


def _no_layer_scale(monkeypatch):
    monkeypatch.setattr(LayerScale, "add_residual", lambda self, x, branch: x + branch)


def _scale_of_full_width(monkeypatch):
    original = F.scaled_dot_product_attention

    def attend(q, k, v):
        return original(q, k, v, scale=(q.shape[1] * q.shape[-1]) ** -0.5)

    monkeypatch.setattr(attention.F, "scaled_dot_product_attention", attend)


MUTANTS = {
    "no_rope": _tables_mutant(_no_rope),
    "wrong_sign": _tables_mutant(lambda sin, cos: (-sin, cos)),
    "swapped_axes": _swapped_axes,
    "column_major": _column_major,
    "interleaved": _interleaved,
    "rotated_values": _rotated_values,
    "unmasked_k_bias": _unmasked_k_bias,
    "tanh_gelu": _tanh_gelu,
    "no_layer_scale": _no_layer_scale,
    "scale_of_full_width": _scale_of_full_width,
}


@pytest.mark.parametrize("name", ["vit_mlp", "vit_untied_clsnorm"])
@pytest.mark.parametrize("mutate", MUTANTS.values(), ids=MUTANTS)
def test_mutant_fails(name, mutate, monkeypatch):
    check_golden(name)
    mutate(monkeypatch)
    with pytest.raises(AssertionError, match="differs by"):
        check_golden(name)


def test_released_mask_mutant_fails(monkeypatch):
    _unmasked_k_bias(monkeypatch)
    with pytest.raises(AssertionError, match="differs by"):
        check_golden("vit_swiglu8_officiallike")


def test_recomputed_periods_fail(monkeypatch):
    load = RotaryEmbedding2D._load_from_state_dict

    def load_and_forget(self, *args):
        load(self, *args)
        self.init_weights()

    monkeypatch.setattr(RotaryEmbedding2D, "_load_from_state_dict", load_and_forget)
    with pytest.raises(AssertionError, match="differs by"):
        check_golden("vit_swiglu8_officiallike")


def _recorded_model(name: str, **changes):
    return build_from_recorded(load_golden(f"backbones_{name}")[0]["constructor"], **changes)


def test_missing_final_norm_fails():
    model = _recorded_model("vit_mlp")
    model.norm.forward = lambda x: x
    with pytest.raises(AssertionError, match="differs by"):
        check_golden("vit_mlp", model)


@pytest.mark.parametrize("norm", ["cls_norm", "local_cls_norm"])
def test_missing_cls_norm_fails(norm):
    model = _recorded_model("vit_untied")
    getattr(model, norm).forward = model.norm.forward
    with pytest.raises(AssertionError, match="differs by"):
        check_golden("vit_untied", model)


@pytest.mark.parametrize("norm, other", [("layernormbf16", "layernorm"), ("layernorm", "rmsnorm")])
def test_wrong_epsilon_fails(norm, other):
    description, tensors = load_golden("backbones_vit_normeps")
    model = build_from_recorded(description["constructor"], norm_layer=norm).eval()
    model.load_state_dict({k[3:]: v for k, v in tensors.items() if k.startswith("sd.")})
    epsilon = build_norm(other, 4).eps
    for module in model.modules():
        if hasattr(module, "eps"):
            module.eps = epsilon
    with torch.no_grad():
        cls = model.forward_tokens(tensors["in.x"]).cls
    expected = tensors[f"out.feat_{norm}.x_norm_clstoken"]
    assert (cls - expected).abs().max() > 1e-2


@torch.no_grad()
@pytest.mark.parametrize("norm_layer", ["layernormbf16", "layernorm"])
def test_wrong_epsilon_of_one_norm_fails(norm_layer):
    arch = {"embed_dims": 64, "num_layers": 3, "num_heads": 2, "norm_layer": norm_layer}
    model = redraw(DINOv3ViT(arch=arch))
    peer = to_transformers(model).double()
    model.double()
    image = torch.randn(2, 3, 48, 80, dtype=torch.double)

    def compare():
        # The tables of the rotation are fp32 in both: 3e-8 apart.
        assert_parity(all_tokens(model, image), peer(image).last_hidden_state, 1e-7)

    assert_each_epsilon_matters(model, compare)


def test_wrong_rope_dtype_fails():
    model = _recorded_model("vit_ropebf16", pos_embed_rope_dtype="fp32")
    with pytest.raises(AssertionError, match="differs by"):
        check_golden("vit_ropebf16", model, tolerance=1e-3)
