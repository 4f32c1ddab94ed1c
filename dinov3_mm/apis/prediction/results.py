"""What the prediction functions return, one object an image."""

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Classified:
    """Attributes:
    name: of the image.
    scores: (K,) float32, probabilities of all classes.
    labels: the most probable classes, best first.
    classes: names of all classes, empty if unknown.
    """

    name: str
    scores: np.ndarray
    labels: np.ndarray
    classes: tuple[str, ...]

    @property
    def best(self) -> str:
        """Name of the most probable class."""
        return self.classes[self.labels[0]] if self.classes else str(self.labels[0])


@dataclass(frozen=True)
class Segmented:
    """Attributes:
    name: of the image.
    labels: (H, W) int64, the class of every pixel of the image.
    classes: names of all classes, empty if unknown.
    """

    name: str
    labels: np.ndarray
    classes: tuple[str, ...]


@dataclass(frozen=True)
class Detected:
    """Attributes:
    name: of the image.
    boxes: (N, 4) float32, x1, y1, x2, y2 in pixels of the image, best first.
    scores: (N,) float32.
    labels: (N,) int64.
    masks: (N, H, W) bool, or None for a detector of boxes.
    classes: names of all classes, empty if unknown.
    """

    name: str
    boxes: np.ndarray
    scores: np.ndarray
    labels: np.ndarray
    masks: np.ndarray | None
    classes: tuple[str, ...]


@dataclass(frozen=True)
class DepthEstimated:
    """Attributes:
    name: of the image.
    depth: (H, W) float32, in the unit that the model was trained on (metres for the released
        ones).
    """

    name: str
    depth: np.ndarray
