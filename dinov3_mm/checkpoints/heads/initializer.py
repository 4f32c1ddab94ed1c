"""The way from a config to a released head: ``init_cfg=dict(type='DINOv3HeadPretrained', ...)``."""

import os

from mmengine.model import update_init_info
from mmengine.registry import WEIGHT_INITIALIZERS
from torch import nn

from .kinds import head_names
from .loading import load_head


@WEIGHT_INITIALIZERS.register_module()
class DINOv3HeadPretrained:
    """MMEngine initializer that loads a head file; see :func:`load_head`.

    ``tools/train.py`` and ``tools/test.py`` set ``checkpoint`` from ``--head FILE``.

    Args:
        kind: what the file is, e.g. 'linear_segmentation'.
        checkpoint: file, http(s) URL, or the name of a file in torch hub's cache. None is refused
            on use.

    Raises:
        ValueError: If the kind is unknown; on use, if no checkpoint is given, or it cannot be read
            or does not fit the head.
        FileNotFoundError: On use, if nothing is there.

    Example:
        >>> init_cfg = dict(
        ...     type="DINOv3HeadPretrained",
        ...     kind="linear_segmentation",
        ...     checkpoint="model_final.pth",
        ... )
    """

    def __init__(self, kind: str, checkpoint: str | os.PathLike | None = None) -> None:
        head_names(kind)
        self.kind = kind
        self.checkpoint = checkpoint

    def __call__(self, module: nn.Module) -> None:
        """Load the head into ``module``; all of it or nothing."""
        if self.checkpoint is None:
            raise ValueError(
                f"no weights for this {type(module).__name__}: give them with --head FILE or as "
                "init_cfg.checkpoint, or remove the head's init_cfg to train it from the start"
            )
        load_head(module, self.checkpoint, kind=self.kind)
        # MMEngine initialises the children after their parent: they would overwrite the weights.
        for child in module.modules():
            if hasattr(child, "init_weights"):
                child.is_init = True
        # MMEngine lists this for every parameter when a whole model is initialised.
        if hasattr(module, "_params_init_info"):
            update_init_info(module, init_info=f"{type(self).__name__}: {self.checkpoint}")
