"""Names of the released detector's head.

The file holds the tensors under the names of :class:`DINOv3PlainDETRHead`, except those of the
encoder, which is mmdet's here. It may also hold the backbone, and a second copy of ``class_embed``
and ``bbox_embed`` inside the decoder, where the original code shares them.
"""

import re
from collections.abc import Mapping

import torch
from torch import Tensor

from .kinds import HeadNames, StateDict

_BACKBONE = "backbone."
_ALIAS = re.compile(r"transformer\.decoder\.((?:class|bbox)_embed\..+)")
_ENCODER = re.compile(r"(transformer\.encoder\.layers\.\d+)\.(.+)")
# Released name in an encoder layer -> mmdet's.
_ENCODER_NAMES = {
    "self_attn.": "self_attn.attn.",
    "linear1.": "ffn.layers.0.0.",
    "linear2.": "ffn.layers.1.",
    "norm1.": "norms.0.",
    "norm2.": "norms.1.",
}


def detector_to_ours(state_dict: StateDict) -> dict[str, Tensor]:
    """Tensors of a released file under the names of :class:`DINOv3PlainDETRHead`.

    Tensors of the backbone are left out. Copies inside the decoder are left out, or stand in for
    tensors that the file holds there only.

    Raises:
        ValueError: if a copy is another tensor than its original.
    """
    ours, copies = {}, {}
    for name, tensor in state_dict.items():
        if alias := _ALIAS.fullmatch(name):
            copies[alias[1]] = tensor
        elif not name.startswith(_BACKBONE):
            ours[_renamed(name, _ENCODER_NAMES)] = tensor
    different = [
        name for name, copy in copies.items() if name in ours and not torch.equal(copy, ours[name])
    ]
    if different:
        raise ValueError(
            f"{len(different)} tensors differ from their copies in the decoder, which must be the "
            f"same: {', '.join(different[:3])}; expected a file of the released detector"
        )
    return {**copies, **ours}


def detector_to_released(state_dict: StateDict) -> dict[str, Tensor]:
    """Tensors of a :class:`DINOv3PlainDETRHead` under the released names."""
    released = {ours: theirs for theirs, ours in _ENCODER_NAMES.items()}
    return {_renamed(name, released): tensor for name, tensor in state_dict.items()}


def _renamed(name: str, names: Mapping[str, str]) -> str:
    match = _ENCODER.fullmatch(name)
    if match is None:
        return name
    layer, rest = match.groups()
    for old, new in names.items():
        if rest.startswith(old):
            return f"{layer}.{new}{rest.removeprefix(old)}"
    return name


KINDS = {
    "detector": HeadNames(
        to_ours=detector_to_ours,
        to_released=detector_to_released,
        released=("dinov3_vit7b16_coco2017_detr_head-b0235ff7.pth",),
    )
}
