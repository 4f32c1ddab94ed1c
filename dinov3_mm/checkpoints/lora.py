"""Low-rank adapters (LoRA, arXiv 2106.09685) folded into the weights that they adapt.

An adapted layer is known by its parts, the names that mmpretrain's ``LoRALinear`` gives them, so
that nothing of mmpretrain is imported: ``original_layer``, ``lora_down``, ``lora_up``, ``scaling``.
"""

import torch
from torch import Tensor, nn

_PARTS = ("original_layer", "lora_down", "lora_up", "scaling")


def unwrap_lora(module: nn.Module) -> nn.Module:
    """The adapted model inside mmpretrain's ``LoRAModel``; any other module as it is."""
    inner = getattr(module, "module", None)
    return inner if isinstance(inner, nn.Module) and _adapted_layers(inner) else module


def merged_state_dict(module: nn.Module) -> dict[str, Tensor]:
    """State of a module with its adapters folded in, under the names of the plain module.

    The weight of an adapted layer becomes ``W + scaling * up @ down``, computed in at least fp32
    and returned in the dtype of ``W``. Biases, masks and all other layers stay what they are. The
    module is not changed.

    Args:
        module: a module, with or without adapters, in or outside a ``LoRAModel``.
    """
    module = unwrap_lora(module)
    state = module.state_dict()
    for name, layer in _adapted_layers(module).items():
        prefix = f"{name}." if name else ""
        for key in [key for key in state if key.startswith(prefix)]:
            tensor = state.pop(key)
            part, _, own_name = key.removeprefix(prefix).partition(".")
            if part == "original_layer":
                state[prefix + own_name] = tensor
        state[f"{prefix}weight"] = _merged_weight(layer)
    return state


def _adapted_layers(module: nn.Module) -> dict[str, nn.Module]:
    return {
        name: layer
        for name, layer in module.named_modules()
        if all(hasattr(layer, part) for part in _PARTS)
    }


@torch.no_grad()
def _merged_weight(layer: nn.Module) -> Tensor:
    weight = layer.original_layer.weight
    dtype = torch.promote_types(weight.dtype, torch.float32)
    update = layer.lora_up.weight.to(dtype) @ layer.lora_down.weight.to(dtype)
    return (weight.to(dtype) + layer.scaling * update).to(weight.dtype)
