"""The check of what a depth head is given, before a shape error deep inside it."""

from collections.abc import Sequence

from torch import Tensor

Level = tuple[Tensor, Tensor | None]


def check_levels(
    feats: Sequence, in_channels: Sequence[int], *, needs_cls: bool, head: str
) -> list[Level]:
    """Pairs of patch map (B, C, h, w) and CLS (B, C) or None, one per layer of the backbone.

    Args:
        feats: what the backbone gives: pairs (``out_type='featmap+cls'``) or maps.
        in_channels: expected width of each layer.
        needs_cls: whether CLS is used.
        head: name for the errors.

    Raises:
        ValueError: if there are more or fewer layers, of other widths, or without CLS.
    """
    levels = [(level, None) if isinstance(level, Tensor) else tuple(level) for level in feats]
    if len(levels) != len(in_channels):
        raise ValueError(
            f"{head} takes {len(in_channels)} layers, the backbone gives {len(levels)}: "
            "model.backbone.out_indices and model.decode_head.in_channels must agree"
        )
    widths = [featmap.shape[1] for featmap, _ in levels]
    if any(featmap.ndim != 4 for featmap, _ in levels) or widths != list(in_channels):
        shapes = [tuple(featmap.shape) for featmap, _ in levels]
        raise ValueError(
            f"{head} takes maps (B, C, h, w) of widths {list(in_channels)}, given {shapes}: set "
            f"model.decode_head.in_channels={widths}, and backbone.out_type='featmap+cls'"
        )
    if needs_cls and any(cls is None for _, cls in levels):
        raise ValueError(
            f"{head} uses CLS, which the backbone does not give: set "
            "model.backbone.out_type='featmap+cls'"
        )
    return levels


def as_widths(in_channels: int | Sequence[int]) -> list[int]:
    """One width per layer; a number is one layer."""
    return [in_channels] if isinstance(in_channels, int) else list(in_channels)
