"""The released linear classifier: one linear layer, ``weight`` and ``bias``."""

from torch import Tensor

from .kinds import HeadNames, StateDict

_HEAD, _LAYER = "linear_head.", "fc."
_BACKBONE = "backbone."
_NAMES = ("weight", "bias")


def linear_classifier_to_ours(state_dict: StateDict) -> dict[str, Tensor]:
    """Names of the file, or of the assembled official model, to those of ``LinearClsHead``."""
    kept = {
        name.removeprefix(_HEAD): tensor
        for name, tensor in state_dict.items()
        if not name.startswith(_BACKBONE)
    }
    return {_LAYER + name if name in _NAMES else name: tensor for name, tensor in kept.items()}


def linear_classifier_to_released(state_dict: StateDict) -> dict[str, Tensor]:
    """Names of ``LinearClsHead`` to those of the file."""
    return {name.removeprefix(_LAYER): tensor for name, tensor in state_dict.items()}


KINDS = {
    "linear_classifier": HeadNames(
        to_ours=linear_classifier_to_ours,
        to_released=linear_classifier_to_released,
        released=("dinov3_vit7b16_imagenet1k_linear_head-90d8ed92.pth",),
    )
}
