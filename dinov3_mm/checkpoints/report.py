"""The line that says what a load did."""

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class LoadReport:
    """What was loaded, from where, and what was chosen on the way.

    Attributes:
        source: path that was given.
        layout: whose names the tensors carried, in words.
        container: kind of file or folder, in words.
        num_tensors: tensors of the backbone.
        statistics: name of the input normalisation, or 'unknown'.
        heads: projection heads in the file, e.g. ``('dino_head', 'ibot_head')``.
        notes: what was dropped, made up or chosen.
        missing: tensors of the backbone that the source lacks; they kept their values.
        unexpected: tensors of the source that the backbone has no place for.
        other_shape: tensors that have other shapes in the backbone, which kept its values.
    """

    source: str
    layout: str
    container: str
    num_tensors: int
    statistics: str
    heads: tuple[str, ...]
    notes: tuple[str, ...]
    missing: tuple[str, ...] = ()
    unexpected: tuple[str, ...] = ()
    other_shape: tuple[str, ...] = ()

    @property
    def num_loaded(self) -> int:
        """Tensors of the backbone that were loaded: all, unless a partial load was allowed."""
        return self.num_tensors - len(self.missing) - len(self.other_shape)

    def __str__(self) -> str:
        line = (
            f"loaded {self.num_loaded}/{self.num_tensors} backbone tensors from {self.layout} "
            f"{self.container} {self.source}, statistics {self.statistics}, "
            f"heads: {', '.join(self.heads) or 'none'}"
        )
        left = (
            ("missing", self.missing),
            ("unexpected", self.unexpected),
            ("other shape", self.other_shape),
        )
        line += "".join(f", {kind}: {shortened(names)}" for kind, names in left if names)
        return "; ".join((line, *self.notes))


def shortened(names: Sequence[str], limit: int = 12) -> str:
    """Names for a message, at most ``limit`` of them."""
    more = f", ... and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(names[:limit]) + more
