"""Overlays as files: a PNG for an image, a video for a video."""

from pathlib import Path

import cv2
import numpy as np

from dinov3_mm.checkpoints import atomic_write

from .inputs import NamedImage, frame_rate


class PictureWriter:
    """Writes overlays into a folder as they come; a context manager.

    An image becomes ``NAME.png``. Frames of a video become ``NAME.mp4``, which appears when it is
    complete.

    Args:
        folder: where to write; made if it is not there. None writes nothing.
    """

    def __init__(self, folder: Path | None) -> None:
        self.folder = folder
        self._video: Path | None = None
        self._stream: cv2.VideoWriter | None = None
        self._shape: tuple[int, ...] = ()

    def __enter__(self) -> "PictureWriter":
        return self

    def __exit__(self, kind: type | None, *_: object) -> None:
        self._close(complete=kind is None)

    def write(self, image: NamedImage, overlay: np.ndarray) -> None:
        """Write the overlay (H, W, 3) uint8 RGB of an image or frame."""
        if self.folder is None:
            return
        if image.video != self._video:
            self._close(complete=True)
            self._video = image.video
        if image.video is None:
            target = (self.folder / image.name).with_suffix(".png")
            target.parent.mkdir(parents=True, exist_ok=True)
            encoded = cv2.imencode(".png", overlay[..., ::-1])[1]
            with atomic_write(target) as partial:
                partial.write_bytes(encoded.tobytes())
            return
        if self._stream is None:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._shape = overlay.shape
            size = (overlay.shape[1], overlay.shape[0])
            code = cv2.VideoWriter_fourcc(*"mp4v")
            rate = frame_rate(image.video)
            self._stream = cv2.VideoWriter(str(self._partial()), code, rate, size)
        self._stream.write(np.ascontiguousarray(_fitted(overlay, self._shape)[..., ::-1]))

    def _partial(self) -> Path:
        return self.folder / f".{self._video.stem}.partial.mp4"

    def _close(self, *, complete: bool) -> None:
        if self._stream is None:
            return
        self._stream.release()
        self._stream = None
        if complete:
            self._partial().replace(self.folder / f"{self._video.stem}.mp4")
        else:
            self._partial().unlink(missing_ok=True)


def _fitted(overlay: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """A frame as large as the first one, which a video needs: cut, or framed in white."""
    if overlay.shape == shape:
        return overlay
    frame = np.full(shape, 255, np.uint8)
    height, width = min(shape[0], overlay.shape[0]), min(shape[1], overlay.shape[1])
    frame[:height, :width] = overlay[:height, :width]
    return frame
