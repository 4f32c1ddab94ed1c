"""Renaming of tensors between two layouts by table."""

from collections.abc import Iterable, Mapping

from torch import Tensor


class NameTable:
    """Renaming between the official layout and another one.

    Args:
        top: names outside the blocks, official to foreign.
        block: names inside a block, official to foreign.
        foreign_root: what the foreign layout calls its list of blocks ('blocks' officially).
    """

    def __init__(
        self, top: Mapping[str, str], block: Mapping[str, str], foreign_root: str = "blocks"
    ) -> None:
        self._forward = (dict(top), dict(block), "blocks", foreign_root)
        self._backward = (_inverse(top), _inverse(block), foreign_root, "blocks")

    def to_foreign(
        self, tensors: Mapping[str, Tensor]
    ) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Tensors under foreign names, and those that the table does not know."""
        return _rename(tensors, *self._forward)

    def to_official(
        self, tensors: Mapping[str, Tensor]
    ) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Tensors under official names, and those that the table does not know."""
        return _rename(tensors, *self._backward)


def with_bias(*pairs: tuple[str, str]) -> dict[str, str]:
    """Table entries for the weight and the bias of each pair of modules."""
    return {
        f"{ours}.{leaf}": f"{theirs}.{leaf}"
        for ours, theirs in pairs
        for leaf in ("weight", "bias")
    }


def num_blocks(names: Iterable[str], root: str = "blocks") -> int:
    """Highest block index plus one among names such as ``blocks.11.norm1.weight``."""
    indices = (name.split(".")[1] for name in names if name.startswith(root + "."))
    return max((int(index) + 1 for index in indices if index.isdigit()), default=0)


def _inverse(names: Mapping[str, str]) -> dict[str, str]:
    return {foreign: official for official, foreign in names.items()}


def _rename(
    tensors: Mapping[str, Tensor], top: dict, block: dict, root_from: str, root_to: str
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    renamed: dict[str, Tensor] = {}
    left: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        root, _, rest = name.partition(".")
        index, _, inside = rest.partition(".")
        if name in top:
            renamed[top[name]] = tensor
        elif root == root_from and index.isdigit() and inside in block:
            renamed[f"{root_to}.{index}.{block[inside]}"] = tensor
        else:
            left[name] = tensor
    return renamed, left
