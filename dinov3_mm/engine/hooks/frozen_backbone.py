"""Frozen backbones stay what they are, and stay out of checkpoints."""

from mmengine.hooks import Hook
from mmengine.model import is_model_wrapper
from mmengine.registry import HOOKS
from torch import nn

from dinov3_mm.checkpoints.fingerprint import fingerprint
from dinov3_mm.checkpoints.weights_record import make_record, record_to_tensor
from dinov3_mm.models.backbones.recorded_weights import RECORD, RecordedWeights


@HOOKS.register_module()
class FrozenBackboneHook(Hook):
    """Writes checkpoints of the head alone, with a record of the frozen backbone's weights.

    A backbone is left out if none of its parameters train and its weights were loaded whole by
    ``DINOv3Pretrained``. Loading such a checkpoint, by this project or by a host's own tools, loads
    the recorded weights and checks that they are the same. A backbone that trains, or whose weights
    have no source, is saved as usual.

    The record is an entry of ``state_dict``; ``meta['frozen_backbones']`` holds it in plain form.

    Raises:
        RuntimeError: When a checkpoint is written, if a frozen backbone has changed.
    """

    def __init__(self) -> None:
        self._frozen: dict[str, tuple[RecordedWeights, dict]] = {}

    def before_train(self, runner) -> None:
        """Find the frozen backbones and say what becomes of them."""
        model = runner.model.module if is_model_wrapper(runner.model) else runner.model
        for name, module in model.named_modules():
            if not isinstance(module, RecordedWeights):
                continue
            reason = _reason_to_save(module)
            if reason is None:
                self._frozen[name] = (module, make_record(module))
                reason = "checkpoints leave it out and name its weights"
            runner.logger.info(f"{name}: {reason}")

    def before_save_checkpoint(self, runner, checkpoint: dict) -> None:
        """Replace the tensors of each frozen backbone by their record."""
        for name, (module, record) in self._frozen.items():
            if fingerprint(module) != record["fingerprint"]:
                raise RuntimeError(
                    f"{name} is frozen, but its tensors have changed since training began; "
                    "something writes to them (an EMA, a hook, a load). No checkpoint was written"
                )
            tensors = checkpoint["state_dict"]
            for key in [key for key in tensors if key.startswith(f"{name}.")]:
                del tensors[key]
            tensors[f"{name}.{RECORD}"] = record_to_tensor(record)
            checkpoint["meta"].setdefault("frozen_backbones", {})[name] = record


def _reason_to_save(module: nn.Module) -> str | None:
    """Why checkpoints must hold a backbone, or None if they need not."""
    training = sum(parameter.requires_grad for parameter in module.parameters())
    if training:
        return f"{training} of its tensors train; checkpoints hold all of it"
    if module.weights_origin is None:
        return "frozen, but its weights come from no file; checkpoints hold all of it"
    if module.weights_origin.get("allow_partial"):
        return "frozen, but loaded in part only; checkpoints hold all of it"
    return None
