"""The input of DINOv3's linear classifiers: CLS tokens and the mean patch."""

from collections.abc import Sequence

import torch
from mmengine.model import BaseModule
from mmengine.registry import MODELS
from torch import Tensor


@MODELS.register_module()
class DINOv3ClsPatchNeck(BaseModule):
    """Concatenates the CLS tokens of all layers, and the mean patch of the last.

    The released linear classifier takes the last layer, ``(CLS, mean patch)``: 2 C channels. Put it
    behind a backbone with ``out_type='featmap+cls'`` whose ``out_indices`` name the layers; with n
    layers of width C it gives (n + 1) C channels.

    Args:
        patch_mean: whether to append the mean patch.
        init_cfg: MMEngine initialisation config.
    """

    def __init__(self, *, patch_mean: bool = True, init_cfg: dict | None = None) -> None:
        super().__init__(init_cfg)
        self.patch_mean = patch_mean

    def forward(self, feats: Sequence[tuple[Tensor, Tensor]]) -> tuple[Tensor]:
        """Concatenate.

        Args:
            feats: per layer, ascending, a map (B, C, h, w) and CLS (B, C).

        Returns:
            One tensor (B, channels), in at least fp32.

        Raises:
            TypeError: if the backbone gives something else.
        """
        for output in feats:
            if isinstance(output, Tensor) or len(output) != 2:
                given = tuple(output.shape) if isinstance(output, Tensor) else type(output).__name__
                raise TypeError(
                    f"DINOv3ClsPatchNeck got {given} per layer; expected pairs of map and CLS: set "
                    "model.backbone.out_type='featmap+cls'"
                )
        parts = [cls for _, cls in feats]
        dtype = torch.promote_types(parts[-1].dtype, torch.float32)
        if self.patch_mean:
            parts.append(feats[-1][0].mean((2, 3), dtype=dtype))
        return (torch.cat([part.to(dtype) for part in parts], dim=1),)
