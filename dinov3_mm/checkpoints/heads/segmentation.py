"""Linear segmentation heads as the official trainer writes them (``model_final.pth``)."""

from torch import Tensor

from .kinds import HeadNames, StateDict

# Stage 1 of the official model is the head, stage 0 the backbone, which the trainer leaves out.
_HEAD, _BACKBONE = "segmentation_model.1.", "segmentation_model.0."
_RENAMED = {"batchnorm_layer": "bn", "conv": "conv_seg"}


def linear_segmentation_to_ours(state_dict: StateDict) -> dict[str, Tensor]:
    """Official names, with or without the prefix of the assembled model, to ``decode_head``'s."""
    kept = {
        name.removeprefix(_HEAD): tensor
        for name, tensor in state_dict.items()
        if not name.startswith(_BACKBONE)
    }
    return _renamed(kept, _RENAMED)


def linear_segmentation_to_released(state_dict: StateDict) -> dict[str, Tensor]:
    """Our names to those of the official trainer, with the prefix of the assembled model."""
    official = _renamed(state_dict, {ours: theirs for theirs, ours in _RENAMED.items()})
    return {_HEAD + name: tensor for name, tensor in official.items()}


def _renamed(state_dict: StateDict, modules: dict[str, str]) -> dict[str, Tensor]:
    renamed = {}
    for name, tensor in state_dict.items():
        module, dot, rest = name.partition(".")
        renamed[modules.get(module, module) + dot + rest] = tensor
    return renamed


KINDS = {
    "linear_segmentation": HeadNames(
        to_ours=linear_segmentation_to_ours, to_released=linear_segmentation_to_released
    )
}
