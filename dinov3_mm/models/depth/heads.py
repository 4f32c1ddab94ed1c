"""What depth heads have in common: decoding to metres and the losses."""

from collections.abc import Sequence

from mmengine.model import BaseModule
from mmengine.registry import MODELS
from torch import Tensor, nn
from torch.nn import functional as F

from dinov3_mm.suggest import hint

from .bins import NORMS, bin_centers, expected_depth, regressed_depth
from .features import as_widths


class DepthHead(BaseModule):
    """Base of the depth heads; subclasses turn features into logits (B, ``num_bins``, H', W').

    Depth is the mean of ``num_bins`` depths under a distribution made of the logits; with one bin
    it is ``ReLU(logit) + min_depth``. Decoding and losses run in fp32 under any autocast.

    Args:
        in_channels: width of each layer that the backbone gives; a number for one layer.
        num_bins: channels of the output.
        min_depth, max_depth: range of the bins, in metres or whatever the truth is in.
        bins: where the bins lie, see :func:`~dinov3_mm.models.depth.bins.bin_centers`.
        norm: how logits become a distribution, see
            :func:`~dinov3_mm.models.depth.bins.expected_depth`.
        loss_decode: config of a loss, or of several, whose sum counts.
        zero_is_valid: whether a truth of 0 is a measurement, as a canopy height is; otherwise 0
            means that nothing was measured. Negative and infinite values and NaN never count.
        init_cfg: MMEngine initialisation config.

    Raises:
        ValueError: if bins or norm are unknown, or the range is no range.
    """

    def __init__(
        self,
        in_channels: int | Sequence[int],
        *,
        num_bins: int = 256,
        min_depth: float = 1e-3,
        max_depth: float = 10.0,
        bins: str = "linear",
        norm: str = "linear",
        loss_decode: dict | Sequence[dict] = (dict(type="DINOv3SigLoss"),),
        zero_is_valid: bool = False,
        init_cfg: dict | list[dict] | None = None,
    ) -> None:
        super().__init__(init_cfg)
        self.in_channels = as_widths(in_channels)
        self.num_bins = num_bins
        self.min_depth = min_depth
        self.max_depth = max_depth
        if norm not in NORMS:
            raise ValueError(f"norm is {norm!r}; {hint(norm, NORMS)}")
        self.norm = norm
        centers = None if num_bins == 1 else bin_centers(bins, num_bins, min_depth, max_depth)
        self.register_buffer("bins", centers, persistent=False)
        self.zero_is_valid = zero_is_valid
        configs = [loss_decode] if isinstance(loss_decode, dict) else loss_decode
        self.losses = nn.ModuleList(MODELS.build(config) for config in configs)
        names = [loss.loss_name for loss in self.losses]
        if len(set(names)) < len(names):
            raise ValueError(f"losses are called {names}; give each a loss_name of its own")

    def forward(self, feats: Sequence) -> Tensor:
        """Logits (B, ``num_bins``, H', W') of the layers that the backbone gives."""
        raise NotImplementedError

    def decode(self, logits: Tensor) -> Tensor:
        """Depth (B, 1, H', W') of logits, in fp32."""
        if self.bins is None:
            return regressed_depth(logits, self.min_depth)
        return expected_depth(logits, self.bins, self.norm)

    def predict(self, feats: Sequence) -> Tensor:
        """Depth (B, 1, H', W') at the resolution of the head, in fp32."""
        return self.decode(self(feats))

    def loss(
        self, feats: Sequence, target: Tensor, *, step: Tensor | None = None
    ) -> dict[str, Tensor]:
        """Losses of the prediction, resized to the truth.

        Args:
            feats: layers that the backbone gives.
            target: depth (B, 1, H, W).
            step: training steps that are done.
        """
        depth = self.predict(feats)
        depth = F.interpolate(depth, size=target.shape[-2:], mode="bilinear", align_corners=False)
        measured = (target >= 0) if self.zero_is_valid else (target > 0)
        mask = measured & target.isfinite()
        return {loss.loss_name: loss(depth, target, mask, step=step) for loss in self.losses}
