"""Replays the calls recorded in the ``backbones_vit_*`` reference vectors on :class:`DINOv3ViT`."""

from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from dinov3_mm.models.backbones import DINOv3ViT
from tests.golden import assert_parity, load_golden

_NAMES = {
    "in_chans": "in_channels",
    "embed_dim": "embed_dims",
    "depth": "num_layers",
    "layerscale_init": "layer_scale_init_value",
    "n_storage_tokens": "num_registers",
}
# Constructor defaults of the code that recorded the vectors, where they differ from ours.
_RECORDED_DEFAULTS = {
    "rope_dtype": "bf16",
    "layer_scale_init_value": None,
    "num_registers": 0,
    "norm_layer": "layernorm",
    "mask_k_bias": False,
}
_TRAINING_ONLY = (
    "drop_path_rate",
    "rope_shift_coords",
    "rope_jitter_coords",
    "rope_rescale_coords",
)


def build_from_recorded(constructor: dict[str, Any], **changes: Any) -> DINOv3ViT:
    """Build a backbone from constructor arguments as the vectors and the manifest name them."""
    arch = dict(_RECORDED_DEFAULTS)
    for key, value in {**constructor, **changes}.items():
        if key != "img_size":
            arch[_NAMES.get(key, key).replace("pos_embed_rope_", "rope_")] = value
    training = {key: arch.pop(key) for key in _TRAINING_ONLY if key in arch}
    return DINOv3ViT(arch=arch, **training)


def state_dict_of(tensors: dict[str, Tensor], prefix: str = "sd.") -> dict[str, Tensor]:
    """The recorded state dict."""
    return {key[len(prefix) :]: t for key, t in tensors.items() if key.startswith(prefix)}


# Arguments of each recorded call, by the name of the case.
_INTERMEDIATE = {
    "inter_last1": {},
    "inter_idx": {"return_class_token": True, "return_extra_tokens": True},
    "inter_nonorm_map": {"n": 2, "reshape": True, "norm": False, "return_class_token": True},
    "inter_extra_only": {"return_extra_tokens": True},
    "odd_size_map": {"reshape": True, "return_class_token": True},
}


def replay(model: DINOv3ViT, case: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Outputs of one recorded case, under the names of the recorded tensors."""
    mask = tensors.get("in.mask")
    if case in _INTERMEDIATE:
        image = tensors["in.x_odd" if case == "odd_size_map" else "in.x"]
        kwargs = dict(_INTERMEDIATE[case])
        if case == "inter_idx":
            kwargs["n"] = [0, model.num_layers - 1]
        output = model.get_intermediate_layers(image, **kwargs)
    elif case == "default_forward":
        return {f"out.{case}": model.forward_tokens(tensors["in.x"]).cls}
    elif case.startswith("list"):
        output = model.forward_features([tensors["in.x"], tensors["in.x_small"]], [mask, None])
    elif case == "masked":
        output = model.forward_features(tensors["in.x"], mask)
    else:
        output = model.forward_features(tensors["in.x"])
    return flatten(output, f"out.{case}")


def flatten(output: Any, name: str) -> dict[str, Tensor]:
    """Tensors of nested tuples, lists and dicts, with dotted names."""
    if isinstance(output, Tensor):
        return {name: output}
    if isinstance(output, dict):
        items = [(key, value) for key, value in output.items() if key != "masks"]
    else:
        items = list(enumerate(output))
    flat: dict[str, Tensor] = {}
    for key, value in items:
        flat.update(flatten(value, f"{name}.{key}"))
    return flat


def compare(outputs: dict[str, Tensor], tensors: dict[str, Tensor], tolerance: float) -> float:
    """Assert parity of all outputs with the recorded ones; return the largest difference."""
    return max(assert_parity(value, tensors[name], tolerance) for name, value in outputs.items())


@torch.no_grad()
def check_golden(
    name: str,
    model: DINOv3ViT | None = None,
    tolerance: float = 1e-5,
    *,
    device: str | torch.device = "cpu",
) -> float:
    """Replay all deterministic cases of ``backbones_{name}``; return the largest difference."""
    description, tensors = load_golden(f"backbones_{name}")
    if model is None:
        model = build_from_recorded(description["constructor"])
    model.load_state_dict(state_dict_of(tensors), strict=True)
    model.to(device)
    tensors = {name: tensor.to(device) for name, tensor in tensors.items()}
    worst = 0.0
    for case in description["cases"]:
        model.train(case["mode"] == "train")
        outputs = replay(model, case["name"], tensors)
        assert set(outputs) == set(case["outputs"])
        worst = max(worst, compare(outputs, tensors, tolerance))
    return worst


def hashed(position: int, count: int) -> np.ndarray:
    """Values in [-1, 1) of flat elements 0..count-1 from an integer hash."""
    a = np.arange(count, dtype=np.uint32) * np.uint32(2654435761)
    a += np.uint32((position + 1) * 2246822519 % 2**32)
    for shift, factor in ((15, 2246822507), (13, 3266489909)):
        a ^= a >> np.uint32(shift)
        a *= np.uint32(factor)
    a ^= a >> np.uint32(16)
    return 2 * a.astype(np.float64) / 2**32 - 1


@torch.no_grad()
def fill_by_formula(model: nn.Module) -> None:
    """Fill every tensor of the state dict as the vectors of full-size models ask for."""
    state = model.state_dict()
    for position, key in enumerate(sorted(key for key in state if not key.startswith("norms."))):
        tensor, leaf = state[key], key.rsplit(".", 1)[-1]
        if leaf in ("periods", "bias_mask"):
            continue  # the initialisation is what the formula asks for
        r = hashed(position, tensor.numel())
        if leaf == "gamma":
            value = 0.3 + 0.1 * r
        elif leaf.endswith(("_token", "_tokens")):
            value = 0.5 * r
        elif leaf == "bias":
            value = 0.1 * r
        elif tensor.dim() == 1:
            value = 1 + 0.1 * r
        else:
            value = np.sqrt(3 * len(tensor) / tensor.numel()) * r
        tensor.copy_(torch.from_numpy(value.astype(np.float32)).view(tensor.shape))
