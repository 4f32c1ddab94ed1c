"""The official ConvNeXt layout, which holds the final norm twice."""

from collections.abc import Mapping

import torch
from torch import Tensor

from .conversion import Conversion, ConversionRequest

# The final norm, and the same as norm of the last stage.
_NORM, _TWIN = "norm.", "norms.3."


def official_convnext_to_official(
    tensors: Mapping[str, Tensor], request: ConversionRequest
) -> Conversion:
    """Take the tensors as they are; of ``norm`` and ``norms.3`` one may be absent.

    Raises:
        ValueError: If the two differ.
    """
    state_dict = dict(tensors)
    notes = []
    for leaf in ("weight", "bias"):
        norm, twin = state_dict.get(_NORM + leaf), state_dict.get(_TWIN + leaf)
        if norm is None and twin is not None:
            state_dict[_NORM + leaf] = twin
            notes.append(f"{_NORM}{leaf} made up (copy of {_TWIN}{leaf})")
        elif twin is None and norm is not None:
            state_dict[_TWIN + leaf] = norm
            notes.append(f"{_TWIN}{leaf} made up (copy of {_NORM}{leaf})")
        elif norm is not None and not torch.equal(norm, twin):
            raise ValueError(
                f"{_NORM}{leaf} and {_TWIN}{leaf} differ, but they are one tensor of the model; "
                "remove the wrong one from the file"
            )
    return Conversion(state_dict, notes=notes)


def with_twin_norm(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Add ``norms.3`` beside ``norm``."""
    names = [_NORM + leaf for leaf in ("weight", "bias")]
    twins = {_TWIN + n.removeprefix(_NORM): state_dict[n] for n in names if n in state_dict}
    return {**state_dict, **twins}


def without_twin_norm(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Official weights with the final norm as ``norm`` only.

    Raises:
        ValueError: If the two differ.
    """
    state_dict = official_convnext_to_official(state_dict, ConversionRequest()).state_dict
    return {name: tensor for name, tensor in state_dict.items() if not name.startswith(_TWIN)}


def missing_scales(state_dict: Mapping[str, Tensor], suffix: str) -> dict[str, Tensor]:
    """Factors of 1 for blocks without ``gamma``.

    Args:
        state_dict: weights under foreign names.
        suffix: what follows the name of a block in the name of its last bias.
    """
    blocks = {name.removesuffix(suffix): name for name in state_dict if name.endswith(suffix)}
    return {
        f"{block}.gamma": torch.ones_like(state_dict[name])
        for block, name in blocks.items()
        if f"{block}.gamma" not in state_dict
    }
