"""What a conversion between formats reports."""

from dataclasses import dataclass
from pathlib import Path

from .foreign_models import READERS
from .report import LoadReport

# Allowed difference of features, relative to the largest value.
BAR = 1e-4


@dataclass(frozen=True)
class ConversionReport:
    """What a conversion did.

    Attributes:
        source: what was read.
        target: name of the format.
        path: file or folder that was written.
        num_mapped: official tensors that have a place in the format.
        num_tensors: official tensors in all.
        dropped: what has no place: pattern of names and reason.
        made_up: what the source does not hold.
        reader: library and version that the features were compared with; None if it is missing.
        differences: largest difference of 'cls' and 'patches' over the largest value.
        periods_effect: the same between rounded periods of the source and the exact ones of the
            library, with equal weights; None if the periods are the same.
        usage: Python that loads the result.
    """

    source: LoadReport
    target: str
    path: Path
    num_mapped: int
    num_tensors: int
    dropped: tuple[str, ...]
    made_up: tuple[str, ...]
    reader: str | None
    differences: dict[str, float]
    periods_effect: float | None
    usage: str

    def __str__(self) -> str:
        check = f"{self.reader or READERS[self.target].package}: not compared"
        if self.differences:
            values = ", ".join(f"{name} {value:.1e}" for name, value in self.differences.items())
            check = f"{self.reader}: {values} of the largest value (bar {BAR:g})"
        lines = {
            "source": str(self.source),
            "target": f"{self.target} {self.path}",
            "mapped": f"{self.num_mapped} of {self.num_tensors} tensors",
            "dropped": "; ".join(self.dropped) or "nothing",
            "made up": "; ".join(self.made_up) or "nothing",
            "compared": check,
        }
        if self.periods_effect is not None:
            lines["periods"] = (
                "of the source, which are rounded, become exact in the library: features differ "
                f"by {self.periods_effect:.1e} of the largest value"
            )
        lines["load it"] = self.usage
        return "\n".join(f"{name:<9} {text}" for name, text in lines.items())
