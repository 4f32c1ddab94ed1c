"""Speed of the multi-crop pipeline against torchvision v2, fed the same JPEGs and drawn parameters.

    python benchmarks/data_pipeline.py [--pairs 15] [--images 8] [--json out.json]

Prints, on one core, images/s with and without JPEG decoding for this project and for torchvision's
PIL and uint8 tensor paths; the median ratio to the faster of the two over alternated runs; the mean
absolute difference of the crops, overall and for each operation alone; and where our time goes.
Our time includes the drawing of the parameters, torchvision's does not.
"""

import argparse
import io
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import cv2
import numpy as np
import torch
import torchvision
from PIL import Image
from torchvision.io import decode_jpeg
from torchvision.transforms.v2 import InterpolationMode
from torchvision.transforms.v2 import functional as tv

from dinov3_mm.datasets import MultiCrop, sample_generator
from dinov3_mm.datasets.images import decode_image
from dinov3_mm.datasets.transforms import pixel_ops
from dinov3_mm.datasets.transforms.pixel_ops import Box, CropParams, MultiCropParams

HEIGHT, WIDTH = 375, 500
PHOTOS = ("astronaut", "chelsea", "coffee", "motorcycle_left", "rocket", "ihc", "retina")
MAX_DIFFERENCE = 2.0
MIN_RATIO = 1.5


def make_images(count: int) -> list[np.ndarray]:
    """Photographs of scikit-image (when installed) and smooth noise, ``(375, 500, 3)`` uint8."""
    photos = _photos()
    rng = np.random.default_rng(0)
    images = []
    for index in range(count):
        if photos and index % 4 != 3:
            images.append(_window(photos[index % len(photos)], rng))
        else:
            images.append(_smooth_noise(rng))
    return images


def _photos() -> list[np.ndarray]:
    try:
        import skimage
    except ImportError:
        return []
    folder = Path(skimage.__file__).parent / "data"
    files = [path for name in PHOTOS for path in sorted(folder.glob(f"{name}.*"))]
    return [np.asarray(Image.open(path).convert("RGB")) for path in files]


def _window(photo: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Random window of a photograph with the aspect ratio of the output."""
    side = min(photo.shape[0] / HEIGHT, photo.shape[1] / WIDTH) * rng.uniform(0.8, 1.0)
    height, width = int(side * HEIGHT), int(side * WIDTH)
    top = rng.integers(photo.shape[0] - height + 1)
    left = rng.integers(photo.shape[1] - width + 1)
    window = Image.fromarray(photo[top : top + height, left : left + width])
    return np.asarray(window.resize((WIDTH, HEIGHT), Image.Resampling.LANCZOS))


def _smooth_noise(rng: np.random.Generator) -> np.ndarray:
    """Noise with the 1/f amplitude spectrum of natural images."""
    frequencies = np.hypot(*np.meshgrid(np.fft.fftfreq(WIDTH), np.fft.fftfreq(HEIGHT)))
    spectrum = np.fft.fft2(rng.normal(size=(3, HEIGHT, WIDTH))) / np.maximum(frequencies, 1 / WIDTH)
    noise = np.fft.ifft2(spectrum).real
    noise = 128 + 55 * noise / noise.std(axis=(1, 2), keepdims=True)
    return noise.clip(0, 255).astype(np.uint8).transpose(1, 2, 0).copy()


def to_jpeg(image: np.ndarray) -> bytes:
    """JPEG of the usual quality of photo collections."""
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, "JPEG", quality=90)
    return buffer.getvalue()


def torchvision_crops(
    image: Image.Image | torch.Tensor, params: MultiCropParams, transform: MultiCrop
) -> list[torch.Tensor]:
    """The crops of ``params`` by torchvision, on a PIL image or a ``(3, H, W)`` uint8 tensor."""
    sizes = [transform.global_size] * 2 + [transform.local_size] * transform.num_local
    crops = [*params.global_crops, *params.local_crops]
    return [torchvision_crop(image, crop, size) for crop, size in zip(crops, sizes)]


def torchvision_crop(
    image: Image.Image | torch.Tensor, crop: CropParams, size: int
) -> torch.Tensor:
    """One crop by torchvision's functional transforms."""
    box = (crop.box.top, crop.box.left, crop.box.height, crop.box.width)
    image = tv.resized_crop(image, *box, [size, size], InterpolationMode.BICUBIC, antialias=True)
    if crop.flip:
        image = tv.horizontal_flip(image)
    for name, factor in crop.distortion.jitter:
        image = TORCHVISION_JITTER[name](image, factor)
    if crop.distortion.grayscale:
        image = tv.rgb_to_grayscale(image, 3)
    if crop.distortion.blur_sigma is not None:
        image = tv.gaussian_blur(image, [9, 9], [crop.distortion.blur_sigma] * 2)
    if crop.distortion.solarize:
        image = tv.solarize(image, 128)
    return image if isinstance(image, torch.Tensor) else tv.pil_to_tensor(image)


TORCHVISION_JITTER = {
    "brightness": tv.adjust_brightness,
    "contrast": tv.adjust_contrast,
    "saturation": tv.adjust_saturation,
    "hue": tv.adjust_hue,
}


class Cell:
    """The three pipelines over the same images, with or without decoding."""

    def __init__(self, jpegs: list[bytes], transform: MultiCrop, decode: bool) -> None:
        self.transform = transform
        arrays = [decode_image(data, "benchmark") for data in jpegs]
        self.params = [
            transform.draw(HEIGHT, WIDTH, sample_generator(0, "augment", index))
            for index in range(len(jpegs))
        ]
        if decode:
            self.ours, self.pil, self.tensor = jpegs, jpegs, [as_bytes(data) for data in jpegs]
            self.read_ours = lambda data: decode_image(data, "benchmark")
            self.read_pil = lambda data: Image.open(io.BytesIO(data)).convert("RGB")
            self.read_tensor = decode_jpeg
        else:
            self.ours, self.pil = arrays, [Image.fromarray(array) for array in arrays]
            self.tensor = [tv.pil_to_tensor(image) for image in self.pil]
            self.read_ours = self.read_pil = self.read_tensor = lambda image: image

    def run_ours(self) -> list[list[torch.Tensor]]:
        """Crops by this project, drawing included."""
        batches = []
        for index, item in enumerate(self.ours):
            rng = sample_generator(0, "augment", index)
            sample = self.transform(self.read_ours(item), rng)
            crops = sample["global_crops"] + sample["local_crops"]
            batches.append([torch.from_numpy(crop) for crop in crops])
        return batches

    def run_pil(self) -> list[list[torch.Tensor]]:
        """Crops by torchvision on PIL images."""
        return [
            torchvision_crops(self.read_pil(item), params, self.transform)
            for item, params in zip(self.pil, self.params)
        ]

    def run_tensor(self) -> list[list[torch.Tensor]]:
        """Crops by torchvision on uint8 tensors."""
        return [
            torchvision_crops(self.read_tensor(item), params, self.transform)
            for item, params in zip(self.tensor, self.params)
        ]


def as_bytes(data: bytes) -> torch.Tensor:
    """Bytes as the uint8 tensor that torchvision's decoder takes."""
    return torch.frombuffer(bytearray(data), dtype=torch.uint8)


def measure(cell: Cell, pairs: int) -> dict[str, float]:
    """Alternate the pipelines and return images/s and the median ratio to the faster peer."""
    runs = {"ours": cell.run_ours, "pil": cell.run_pil, "tensor": cell.run_tensor}
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for run in runs.values():
        run()
    for pair in range(pairs):
        for name in list(runs) if pair % 2 else list(reversed(runs)):
            start = time.perf_counter()
            runs[name]()
            seconds[name].append(time.perf_counter() - start)
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    peer = min(("pil", "tensor"), key=medians.get)
    ratios = [theirs / ours for theirs, ours in zip(seconds[peer], seconds["ours"])]
    count = len(cell.ours)
    return {
        **{f"{name}_images_per_s": count / median for name, median in medians.items()},
        "peer": peer,
        "ratio": statistics.median(ratios),
        "ratio_min": min(ratios),
        "ratio_max": max(ratios),
    }


def difference(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    """Mean absolute difference in grey levels."""
    return (ours.float() - theirs.float()).abs().mean().item()


def crop_differences(cell: Cell) -> dict[str, float]:
    """Differences of whole crops to torchvision's PIL path, ours and those of its tensor path."""
    ours, pil, tensor = cell.run_ours(), cell.run_pil(), cell.run_tensor()
    images = [np.mean([difference(a, b) for a, b in zip(*pair)]) for pair in zip(ours, pil)]
    peers = [np.mean([difference(a, b) for a, b in zip(*pair)]) for pair in zip(tensor, pil)]
    return {
        "ours_mean": float(np.mean(images)),
        "ours_worst_image": float(np.max(images)),
        "torchvision_tensor_mean": float(np.mean(peers)),
    }


def operation_differences(images: list[np.ndarray]) -> dict[str, float]:
    """Mean absolute difference of each operation alone to torchvision's PIL path."""
    rng = np.random.default_rng(1)
    totals: dict[str, list[float]] = {}

    def compare(name: str, ours: np.ndarray, theirs: Image.Image) -> None:
        expected = tv.pil_to_tensor(theirs)
        totals.setdefault(name, []).append(
            difference(torch.from_numpy(pixel_ops.to_chw(ours)), expected)
        )

    for image in images:
        pil = Image.fromarray(image)
        for size in (224, 96):
            box = Box(40, 60, int(rng.integers(90, 330)), int(rng.integers(90, 430)))
            area = (box.top, box.left, box.height, box.width)
            theirs = tv.resized_crop(pil, *area, [size, size], InterpolationMode.BICUBIC)
            compare(f"crop_resize_{size}", pixel_ops.crop_resize(image, box, size), theirs)
        for name in ("brightness", "contrast", "saturation"):
            factor = rng.uniform(0.6, 1.4)
            ours = getattr(pixel_ops, f"adjust_{name}")(image, factor)
            compare(name, ours, TORCHVISION_JITTER[name](pil, factor))
        shift = rng.uniform(-0.1, 0.1)
        compare("hue", pixel_ops.adjust_hue(image, shift), tv.adjust_hue(pil, shift))
        compare("grayscale", pixel_ops.grayscale(image), tv.rgb_to_grayscale(pil, 3))
        sigma = rng.uniform(0.1, 2.0)
        blurred = tv.gaussian_blur(pil, [9, 9], [sigma, sigma])
        compare("blur", pixel_ops.gaussian_blur(image, sigma, 9), blurred)
        compare("solarize", pixel_ops.solarize(image, 128), tv.solarize(pil, 128))
        compare("flip", pixel_ops.flip(image), tv.horizontal_flip(pil))
    return {name: float(np.mean(values)) for name, values in totals.items()}


TIMED = (
    "crop_resize",
    "flip",
    "adjust_brightness",
    "adjust_contrast",
    "adjust_saturation",
    "adjust_hue",
    "grayscale",
    "gaussian_blur",
    "solarize",
    "to_chw",
)


def operation_shares(cell: Cell, repeats: int = 5) -> dict[str, float]:
    """Milliseconds per image that each of our operations takes; ``rest`` is drawing and Python."""
    spent = dict.fromkeys(TIMED, 0.0)
    originals = {name: getattr(pixel_ops, name) for name in TIMED}

    def timed(name: str) -> Callable:
        def call(*args):
            start = time.perf_counter()
            result = originals[name](*args)
            spent[name] += time.perf_counter() - start
            return result

        return call

    for name in TIMED:
        setattr(pixel_ops, name, timed(name))
    start = time.perf_counter()
    for _ in range(repeats):
        cell.run_ours()
    total = time.perf_counter() - start
    for name, function in originals.items():
        setattr(pixel_ops, name, function)
    count = repeats * len(cell.ours)
    shares = {name: 1000 * seconds / count for name, seconds in spent.items()}
    return {**shares, "rest": 1000 * total / count - sum(shares.values())}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--pairs", type=int, default=15)
    parser.add_argument("--images", type=int, default=8)
    parser.add_argument("--json", help="also write the figures to this file")
    args = parser.parse_args()
    torch.set_num_threads(1)
    cv2.setNumThreads(0)

    transform = MultiCrop(global_size=224, local_size=96, num_local=8)
    jpegs = [to_jpeg(image) for image in make_images(args.images)]
    without, full = (Cell(jpegs, transform, decode) for decode in (False, True))
    report = {
        "versions": {
            "torch": torch.__version__,
            "torchvision": torchvision.__version__,
            "opencv": cv2.__version__,
        },
        "decode_excluded": measure(without, args.pairs),
        "decode_included": measure(full, args.pairs),
        "crop_difference": crop_differences(full),
        "operation_difference": operation_differences([decode_image(data, "") for data in jpegs]),
        "operation_ms_per_image": operation_shares(without),
    }
    print_report(report, args.pairs)
    if args.json:
        Path(args.json).write_text(json.dumps(report, indent=2) + "\n")
    ratio = min(report[name]["ratio"] for name in ("decode_excluded", "decode_included"))
    if ratio < MIN_RATIO or report["crop_difference"]["ours_mean"] > MAX_DIFFERENCE:
        raise SystemExit("a bound is not met")


def print_report(report: dict, pairs: int) -> None:
    """The figures as text, with the bounds they are held to."""
    print(f"2 x 224 + 8 x 96 crops of {WIDTH}x{HEIGHT} JPEGs, one thread, {pairs} alternated pairs")
    for name in ("decode_excluded", "decode_included"):
        cell = report[name]
        print(
            f"{name}: ours {cell['ours_images_per_s']:.1f} images/s/core, torchvision PIL "
            f"{cell['pil_images_per_s']:.1f}, tensor {cell['tensor_images_per_s']:.1f}; median "
            f"ratio to {cell['peer']} {cell['ratio']:.2f} "
            f"[{cell['ratio_min']:.2f}, {cell['ratio_max']:.2f}] (at least {MIN_RATIO})"
        )
    crops = report["crop_difference"]
    print(
        f"mean |crop difference| to torchvision PIL: {crops['ours_mean']:.3f}/255, worst image "
        f"{crops['ours_worst_image']:.3f}/255 (at most {MAX_DIFFERENCE}); torchvision tensor: "
        f"{crops['torchvision_tensor_mean']:.3f}/255"
    )
    for name, value in report["operation_difference"].items():
        print(f"  {name:18s} {value:6.3f}/255")
    shares = report["operation_ms_per_image"]
    total = sum(shares.values())
    print(f"our time per image without decoding: {total:.2f} ms")
    for name, value in sorted(shares.items(), key=lambda item: -item[1]):
        print(f"  {name:18s} {value:6.3f} ms {100 * value / total:5.1f} %")


if __name__ == "__main__":
    main()
