"""The line that says what a load did."""

from dataclasses import dataclass


@dataclass(frozen=True)
class LoadReport:
    """What was loaded, from where, and what was chosen on the way.

    Attributes:
        source: path that was given.
        layout: whose names the tensors carried, in words.
        container: kind of file or folder, in words.
        num_tensors: tensors of the backbone, all of which were loaded.
        statistics: name of the input normalisation, or 'unknown'.
        heads: projection heads in the file, e.g. ``('dino_head', 'ibot_head')``.
        notes: what was dropped, made up or chosen.
    """

    source: str
    layout: str
    container: str
    num_tensors: int
    statistics: str
    heads: tuple[str, ...]
    notes: tuple[str, ...]

    def __str__(self) -> str:
        line = (
            f"loaded {self.num_tensors}/{self.num_tensors} backbone tensors from {self.layout} "
            f"{self.container} {self.source}, statistics {self.statistics}, "
            f"heads: {', '.join(self.heads) or 'none'}"
        )
        return "; ".join((line, *self.notes))
