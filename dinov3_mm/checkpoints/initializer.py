"""The way from a config to pretrained weights: ``init_cfg=dict(type='DINOv3Pretrained', ...)``."""

import os

from mmengine.model import update_init_info
from mmengine.registry import WEIGHT_INITIALIZERS
from torch import nn

from .inflation import check_rule
from .installing import load_backbone_weights


@WEIGHT_INITIALIZERS.register_module()
class DINOv3Pretrained:
    """MMEngine initializer that loads a backbone from a weight file of any known format.

    Args:
        checkpoint: file, folder, http(s) URL, hub name, or name of a released checkpoint; see
            :func:`load_weights`. None is refused on use.
        reset_bias_mask: set the mask of the qkv bias to 1/0/1, so that the q and v biases of
            released weights train.
        periods: 'file' or 'exact'; see :func:`load_weights`.
        allow_partial: load the tensors that fit; the others keep the backbone's own
            initialisation.
        inflate: 'mean', 'repeat', 'zero' or 'append_mean' to adapt weights for another number of
            image channels; see :mod:`~dinov3_mm.checkpoints.inflation`.

    Raises:
        ValueError: If ``inflate`` is no such rule.
        FileNotFoundError: On use, if nothing is there.
        ValueError: On use, if no checkpoint is given, or the weights cannot be read or do not fit
            the backbone.

    Example:
        >>> init_cfg = dict(type="DINOv3Pretrained", checkpoint="dinov3_vits16.pth")
        >>> backbone = dict(type="DINOv3ViT", arch="small", init_cfg=init_cfg)
    """

    def __init__(
        self,
        checkpoint: str | os.PathLike | None,
        reset_bias_mask: bool = False,
        periods: str = "file",
        allow_partial: bool = False,
        inflate: str | None = None,
    ) -> None:
        check_rule(inflate)
        self.checkpoint = checkpoint
        self.reset_bias_mask = reset_bias_mask
        self.periods = periods
        self.allow_partial = allow_partial
        self.inflate = inflate

    def __call__(self, module: nn.Module) -> None:
        """Load the weights into ``module``; all of it or nothing, unless partial."""
        if self.checkpoint is None:
            raise ValueError(
                f"no weights for this {type(module).__name__}: give them with --weights FILE or as "
                "init_cfg.checkpoint, or set the backbone's init_cfg=None to leave it random"
            )
        options = {
            "periods": self.periods,
            "reset_bias_mask": self.reset_bias_mask,
            "allow_partial": self.allow_partial,
            "inflate": self.inflate,
        }
        report = load_backbone_weights(module, self.checkpoint, **options)
        module.weights_origin = {"checkpoint": self.checkpoint, **options}
        # MMEngine lists this for every parameter when a whole model is initialised.
        if hasattr(module, "_params_init_info"):
            update_init_info(module, init_info=f"{type(self).__name__}: {report}")
