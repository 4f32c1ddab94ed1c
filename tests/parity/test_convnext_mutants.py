"""The parity check must notice each typical mistake in a ConvNeXt: every mutant has to fail it."""

import pytest
import torch
from torch.nn import functional as F

from dinov3_mm.models.backbones import DINOv3ConvNeXt, convnext
from dinov3_mm.models.layers import ConvNeXtBlock, LayerNorm, PatchConv2d, convnext_block
from tests.dinov2_toys import all_tokens
from tests.golden import assert_parity, load_golden
from tests.parity.backbone_oracles import assert_each_epsilon_matters, redraw
from tests.parity.convnext_cases import build_from_recorded, check_golden
from tests.parity.test_convnext_oracles import to_transformers


def _tanh_gelu(monkeypatch):
    monkeypatch.setattr(
        convnext_block.F, "gelu", lambda x: torch._C._nn.gelu(x, approximate="tanh")
    )


def _mean_of_norm(monkeypatch):
    def tokens(self, images):
        output = _TOKENS(self, images)
        return output._replace(cls=output.patches.mean(1))

    monkeypatch.setattr(convnext.DINOv3ConvNeXt, "_tokens", tokens)


def _cls_in_prenorm(monkeypatch):
    def tokens(self, images):
        output = _TOKENS(self, images)
        return output._replace(prenorm=self.norm(output.prenorm))

    monkeypatch.setattr(convnext.DINOv3ConvNeXt, "_tokens", tokens)


def _norm_before_depthwise(monkeypatch):
    def forward(self, x, scale=None):
        y = self.dwconv(self.norm(x))
        return x + self.gamma * self.pwconv2(F.gelu(self.pwconv1(y)))

    monkeypatch.setattr(ConvNeXtBlock, "forward", forward)


def _conv_before_norm(monkeypatch):
    """Norm after the downsampling convolution, as in the stem, with the norm of the next stage."""

    def forward(self, x):
        y = _CONV(self, x)
        return F.layer_norm(y, y.shape[-1:]) if self.stride[0] == 2 else y

    monkeypatch.setattr(PatchConv2d, "forward", forward)


def _padded_downsampling(monkeypatch):
    def forward(self, x):
        height, width = (-side % self.stride[0] for side in x.shape[1:3])
        return _CONV(self, F.pad(x, (0, 0, 0, width, 0, height)))

    monkeypatch.setattr(PatchConv2d, "forward", forward)


def _no_antialias(monkeypatch):
    def interpolate(*args, antialias, **kwargs):
        return _INTERPOLATE(*args, antialias=False, **kwargs)

    monkeypatch.setattr(convnext.F, "interpolate", interpolate)


_TOKENS, _CONV, _INTERPOLATE = (
    convnext.DINOv3ConvNeXt._tokens,
    PatchConv2d.forward,
    F.interpolate,
)
MUTANTS = {
    "tanh_gelu": _tanh_gelu,
    "mean_of_norm": _mean_of_norm,
    "normed_prenorm": _cls_in_prenorm,
    "norm_before_depthwise": _norm_before_depthwise,
    "norm_after_downsampling": _conv_before_norm,
    "padded_downsampling": _padded_downsampling,
    "no_antialias": _no_antialias,
}


def _assert_fails(model=None, name="convnext"):
    with pytest.raises(AssertionError, match=r"differs by|shape"):
        check_golden(name, model)


@pytest.mark.parametrize("mutate", MUTANTS.values(), ids=MUTANTS)
def test_mutant_fails(mutate, monkeypatch):
    check_golden("convnext")
    mutate(monkeypatch)
    _assert_fails()


def _recorded_model(name: str = "convnext"):
    return build_from_recorded(load_golden(f"backbones_{name}")[0]["constructor"])


def _apply(model, kind, change):
    for module in model.modules():
        if isinstance(module, kind):
            change(module)


def test_missing_gamma_fails(monkeypatch):
    original = torch.addcmul
    assert check_golden("convnext") < 1e-5
    monkeypatch.setattr(
        torch, "addcmul", lambda x, y, gamma: original(x, y, torch.ones_like(gamma))
    )
    _assert_fails()


def test_missing_final_norm_fails():
    model = _recorded_model()
    model.norm.forward = lambda x: x
    _assert_fails(model)


def test_final_norm_on_every_stage_fails(monkeypatch):
    model = _recorded_model()
    for stage in range(3):
        model.norms[stage].forward = lambda x: F.layer_norm(x, x.shape[-1:])
    _assert_fails(model)


@pytest.mark.parametrize("epsilon", [1e-5, 1e-7])
def test_wrong_epsilon_fails(epsilon):
    model = _recorded_model("convnext_droppath")
    check_golden("convnext_droppath", model)
    _apply(model, LayerNorm, lambda norm: setattr(norm, "eps", epsilon))
    _assert_fails(model, "convnext_droppath")


@torch.no_grad()
def test_wrong_epsilon_of_one_norm_fails():
    arch = {"depths": [2, 1, 3, 2], "dims": [12, 20, 28, 36]}
    model = redraw(DINOv3ConvNeXt(arch=arch))
    peer = to_transformers(model).double()
    model.double()
    image = torch.randn(2, 3, 75, 101, dtype=torch.double)
    assert_each_epsilon_matters(
        model,
        lambda: assert_parity(all_tokens(model, image), peer(image).last_hidden_state, 1e-12),
    )


def test_depth_without_linear_ramp_fails():
    tensors = load_golden("backbones_convnext_droppath")[1]
    model = _recorded_model("convnext_droppath").train()
    model.load_state_dict({k[3:]: v for k, v in tensors.items() if k.startswith("sd.")})
    expected = tensors["out.train.x_norm_clstoken"]

    def difference():
        torch.manual_seed(77)
        return (model.forward_tokens(tensors["in.x"]).cls - expected).abs().max()

    assert difference() < 1e-5
    _apply(model, ConvNeXtBlock, lambda block: setattr(block, "drop_rate", 0.5))
    assert difference() > 1e-2
