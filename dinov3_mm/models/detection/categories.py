"""Category ids of COCO, by which the released detector counts its classes."""

from collections.abc import Sequence

from dinov3_mm.suggest import hint

_UNUSED = (12, 26, 29, 30, 45, 66, 68, 69, 71, 83)
# The ids of the 80 classes in their order; the largest is 90.
COCO_CATEGORY_IDS = tuple(number for number in range(1, 91) if number not in _UNUSED)

_NAMED = {"coco": COCO_CATEGORY_IDS}


def resolve_category_ids(ids: str | Sequence[int] | None, num_classes: int) -> list[int]:
    """The class output of each label.

    Args:
        ids: 'coco', one output a label, or None for labels that are outputs themselves.
        num_classes: labels.

    Raises:
        ValueError: if the name is unknown, or the numbers are not one for each label.
    """
    if isinstance(ids, str):
        if ids not in _NAMED:
            raise ValueError(f"category_ids is {ids!r}; {hint(ids, _NAMED)}, or a list of numbers")
        ids = _NAMED[ids]
    ids = list(range(num_classes) if ids is None else ids)
    if len(ids) != num_classes or len(set(ids)) != num_classes or min(ids, default=0) < 0:
        raise ValueError(
            f"category_ids holds {len(set(ids))} numbers for {num_classes} classes; expected one "
            "for each, 0 or more; for classes of your own leave category_ids=None"
        )
    return ids
