"""DINOv3ConvNeXt against the recorded reference vectors."""

import pytest
import torch

from dinov3_mm.models.backbones import DINOv3ConvNeXt
from dinov3_mm.models.layers import convnext_block
from tests.golden import assert_parity, load_golden
from tests.parity.backbone_cases import compare, fill_by_formula, flatten, hashed, state_dict_of
from tests.parity.convnext_cases import build_from_recorded, check_golden


@pytest.mark.parametrize("name", ["convnext", "convnext_droppath"])
def test_recorded_calls(name):
    check_golden(name)


def test_recorded_calls_in_chunks(monkeypatch):
    monkeypatch.setattr(convnext_block, "_CHUNK_BYTES", 3000)
    check_golden("convnext")


@pytest.mark.parametrize("grad", [False, True])
def test_stochastic_depth_with_the_recorded_seed(grad, monkeypatch):
    description, tensors = load_golden("backbones_convnext_droppath")
    model = build_from_recorded(description["constructor"]).train()
    model.load_state_dict(state_dict_of(tensors))
    draws, rand = [], torch.rand

    def record(*args, **kwargs):
        draws.append(rand(*args, **kwargs))
        return draws[-1]

    monkeypatch.setattr(torch, "rand", record)
    torch.manual_seed(77)
    with torch.set_grad_enabled(grad):
        output = model.forward_features(tensors["in.x"])
    compare(flatten(output, "out.train"), tensors, 1e-5)
    expected = [tensors[key] for key in sorted(tensors) if key.startswith("rng.train.")]
    assert len(draws) == len(expected)
    assert all(map(torch.equal, draws, expected))


def test_initialisation_draws_in_the_official_order():
    description, tensors = load_golden("backbones_init")
    model = build_from_recorded(description["constructors"]["convnext"])
    for tensor in model.state_dict().values():
        tensor.fill_(float("nan"))
    torch.manual_seed(0)
    model.init_weights()
    expected, state = state_dict_of(tensors, "convnext."), model.state_dict()
    assert set(state) == set(expected)
    for key, value in state.items():
        # The inverse error function differs by a rounding between processors.
        torch.testing.assert_close(value, expected[key], rtol=1e-5, atol=1e-7, msg=key)


@torch.no_grad()
def test_official_shapes():
    description, tensors = load_golden("backbones_official_shapes")
    model = DINOv3ConvNeXt(arch="tiny").eval()
    fill_by_formula(model)
    for key, checksum in description["models"]["convnext_tiny"]["checksums"].items():
        assert model.state_dict()[key].double().sum().item() == pytest.approx(checksum, abs=1e-6)
    image = torch.from_numpy(2 * hashed(1000003, 3 * 224 * 160)).float().view(1, 3, 224, 160)
    output = model.forward_tokens(image)
    assert_parity(output.cls, tensors["convnext_tiny.cls"])
    assert_parity(output.patches[:, :8], tensors["convnext_tiny.patch8"])
    stages = model.get_intermediate_layers(image, n=4, return_class_token=True)
    for stage, (_, cls) in enumerate(stages):
        assert_parity(cls, tensors[f"convnext_tiny.stage{stage}_cls"])
