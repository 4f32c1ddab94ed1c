"""Multi-crop augmentation of DINOv3 pretraining."""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from mmengine.registry import TRANSFORMS

from dinov3_mm.errors import hint

from . import pixel_ops
from .pixel_ops import (
    Box,
    ColorJitter,
    CropParams,
    Distortion,
    MultiCropParams,
    Uniforms,
    draw_resized_crop,
    without_colors,
)

# Grid of the offsets of local crops that are cut from global crops; fixed in the reference.
_OFFSET_GRID = 16
RELEASED_BLUR = (0.0, 0.9, 0.5)
PAPER_BLUR = (1.0, 0.1, 0.5)
COLOR_PLACES = ("worker", "device")


@TRANSFORMS.register_module()
class MultiCrop:
    """Two global crops, ``num_local`` local crops and, on request, two Gram-teacher crops.

    Order of the operations on a crop: random resized crop, flip, colour jitter, grayscale, Gaussian
    blur, for the second global crop solarisation, and the dropping of channels. Images have any
    number of channels, as uint8 or as float32 in 0..255, and crops have the type of their image;
    8-bit operations round, float ones do not. For images that do not have three channels the jitter
    changes brightness and contrast only and there is no grayscale; three channels count as RGB.

    With ``color_on='device'`` the crops leave undistorted and ``MultiCropPreprocessor`` distorts
    them, batched, where the model is. Everything is drawn here all the same, and what is drawn
    does not depend on where it is applied.

    Args:
        global_size (int): Side of the global crops in pixels.
        local_size (int): Side of the local crops in pixels.
        num_local (int): Local crops per image.
        gram_size (int | None): Side of the Gram-teacher crops, which show exactly the regions of
            the global crops; None: no such crops.
        gram_no_distortions (bool): True: the Gram-teacher crop is free of photometric distortions.
            False: it is the distorted crop at another resolution; crops that this resamples are
            float32 in the 0..255 scale, neither rounded nor clipped.
        global_scale (tuple[float, float]): Share of the image area in a global crop.
        local_scale (tuple[float, float]): Share of the image area in a local crop.
        ratio (tuple[float, float]): Width over height of the regions.
        horizontal_flip (bool): Mirror every second crop; False where orientation carries meaning.
        jitter_prob (float): Probability of the colour jitter.
        jitter (dict): Ranges, see :class:`~dinov3_mm.datasets.transforms.pixel_ops.ColorJitter`.
        grayscale_prob (float): Probability of dropping the colours.
        blur_probs (tuple[float, float, float] | str): Probability of blur for the first global
            crop, the second and the local crops. The default ``(0, 0.9, 0.5)`` is what the released
            models were trained with; the paper's text and the released configs name
            ``'paper'`` = ``(1, 0.1, 0.5)``, which the released code inverts.
        blur_sigma (tuple[float, float]): Standard deviation in pixels, uniform.
        blur_kernel (int): Side of the blur kernel, odd.
        solarize_prob (float): Probability for the second global crop.
        solarize_threshold (int): First inverted value, on the scale 0..255.
        channel_drop_prob (float): Probability for each channel of each crop to be set to 0; one
            channel at least stays. For models that must cope with missing bands. Gram-teacher
            crops without distortions keep all channels.
        share_color_jitter (bool): Draw jitter and grayscale once and apply them to the whole image
            before cropping, so that all crops of an image share their colours.
        local_from_global (bool): Cut the local crops as windows from the global crops, half of
            them from each, instead of from the image.
        partial_patches (bool): Allow local crops that end in a part of a patch, which the backbone
            cuts off, as those of 168 px in the released high-resolution stage.
        color_on (str): Where jitter, grayscale, blur, solarisation and dropping of channels are
            applied: ``'worker'``, or ``'device'``, for which each crop must be distorted by itself:
            not with ``share_color_jitter``, ``local_from_global`` or distorted Gram-teacher crops.

    Raises:
        ValueError: If an argument is out of range, or does not go with ``color_on='device'``.
    """

    def __init__(
        self,
        global_size: int = 224,
        local_size: int = 96,
        num_local: int = 8,
        *,
        gram_size: int | None = None,
        gram_no_distortions: bool = False,
        global_scale: tuple[float, float] = (0.32, 1.0),
        local_scale: tuple[float, float] = (0.05, 0.32),
        ratio: tuple[float, float] = (3 / 4, 4 / 3),
        horizontal_flip: bool = True,
        jitter_prob: float = 0.8,
        jitter: dict | None = None,
        grayscale_prob: float = 0.2,
        blur_probs: tuple[float, float, float] | str = RELEASED_BLUR,
        blur_sigma: tuple[float, float] = (0.1, 2.0),
        blur_kernel: int = 9,
        solarize_prob: float = 0.2,
        solarize_threshold: int = 128,
        channel_drop_prob: float = 0.0,
        share_color_jitter: bool = False,
        local_from_global: bool = False,
        partial_patches: bool = False,
        color_on: str = "worker",
    ) -> None:
        self.global_size = _positive("global_size", global_size)
        self.local_size = _positive("local_size", local_size)
        self.num_local = _positive("num_local", num_local)
        self.gram_size = None if gram_size is None else _positive("gram_size", gram_size)
        self.gram_no_distortions = gram_no_distortions
        self.global_scale = _interval("global_scale", global_scale, upper=1.0)
        self.local_scale = _interval("local_scale", local_scale, upper=1.0)
        self.ratio = _interval("ratio", ratio, upper=math.inf)
        self.flip_prob = 0.5 if horizontal_flip else 0.0
        self.jitter_prob = _probability("jitter_prob", jitter_prob)
        self.jitter = ColorJitter(**(jitter or {}))
        self.grayscale_prob = _probability("grayscale_prob", grayscale_prob)
        self.blur_probs = _blur_probs(blur_probs)
        self.blur_sigma = _interval("blur_sigma", blur_sigma, upper=math.inf)
        if blur_kernel < 1 or blur_kernel % 2 == 0:
            raise ValueError(f"blur_kernel must be odd and positive, got {blur_kernel}")
        self.blur_kernel = blur_kernel
        self.solarize_prob = _probability("solarize_prob", solarize_prob)
        self.solarize_threshold = solarize_threshold
        self.channel_drop_prob = _probability("channel_drop_prob", channel_drop_prob)
        self.share_color_jitter = share_color_jitter
        self.local_from_global = local_from_global
        self.partial_patches = partial_patches
        if local_from_global:
            self._check_windows()
        if color_on not in COLOR_PLACES:
            raise ValueError(f"color_on={color_on!r}; {hint(str(color_on), COLOR_PLACES)}")
        self.color_on = color_on
        if color_on == "device":
            self._check_separate()

    @property
    def base_size(self) -> int:
        """Side of the global crops before the Gram-teacher crops branch off."""
        return max(self.global_size, self.gram_size or 0)

    def _check_windows(self) -> None:
        if self.num_local % 2:
            raise ValueError(
                "local_from_global cuts half of the local crops from each global crop and needs an "
                f"even num_local, got {self.num_local}"
            )
        if self.global_size - self.local_size < _OFFSET_GRID:
            raise ValueError(
                f"local_from_global needs global_size >= local_size + {_OFFSET_GRID}, got "
                f"global_size={self.global_size} and local_size={self.local_size}"
            )

    def _check_separate(self) -> None:
        reasons = {
            "share_color_jitter=True colours the whole image before it is cropped": (
                self.share_color_jitter
            ),
            "local_from_global=True cuts local crops from distorted global crops": (
                self.local_from_global
            ),
            "Gram-teacher crops are resized after their distortion; set gram_no_distortions=True": (
                self.gram_size is not None and not self.gram_no_distortions
            ),
            f"a blur_kernel of {self.blur_kernel} does not fit crops of {self.local_size} px": (
                self.blur_kernel // 2 >= min(self.local_size, self.global_size)
            ),
        }
        for reason, applies in reasons.items():
            if applies:
                raise ValueError(f"color_on='device' distorts crop by crop, but {reason}")

    @property
    def variants(self) -> list["MultiCrop"]:
        """All sets of crop sizes: this one."""
        return [self]

    def at(self, iteration: int) -> "MultiCrop":
        """The transform of an iteration: always this one."""
        return self

    def draw(
        self, height: int, width: int, rng: np.random.Generator, num_channels: int = 3
    ) -> MultiCropParams:
        """Decide everything random for an image of ``height x width`` pixels."""
        uniform = Uniforms(rng)
        shared = self._draw_colors(uniform) if self.share_color_jitter else Distortion()
        global_crops = [
            CropParams(
                draw_resized_crop(height, width, self.global_scale, self.ratio, uniform),
                uniform() < self.flip_prob,
                self._draw_distortion(
                    uniform, num_channels, self.blur_probs[index], solarize=index == 1
                ),
            )
            for index in range(2)
        ]
        local_crops = []
        for index in range(self.num_local):
            if self.local_from_global:
                base, flip = index // (self.num_local // 2), False
                box = self._draw_window(uniform)
            else:
                base, flip = None, uniform() < self.flip_prob
                box = draw_resized_crop(height, width, self.local_scale, self.ratio, uniform)
            distortion = self._draw_distortion(uniform, num_channels, self.blur_probs[2])
            local_crops.append(CropParams(box, flip, distortion, base))
        return MultiCropParams(global_crops, local_crops, shared)

    def _draw_window(self, uniform: Uniforms) -> Box:
        steps = (self.global_size - self.local_size) // _OFFSET_GRID
        top, left = (_OFFSET_GRID * uniform.below(steps) for _ in range(2))
        return Box(top, left, self.local_size, self.local_size)

    def _draw_colors(self, uniform: Uniforms) -> Distortion:
        jitter = self.jitter.draw(uniform) if uniform() < self.jitter_prob else ()
        return Distortion(jitter=jitter, grayscale=uniform() < self.grayscale_prob)

    def _draw_distortion(
        self, uniform: Uniforms, num_channels: int, blur_prob: float, solarize: bool = False
    ) -> Distortion:
        colors = Distortion() if self.share_color_jitter else self._draw_colors(uniform)
        return Distortion(
            jitter=colors.jitter,
            grayscale=colors.grayscale,
            blur_sigma=uniform.between(*self.blur_sigma) if uniform() < blur_prob else None,
            solarize=solarize and uniform() < self.solarize_prob,
            dropped=self._draw_dropped(uniform, num_channels) if self.channel_drop_prob else (),
        )

    def _draw_dropped(self, uniform: Uniforms, num_channels: int) -> tuple[int, ...]:
        channels = range(num_channels)
        dropped = [channel for channel in channels if uniform() < self.channel_drop_prob]
        if len(dropped) == num_channels:
            dropped.remove(uniform.below(num_channels))
        return tuple(dropped)

    def apply(self, image: np.ndarray, params: MultiCropParams) -> dict[str, Any]:
        """Make the crops that ``params`` describe; see :meth:`__call__`."""
        if self.color_on == "device":
            sample = self._crops(image, without_colors(params))
            return {**sample, "colors": self._drawn_colors(params)}
        return self._crops(image, params)

    def _drawn_colors(self, params: MultiCropParams) -> dict[str, Any]:
        return {
            "global_crops": [crop.distortion for crop in params.global_crops],
            "local_crops": [crop.distortion for crop in params.local_crops],
            "blur_kernel": self.blur_kernel,
            "solarize_threshold": self.solarize_threshold,
        }

    def _crops(self, image: np.ndarray, params: MultiCropParams) -> dict[str, list[np.ndarray]]:
        image = self._distort(image, params.shared)
        bases = [self._base_crop(image, crop) for crop in params.global_crops]
        sample: dict[str, list[np.ndarray]] = {"global_crops": [], "local_crops": []}
        for base, crop in zip(bases, params.global_crops):
            global_crop, gram_crop = self._global_and_gram(base, crop.distortion)
            sample["global_crops"].append(pixel_ops.to_chw(global_crop))
            if gram_crop is not None:
                sample.setdefault("gram_crops", []).append(pixel_ops.to_chw(gram_crop))
        for crop in params.local_crops:
            local = self._local_crop(image, bases, crop)
            sample["local_crops"].append(pixel_ops.to_chw(local))
        return sample

    def __call__(self, image: np.ndarray, rng: np.random.Generator) -> dict[str, Any]:
        """Augment one image.

        Args:
            image (np.ndarray): ``(H, W, C)`` uint8, or float32 in 0..255; RGB when ``C = 3``.
            rng (np.random.Generator): Source of every draw.

        Returns:
            dict: ``global_crops`` (2 arrays ``(C, S, S)``), ``local_crops`` (``num_local`` arrays
            ``(C, s, s)``) and, with ``gram_size``, ``gram_crops`` (2 arrays ``(C, Sg, Sg)``);
            of the image's type, or float32 as told under ``gram_no_distortions``. With
            ``color_on='device'`` also ``colors``: the :class:`Distortion` of each global and local
            crop, and the settings that all share.

        Raises:
            TypeError: If the image is no such array.
        """
        if image.ndim != 3 or image.dtype not in (np.uint8, np.float32):
            raise TypeError(
                "MultiCrop needs an array of shape (height, width, channels), uint8 or float32 in "
                f"0..255, got {image.dtype} of shape {image.shape}"
            )
        return self.apply(image, self.draw(*image.shape[:2], rng, image.shape[2]))

    def _distort(self, image: np.ndarray, distortion: Distortion) -> np.ndarray:
        return pixel_ops.distort(image, distortion, self.blur_kernel, self.solarize_threshold)

    def _base_crop(self, image: np.ndarray, crop: CropParams) -> np.ndarray:
        base = pixel_ops.crop_resize(image, crop.box, self.base_size)
        return pixel_ops.flip(base) if crop.flip else base

    def _global_and_gram(
        self, base: np.ndarray, distortion: Distortion
    ) -> tuple[np.ndarray, np.ndarray | None]:
        whole = Box(0, 0, self.base_size, self.base_size)
        if self.gram_size is None:
            return self._distort(base, distortion), None
        if self.gram_no_distortions:
            small = pixel_ops.crop_resize(base, whole, self.global_size)
            gram = pixel_ops.crop_resize(base, whole, self.gram_size)
            return self._distort(small, distortion), gram
        distorted = self._distort(base, distortion)
        return tuple(
            distorted if size == self.base_size else pixel_ops.resize_float(distorted, size)
            for size in (self.global_size, self.gram_size)
        )

    def _local_crop(
        self, image: np.ndarray, bases: list[np.ndarray], crop: CropParams
    ) -> np.ndarray:
        if crop.base is not None:
            # The reference distorts the whole global crop, then cuts the window from it.
            distorted = self._distort(bases[crop.base], crop.distortion)
            return pixel_ops.crop_resize(distorted, crop.box, self.local_size)
        local = pixel_ops.crop_resize(image, crop.box, self.local_size)
        if crop.flip:
            local = pixel_ops.flip(local)
        return self._distort(local, crop.distortion)


def _positive(name: str, value: int) -> int:
    if not isinstance(value, int) or value < 1:
        raise ValueError(f"{name} must be a positive integer, got {value!r}")
    return value


def _probability(name: str, value: float) -> float:
    if not 0 <= value <= 1:
        raise ValueError(f"{name} must be in [0, 1], got {value}")
    return value


def _interval(name: str, value: tuple[float, float], upper: float) -> tuple[float, float]:
    low, high = value
    if not 0 < low <= high <= upper:
        raise ValueError(f"{name} must be (low, high) with 0 < low <= high <= {upper}, got {value}")
    return low, high


def _blur_probs(value: tuple[float, float, float] | str) -> tuple[float, ...]:
    if value == "paper":
        return PAPER_BLUR
    if isinstance(value, str) or len(value) != 3:
        raise ValueError(f"blur_probs must be three probabilities or 'paper', got {value!r}")
    return tuple(_probability("blur_probs", item) for item in value)


# Seed of the sequence of choices that the released models were adapted with.
_CHOICE_SEED = 65537
_SIZES = ("global_size", "local_size", "gram_size")


@TRANSFORMS.register_module()
class MultiResolutionCrop:
    """Draws the crop sizes of a whole iteration from several sets, by ratio (paper section 5.1).

    The choice depends on the iteration alone: all ranks make the same one, and a resumed run goes
    on with the sequence.

    Args:
        size_sets (list[dict]): Per set ``global_size``, ``local_size``, optionally ``gram_size``
            (in all sets or in none), and ``ratio``, its share of the iterations; ratios sum to 1.
        **shared: The other arguments of :class:`MultiCrop`.

    Raises:
        ValueError: If there is no set, the ratios do not sum to 1, or Gram crops are in some sets
            only.
    """

    def __init__(self, size_sets: Sequence[dict], **shared: Any) -> None:
        if not size_sets:
            raise ValueError("MultiResolutionCrop needs at least one set of sizes")
        for given in size_sets:
            unknown = sorted(set(given) - {*_SIZES, "ratio"})
            if unknown or not {"global_size", "local_size", "ratio"} <= set(given):
                raise ValueError(
                    f"a set of sizes has global_size, local_size, ratio and perhaps gram_size; got "
                    f"{dict(given)}"
                )
        self.ratios = [float(given["ratio"]) for given in size_sets]
        if min(self.ratios) <= 0 or abs(sum(self.ratios) - 1) > 1e-6:
            raise ValueError(f"the ratios must be positive and sum to 1, got {self.ratios}")
        with_gram = {given.get("gram_size") is not None for given in size_sets}
        if len(with_gram) > 1:
            raise ValueError("gram_size must be given in every set of sizes, or in none")
        self.variants = [
            MultiCrop(**{key: given[key] for key in _SIZES if key in given}, **shared)
            for given in size_sets
        ]
        self._choices = np.empty(0, np.int64)

    def at(self, iteration: int) -> MultiCrop:
        """The transform of an iteration (optimizer step, counted from 0)."""
        if iteration >= len(self._choices):
            # The beginning of a longer sequence is the shorter one.
            length = max(1024, 2 * (iteration + 1))
            rng = np.random.default_rng(_CHOICE_SEED)
            self._choices = rng.choice(len(self.ratios), size=length, p=self.ratios)
        return self.variants[self._choices[iteration]]
