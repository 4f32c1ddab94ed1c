"""Replays the calls recorded in the ``backbones_convnext*`` reference vectors."""

from typing import Any

import torch
from torch import Tensor

from dinov3_mm.models.backbones import DINOv3ConvNeXt
from tests.golden import load_golden
from tests.parity.backbone_cases import compare, flatten, state_dict_of


def build_from_recorded(constructor: dict[str, Any], **changes: Any) -> DINOv3ConvNeXt:
    """Build a backbone from constructor arguments as the vectors and the manifest name them."""
    arch = {**constructor, **changes}
    drop_path_rate = arch.pop("drop_path_rate", 0.0)
    arch["in_channels"] = arch.pop("in_chans", 3)
    return DINOv3ConvNeXt(arch=arch, drop_path_rate=drop_path_rate)


# Arguments of each recorded call, by the name of the case without "p16_".
_INTERMEDIATE = {
    "inter_last1": {},
    "inter_all": {"n": 4, "return_class_token": True},
    "inter_idx_map": {"n": [1, 3], "reshape": True, "return_class_token": True},
    "inter_nonorm_map": {
        "n": [0, 2, 3],
        "reshape": True,
        "norm": False,
        "return_class_token": True,
    },
    "inter_nonorm_seq": {"n": [3], "norm": False},
}


def replay(model: DINOv3ConvNeXt, case: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Outputs of one recorded case, under the names of the recorded tensors."""
    name = case.removeprefix("p16_")
    model.patch_size = 16 if name != case else None
    if case == "p16_odd":
        kwargs = {"n": 4, "reshape": True, "return_class_token": True}
        output = model.get_intermediate_layers(tensors["in.x_odd"], **kwargs)
    elif name in _INTERMEDIATE:
        output = model.get_intermediate_layers(tensors["in.x"], **_INTERMEDIATE[name])
    elif case == "default_forward":
        return {f"out.{case}": model.forward_tokens(tensors["in.x"]).cls}
    elif case == "list":
        output = model.forward_features([tensors["in.x"], tensors["in.x_small"]], [None, None])
    else:
        output = model.forward_features(tensors["in.x_odd" if case == "odd" else "in.x"])
    return flatten(output, f"out.{case}")


@torch.no_grad()
def check_golden(
    name: str,
    model: DINOv3ConvNeXt | None = None,
    tolerance: float = 1e-5,
    *,
    device: str | torch.device = "cpu",
) -> float:
    """Replay all eval cases of ``backbones_{name}``; return the largest difference."""
    description, tensors = load_golden(f"backbones_{name}")
    if model is None:
        model = build_from_recorded(description["constructor"])
    model.load_state_dict(state_dict_of(tensors), strict=True)
    model.to(device).eval()
    tensors = {name: tensor.to(device) for name, tensor in tensors.items()}
    worst = 0.0
    for case in description["cases"]:
        if case["mode"] == "eval":
            outputs = replay(model, case["name"], tensors)
            assert set(outputs) == set(case["outputs"])
            worst = max(worst, compare(outputs, tensors, tolerance))
    return worst
