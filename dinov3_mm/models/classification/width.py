"""The commonest mistake in a classification config: a head for another backbone."""

from torch import Tensor


def check_width(features: Tensor, expected: int, head: str) -> Tensor:
    """Return ``features`` (B, C, ...), or raise a ``ValueError`` if C is not ``expected``."""
    if not isinstance(features, Tensor):
        raise ValueError(
            f"{head} got a {type(features).__name__} of features; expected a tensor: put a "
            "DINOv3ClsPatchNeck before it, or set model.backbone.out_type"
        )
    if features.shape[1] != expected:
        raise ValueError(
            f"{head} takes features of width {expected}, the backbone and neck give "
            f"{features.shape[1]}: set model.head.in_channels={features.shape[1]}"
        )
    return features
