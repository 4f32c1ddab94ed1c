"""What backbones return, and which layers they are asked for."""

from collections.abc import Sequence
from typing import Any, NamedTuple

from mmengine.model import BaseModule
from mmengine.registry import WEIGHT_INITIALIZERS
from torch import Tensor

OUT_TYPES = ("featmap", "cls_token", "avg_featmap", "raw", "featmap+cls")


class TokenOutput(NamedTuple):
    """Tokens of one batch of images after the last layer.

    Attributes:
        cls: (B, D), after the final norm.
        registers: (B, R, D), after the final norm.
        patches: (B, N, D), after the final norm, row by row.
        prenorm: (B, 1 + R + N, D), all tokens before the final norm; of a ConvNeXt, the patches
            (B, N, D) only.
    """

    cls: Tensor
    registers: Tensor
    patches: Tensor
    prenorm: Tensor

    def official(
        self, mask: Tensor | None, registers_key: str = "x_storage_tokens"
    ) -> dict[str, Tensor | None]:
        """The same under the keys of the official code, with the mask that was given."""
        return {
            "x_norm_clstoken": self.cls,
            registers_key: self.registers,
            "x_norm_patchtokens": self.patches,
            "x_prenorm": self.prenorm,
            "masks": mask,
        }


def check_out_type(out_type: str) -> str:
    """Return ``out_type``, or raise a ``ValueError`` if it is none of :data:`OUT_TYPES`."""
    if out_type not in OUT_TYPES:
        raise ValueError(f"out_type is {out_type!r}; expected one of {OUT_TYPES}")
    return out_type


def resolve_out_indices(
    out_indices: int | Sequence[int], num_layers: int, layers: str = "blocks"
) -> tuple[int, ...]:
    """Layer indices from 0; ``layers`` is what they are called in the error.

    Raises:
        ValueError: if there are none, or they are out of range, repeated or not ascending.
    """
    given = (out_indices,) if isinstance(out_indices, int) else tuple(out_indices)
    resolved = tuple(index + num_layers if index < 0 else index for index in given)
    in_range = all(0 <= index < num_layers for index in resolved)
    if not resolved or not in_range or list(resolved) != sorted(set(resolved)):
        raise ValueError(
            f"out_indices is {out_indices}; expected ascending, distinct {layers} out of "
            f"{num_layers}, counted from 0 or, if negative, from the end"
        )
    return resolved


def resolve_layers(n: int | Sequence[int], num_layers: int, layer: str = "block") -> Sequence[int]:
    """The last n layers, or the layers n, as ascending indices from 0.

    Raises:
        ValueError: if there are none, or they are negative, repeated or out of range.
    """
    wanted = range(num_layers - n, num_layers) if isinstance(n, int) else sorted(n)
    distinct = set(wanted)
    if not wanted or len(distinct) < len(wanted) or distinct - set(range(num_layers)):
        raise ValueError(
            f"n is {n}; expected a number of {layer}s or distinct {layer} indices out of "
            f"{num_layers}, counted from 0"
        )
    return wanted


RECORD = "weights_record"


class RecordedWeights(BaseModule):
    """Base of backbones that load from a record in a state dict.

    A checkpoint of a model on a frozen backbone holds one entry, ``weights_record``, in place of
    the backbone's tensors (see ``FrozenBackboneHook``). Whoever loads such a checkpoint, a host's
    own tools included, gets the tensors from the source that the record names, or an error.

    Attributes:
        weights_origin: arguments of the initializer that loaded the weights; None for others.
    """

    weights_origin: dict[str, Any] | None = None

    def _load_from_state_dict(self, state_dict: dict, prefix: str, *args: Any) -> None:
        """Load as any module, or, from a record, the weights that it names."""
        record = state_dict.pop(prefix + RECORD, None)
        if record is not None:
            WEIGHT_INITIALIZERS.build(dict(type="DINOv3Recorded", record=record))(self)
            state_dict.update({prefix + name: value for name, value in self.state_dict().items()})
        super()._load_from_state_dict(state_dict, prefix, *args)
