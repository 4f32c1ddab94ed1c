"""Classify, segment, detect and estimate depth: one function each."""

import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from dinov3_mm.visualization.overlays import colour_depth, draw_boxes, draw_caption, draw_segments

from .inputs import Inputs, NamedImage, PictureWriter, iterate_images
from .model import DownstreamModel, as_model

# --- Results, one object an image ---


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


# --- One function a job ---


Model = DownstreamModel | str | os.PathLike | Sequence


def classify(
    model: Model, inputs: Inputs, *, out_dir: str | os.PathLike | None = None, top: int = 5
) -> Iterator[Classified]:
    """Class probabilities of images.

    Args:
        model: of :func:`load_model`, a config file, or a pair (config file, checkpoint).
        inputs: arrays, files, folders or videos; see :func:`iterate_images`.
        out_dir: write each image with its best classes there.
        top: number of classes in ``labels`` and in the picture.

    Yields:
        A result an image, in the order of the inputs, as it is ready.

    Raises:
        ValueError: a model of another job, or inputs of another form.
        FileNotFoundError: a path where nothing is.
    """
    model = as_model(model, "classification")

    def read(image: NamedImage, sample: Any) -> Classified:
        scores = _array(sample.pred_score)
        best = np.argsort(-scores, kind="stable")[:top]
        return Classified(image.name, scores, best, model.classes)

    def draw(image: NamedImage, result: Classified) -> np.ndarray:
        names = [model.classes[i] if model.classes else str(i) for i in result.labels]
        scores = result.scores[result.labels]
        lines = [f"{name} {score:.2f}" for name, score in zip(names, scores)]
        return draw_caption(image.pixels, lines)

    return _run(model, inputs, out_dir, read, draw)


def segment(
    model: Model, inputs: Inputs, *, out_dir: str | os.PathLike | None = None, opacity: float = 0.55
) -> Iterator[Segmented]:
    """Class of every pixel of images.

    Args:
        model, inputs: see :func:`classify`.
        out_dir: write each image under the colours of its classes there.
        opacity: of the colours.

    Yields, Raises: see :func:`classify`.
    """
    model = as_model(model, "segmentation")

    def read(image: NamedImage, sample: Any) -> Segmented:
        return Segmented(image.name, _array(sample.pred_sem_seg.data)[0], model.classes)

    def draw(image: NamedImage, result: Segmented) -> np.ndarray:
        return draw_segments(image.pixels, result.labels, model.palette, opacity=opacity)

    return _run(model, inputs, out_dir, read, draw)


def detect(
    model: Model,
    inputs: Inputs,
    *,
    out_dir: str | os.PathLike | None = None,
    threshold: float = 0.3,
) -> Iterator[Detected]:
    """Objects in images.

    Args:
        model, inputs: see :func:`classify`.
        out_dir: write each image with its boxes there.
        threshold: least score of a box that is returned.

    Yields, Raises: see :func:`classify`.
    """
    model = as_model(model, "detection")

    def read(image: NamedImage, sample: Any) -> Detected:
        found = sample.pred_instances
        found = found[found.scores >= threshold]
        order = np.argsort(-_array(found.scores), kind="stable")
        masks = _array(found.masks)[order].astype(bool) if "masks" in found else None
        return Detected(
            image.name,
            _array(found.bboxes)[order].astype(np.float32),
            _array(found.scores)[order],
            _array(found.labels)[order],
            masks,
            model.classes,
        )

    def draw(image: NamedImage, result: Detected) -> np.ndarray:
        names = [model.classes[i] if model.classes else str(i) for i in result.labels]
        captions = [f"{name} {score:.2f}" for name, score in zip(names, result.scores)]
        return draw_boxes(
            image.pixels, result.boxes, result.labels, captions, model.palette, result.masks
        )

    return _run(model, inputs, out_dir, read, draw)


def estimate_depth(
    model: Model,
    inputs: Inputs,
    *,
    out_dir: str | os.PathLike | None = None,
    limits: tuple[float, float] | None = None,
) -> Iterator[DepthEstimated]:
    """Depth of every pixel of images.

    Args:
        model, inputs: see :func:`classify`.
        out_dir: write the depth of each image as colours beside it there.
        limits: depths of the ends of the colour scale; None for those of each image.

    Yields, Raises: see :func:`classify`.
    """
    model = as_model(model, "depth")

    def read(image: NamedImage, sample: Any) -> DepthEstimated:
        return DepthEstimated(image.name, _array(sample.pred_depth_map.data)[0])

    def draw(image: NamedImage, result: DepthEstimated) -> np.ndarray:
        colours = colour_depth(result.depth, *(limits or (None, None)))
        return np.concatenate((image.pixels, colours), axis=1)

    return _run(model, inputs, out_dir, read, draw)


def _run(
    model: DownstreamModel,
    inputs: Inputs,
    out_dir: str | os.PathLike | None,
    read: Callable[[NamedImage, Any], Any],
    draw: Callable[[NamedImage, Any], np.ndarray],
) -> Iterator[Any]:
    with PictureWriter(None if out_dir is None else Path(out_dir)) as pictures:
        for image in iterate_images(inputs):
            (sample,) = model.predict([image.pixels])
            result = read(image, sample)
            if out_dir is not None:
                pictures.write(image, draw(image, result))
            yield result


def _array(values: Any) -> np.ndarray:
    tensor = getattr(values, "tensor", values)  # boxes of mmdet may be objects
    return tensor.detach().cpu().numpy() if hasattr(tensor, "detach") else np.asarray(tensor)
