"""Backbones whose tensors a checkpoint may leave out, naming where they come from instead."""

from typing import Any

from mmengine.model import BaseModule
from mmengine.registry import WEIGHT_INITIALIZERS

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
        record = state_dict.pop(prefix + RECORD, None)
        if record is not None:
            WEIGHT_INITIALIZERS.build(dict(type="DINOv3Recorded", record=record))(self)
            state_dict.update({prefix + name: value for name, value in self.state_dict().items()})
        super()._load_from_state_dict(state_dict, prefix, *args)
