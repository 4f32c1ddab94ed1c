"""Which blocks to take features from."""

from collections.abc import Sequence

FOUR_EVEN = "four_even"

Layers = int | Sequence[int] | str | None


def resolve_layers(layers: Layers, num_blocks: int) -> tuple[int, ...]:
    """Block indices, ascending.

    Args:
        layers: the last n blocks, block indices from 0, 'four_even', or None for none.
        num_blocks: blocks of the backbone.

    Raises:
        ValueError: If an index is negative, repeated or out of range.
    """
    if layers is None:
        return ()
    if layers == FOUR_EVEN:
        return four_even_blocks(num_blocks)
    if isinstance(layers, str):
        raise ValueError(f"layers is {layers!r}; expected a number, block indices or {FOUR_EVEN!r}")
    wanted = range(num_blocks - layers, num_blocks) if isinstance(layers, int) else layers
    wanted = tuple(sorted(wanted))
    if len(set(wanted)) < len(wanted) or set(wanted) - set(range(num_blocks)):
        raise ValueError(
            f"layers is {layers}; expected a number of blocks, or distinct block indices from 0 to "
            f"{num_blocks - 1}"
        )
    return wanted


def four_even_blocks(num_blocks: int) -> tuple[int, ...]:
    """The four evenly spaced blocks of the DINOv3 evaluations; all stages of a ConvNeXt.

    The 24 blocks of ViT-L are an exception that has been kept since DINOv2.

    Raises:
        ValueError: If there are fewer than four blocks.
    """
    if num_blocks < 4:
        raise ValueError(
            f"four evenly spaced blocks need at least 4, the backbone has {num_blocks}"
        )
    if num_blocks == 24:
        return 4, 11, 17, 23
    step = num_blocks // 4
    return tuple(step * part - 1 for part in range(1, 5))
