"""The comparison with transformers must notice each typical mistake."""

import pytest
import torch

from dinov3_mm.models.backbones import DINOv2ViT, dinov2_vit
from dinov3_mm.models.layers import FusedSwiGLU, LayerScale
from dinov3_mm.models.layers import block as feed_forward
from tests.dinov2_toys import all_tokens, noise
from tests.golden import assert_parity
from tests.parity.backbone_oracles import assert_each_epsilon_matters
from tests.parity.dinov2_oracles import GATED, hf_model, saved_and_built

_PREFIX, _RESAMPLE = DINOv2ViT._prefix_tokens, dinov2_vit.resample_position_embedding


@torch.no_grad()
def compare(model, backbone, size):
    assert_parity(all_tokens(backbone, noise(*size)), model(noise(*size)).last_hidden_state)


def _no_positions(monkeypatch, backbone):
    monkeypatch.setattr(
        dinov2_vit, "resample_position_embedding", lambda *args, **kw: 0 * _RESAMPLE(*args, **kw)
    )


def _no_position_of_cls(monkeypatch, backbone):
    monkeypatch.setattr(
        DINOv2ViT, "_prefix_tokens", lambda self: (self.cls_token, _PREFIX(self)[1])
    )


def _column_major(monkeypatch, backbone):
    def resample(embedding, grid, **rule):
        columns, rows = grid
        turned = _RESAMPLE(embedding, (rows, columns), **rule)
        return turned.unflatten(1, (rows, columns)).transpose(1, 2).flatten(1, 2)

    monkeypatch.setattr(dinov2_vit, "resample_position_embedding", resample)


def _registers_first(monkeypatch, backbone):
    monkeypatch.setattr(DINOv2ViT, "_prefix_tokens", lambda self: _PREFIX(self)[::-1])


def _registers_with_position(monkeypatch, backbone):
    def prefix(self):
        cls, registers = _PREFIX(self)
        return cls, registers + self.pos_embed[:, 1:5]

    monkeypatch.setattr(DINOv2ViT, "_prefix_tokens", prefix)


def _tanh_gelu(monkeypatch, backbone):
    monkeypatch.setattr(feed_forward.F, "gelu", lambda x: torch._C._nn.gelu(x, approximate="tanh"))


def _swapped_halves(monkeypatch, backbone):
    def forward(self, x):
        value, gate = self.w12(x).chunk(2, dim=-1)
        return self.w3(torch.nn.functional.silu(gate) * value)

    monkeypatch.setattr(FusedSwiGLU, "forward", forward)


def _no_layer_scale(monkeypatch, backbone):
    monkeypatch.setattr(LayerScale, "add_residual", lambda self, x, branch: x + branch)


def _no_final_norm(monkeypatch, backbone):
    monkeypatch.setattr(backbone.norm, "forward", lambda x: x)


def _other_antialias(monkeypatch, backbone):
    backbone.arch_settings["interpolate_antialias"] ^= True


def _other_offset(monkeypatch, backbone):
    backbone.arch_settings["interpolate_offset"] = 0.1


PLAIN, REGISTERS = {}, {"registers": 4}
MUTANTS = {
    "no_positions": (_no_positions, PLAIN, (16, 16)),
    "no_position_of_cls": (_no_position_of_cls, PLAIN, (16, 16)),
    "column_major": (_column_major, PLAIN, (12, 40)),
    "registers_first": (_registers_first, REGISTERS, (16, 16)),
    "registers_with_position": (_registers_with_position, REGISTERS, (16, 16)),
    "tanh_gelu": (_tanh_gelu, PLAIN, (16, 16)),
    "swapped_halves": (_swapped_halves, GATED, (16, 16)),
    "no_layer_scale": (_no_layer_scale, PLAIN, (16, 16)),
    "no_final_norm": (_no_final_norm, PLAIN, (16, 16)),
    "antialias": (_other_antialias, PLAIN, (8, 12)),
    "no_antialias": (_other_antialias, REGISTERS, (8, 12)),
    "offset": (_other_offset, PLAIN, (8, 12)),
    "offset_enlarged": (_other_offset, PLAIN, (24, 28)),
}


@pytest.mark.parametrize("name", MUTANTS)
def test_mutant_fails(name, monkeypatch, tmp_path):
    mutate, options, size = MUTANTS[name]
    model = hf_model(**options)
    backbone = saved_and_built(model, tmp_path)
    compare(model, backbone, size)
    mutate(monkeypatch, backbone)
    with pytest.raises(AssertionError, match="differs by"):
        compare(model, backbone, size)


@torch.no_grad()
@pytest.mark.parametrize("options", [PLAIN, REGISTERS, GATED], ids=["plain", "registers", "gated"])
def test_wrong_epsilon_of_one_norm_fails(options, tmp_path):
    model = hf_model(**options)
    backbone = saved_and_built(model, tmp_path).double()
    model.double()
    # At the trained grid, because transformers resamples positions in fp32.
    images = noise(16, 16).double()
    assert_each_epsilon_matters(
        backbone,
        lambda: assert_parity(all_tokens(backbone, images), model(images).last_hidden_state, 1e-12),
    )
