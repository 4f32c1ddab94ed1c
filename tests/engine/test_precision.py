"""The dtype that a device suggests, and which parts of a model compute in it."""

import copy

import pytest
import torch
from mmengine.config import Config
from torch import nn
from torch.nn import functional as F

from dinov3_mm.engine import ConfigError
from dinov3_mm.models.precision import (
    asked_dtype,
    autocast_module,
    autocast_parts,
    choose_dtype,
    describe_choice,
    use_compute_dtype,
)

CUDA, CPU = torch.device("cuda"), torch.device("cpu")


@pytest.mark.parametrize(
    ("asked", "device", "supported", "expected", "words"),
    [
        ("auto", CUDA, True, "bf16", "bf16 (auto: cuda)"),
        ("auto", CUDA, False, "fp32", "fp32 (auto: cuda has no bf16)"),
        ("auto", CPU, True, "fp32", "fp32 (auto: cpu)"),
        ("auto", torch.device("mps"), True, "fp32", "fp32 (auto: mps)"),
        ("fp32", CUDA, True, "fp32", "fp32 (as asked)"),
        ("bf16", CPU, False, "bf16", "bf16 (as asked)"),
    ],
)
def test_the_device_decides_unless_asked(asked, device, supported, expected, words):
    dtype = choose_dtype(asked, device, supports=lambda _: supported)
    assert dtype == expected and describe_choice(asked, dtype, device) == words


def test_configs_with_other_dtypes_are_refused_and_without_one_left_alone():
    assert asked_dtype(Config()) is None and use_compute_dtype(cfg := Config()) == []
    assert "custom_hooks" not in cfg
    with pytest.raises(ConfigError, match="compute_dtype: dtype is 'float16', which is refused"):
        asked_dtype(Config({"compute_dtype": "float16"}))
    own = Config({"compute_dtype": "auto", "optim_wrapper": {"type": "AmpOptimWrapper"}})
    assert "AmpOptimWrapper of its own" in use_compute_dtype(own)[0]
    assert "custom_hooks" not in own


def test_the_hook_is_added_once():
    cfg = Config({"compute_dtype": "auto", "custom_hooks": [{"type": "FrozenBackboneHook"}]})
    use_compute_dtype(cfg)
    cfg.compute_dtype = "fp32"
    use_compute_dtype(cfg)
    assert cfg.custom_hooks == [
        {"type": "FrozenBackboneHook"},
        {"type": "ComputeDtypeHook", "dtype": "fp32"},
    ]


class Head(nn.Linear):
    """Calls ``forward`` directly, as mmseg's heads do; its loss lies outside of it."""

    def loss(self, x):
        logits = self.forward(x)
        return logits, F.cross_entropy(logits, torch.zeros(len(logits), dtype=torch.long))


class Probe(Head):
    computes_in_fp32 = True


class Model(nn.Module):
    def __init__(self, head: nn.Module) -> None:
        super().__init__()
        self.backbone, self.decode_head = nn.Linear(16, 16), head
        self.seen = []
        self.decode_head.register_forward_pre_hook(lambda m, i: None)

    def forward(self, x):
        features = self.backbone(x)
        self.seen.append(features.dtype)
        return self.decode_head.loss(features)


def test_products_are_rounded_and_everything_that_leaves_is_fp32():
    torch.manual_seed(0)
    exact, x = Model(Head(16, 4)), torch.randn(8, 16)
    model = copy.deepcopy(exact)
    assert autocast_parts(model, torch.bfloat16) == ["backbone", "decode_head"]
    logits, loss = model(x)
    assert model.seen == [torch.float32] and logits.dtype == loss.dtype == torch.float32
    features = model.backbone(x)
    assert torch.equal(features, features.bfloat16().float())
    assert not torch.equal(features, exact.backbone(x))
    assert torch.equal(logits, logits.bfloat16().float())
    loss.backward()
    assert model.backbone.weight.grad.dtype == torch.float32
    assert type(model.decode_head).__name__ == "Head" and isinstance(model.decode_head, Head)
    assert model.state_dict().keys() == exact.state_dict().keys()


def test_probes_stay_in_fp32():
    model = Model(Probe(16, 4))
    assert autocast_parts(model, torch.bfloat16) == ["backbone"]
    logits, _ = model(torch.randn(8, 16))
    assert not torch.equal(logits, logits.bfloat16().float())


def test_a_copy_computes_with_its_own_weights():
    model = Model(Head(16, 4))
    autocast_parts(model, torch.bfloat16)
    twin = copy.deepcopy(model)
    nn.init.zeros_(twin.backbone.weight)
    nn.init.zeros_(twin.backbone.bias)
    x = torch.randn(2, 16)
    assert twin.backbone(x).abs().max() == 0 < model.backbone(x).abs().max()


def test_several_heads_and_containers():
    class Several(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.decode_head = nn.ModuleList([Head(4, 4), Probe(4, 4)])

    assert autocast_parts(Several(), torch.bfloat16) == ["decode_head.0"]

    class Nested(nn.Linear):
        def forward(self, x):
            y = super().forward(x)
            return {"list": [y], "pair": (y, None), "words": "as they are", "index": y.argmax(1)}

    module = Nested(4, 4)
    autocast_module(module, torch.bfloat16)
    autocast_module(module, torch.bfloat16)  # twice is once
    out = module(torch.randn(2, 4))
    assert out["list"][0].dtype == out["pair"][0].dtype == torch.float32
    assert out["pair"][1] is None and out["words"] == "as they are"
    assert out["index"].dtype == torch.int64
