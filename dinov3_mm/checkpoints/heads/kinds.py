"""The kinds of head files, and where the names of their tensors are mapped to ours."""

import importlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from torch import Tensor

from dinov3_mm.suggest import hint

StateDict = Mapping[str, Tensor]

# Kind -> module of this package that holds ``KINDS = {kind: HeadNames(...)}``, imported on use.
KINDS = {
    "linear_classifier": "classification",
    "linear_segmentation": "segmentation",
    "mask2former": "mask2former",
    "mask2former_adapter": "mask2former",
    "linear_depth": "depth",
    "dpt_depth": "depth",
    "detector": "detection",
}


@dataclass(frozen=True)
class HeadNames:
    """How the tensors of one kind of head file are called here.

    Attributes:
        to_ours: state dict of a file under the names of our module, without what belongs to other
            modules (backbone, aliases). Names that it does not know it passes on, so that the load
            can refuse them.
        to_released: the inverse, for :func:`export_head`; None where there is none.
        released: names of the released files of this kind. Each ends in the beginning of its
            SHA-256.
    """

    to_ours: Callable[[StateDict], dict[str, Tensor]]
    to_released: Callable[[StateDict], dict[str, Tensor]] | None = None
    released: tuple[str, ...] = ()


def head_names(kind: str) -> HeadNames:
    """The names of a kind of head.

    Raises:
        ValueError: if there is no such kind.
    """
    if kind not in KINDS:
        raise ValueError(f"{kind!r} is no kind of head; {hint(str(kind), KINDS)}")
    return importlib.import_module(f"{__package__}.{KINDS[kind]}").KINDS[kind]
