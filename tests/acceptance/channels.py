"""Pretraining on images that are not 8-bit RGB, from files to features of the exported backbone.

    python -m tests.acceptance.channels [--iters 50]

For 1, 4 and 8 channels of 8 and 16 bits, and 4 of float32, it writes a folder of TIFF files
(interleaved, planar and one band a page), computes their statistics, trains the toy recipe
``configs/quickstart/multiband_pretrain.py`` through ``tools/train.py``, and extracts features with
the exported file alone. Fails unless all losses are finite and fall, and the export states its
channels and statistics.
"""

import argparse
import math
import tempfile
import time
from pathlib import Path

import numpy as np
import tifffile
import torch

import tools.train
from dinov3_mm.checkpoints import build_backbone, read_metadata, read_statistics
from dinov3_mm.datasets import ImageFolder, SyntheticScenes, channel_statistics
from dinov3_mm.evaluation import ImageSet, extract_features
from tests.integration.traces import read_trace

CONFIG = Path(__file__).parents[2] / "configs/quickstart/multiband_pretrain.py"
# Channels, pixel type, and the layout of the file.
CASES = (
    (1, "uint8", "gray"),
    (4, "uint8", "interleaved"),
    (8, "uint8", "planar"),
    (1, "uint16", "gray"),
    (4, "uint16", "interleaved"),
    (8, "uint16", "pages"),
    (4, "float32", "pages"),
)
NUM_IMAGES = 64


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--iters", type=int, default=50)
    iters = parser.parse_args().iters
    print("channels  type     layout       iterations  first loss  last loss  seconds  features")
    with tempfile.TemporaryDirectory() as name:
        for channels, dtype, layout in CASES:
            began = time.perf_counter()
            case = Path(name) / f"{channels}_{dtype}"
            images = write_images(case / "images", channels, dtype, layout)
            losses = train(images, case / "run", iters)
            features = check_export(images, case / "run", channels)
            seconds = time.perf_counter() - began
            print(
                f"{channels:8d}  {dtype:<7}  {layout:<11}  {len(losses):10d}  {losses[0]:10.4f}  "
                f"{losses[-1]:9.4f}  {seconds:7.1f}  {tuple(features.shape)}"
            )
            fifth = max(1, iters // 5)
            if not np.mean(losses[-fifth:]) < np.mean(losses[:fifth]):
                raise SystemExit("the loss does not fall")


def write_images(
    folder: Path, channels: int, dtype: str, layout: str, count: int = NUM_IMAGES
) -> Path:
    """Write rendered scenes: colours first, then inverse depth and mixtures of both."""
    folder.mkdir(parents=True)
    scenes = SyntheticScenes(count, image_size=64)
    mixing = np.concatenate([np.eye(4), np.random.default_rng(0).dirichlet(np.ones(4), 4)])
    mixing = mixing[-1:] if channels == 1 else mixing[:channels]
    for index in range(count):
        rendering = scenes.render(index)
        nearness = rendering.depth.min() / rendering.depth
        bands = np.dstack([rendering.image / 255, nearness]) @ mixing.T
        write_tiff(folder / f"{index:04d}.tif", store(bands, dtype), layout)
    return folder


def store(bands: np.ndarray, dtype: str) -> np.ndarray:
    """Values in 0..1 as pixels of a type."""
    top = 1 if dtype == "float32" else np.iinfo(dtype).max
    return (bands.clip(0, 1) * top).astype(dtype)


def write_tiff(path: Path, pixels: np.ndarray, layout: str) -> None:
    """Write ``(H, W, C)`` pixels in a layout."""
    options = {"photometric": "minisblack"}
    if layout == "gray":
        pixels = pixels[..., 0]
    elif layout == "interleaved":
        options["planarconfig"] = "contig"
    else:
        pixels = pixels.transpose(2, 0, 1)
        if layout == "planar":
            options["planarconfig"] = "separate"
    tifffile.imwrite(path, pixels, **options)


def train(images: Path, work_dir: Path, iters: int, batch_size: int = 16) -> list[float]:
    """Train through ``tools/train.py`` and return the loss of every iteration."""
    statistics = channel_statistics(ImageFolder(str(images), color="unchanged"))
    source, hook = "train_dataloader.source.root", "custom_hooks.5.source.source.root"
    options = {
        source: images,
        hook: images,
        "custom_hooks.5.interval": iters,
        "model.backbone.in_channels": len(statistics.mean),
        "model.data_preprocessor.mean": list(statistics.mean),
        "model.data_preprocessor.std": list(statistics.std),
        "train_cfg.max_iters": iters,
        "train_cfg.global_batch_size": batch_size,
        "custom_hooks.0.lr.warmup_iters": max(1, iters // 5),
        "custom_hooks.1.teacher_temp.total_iters": max(1, iters // 2),
        "default_hooks.logger.interval": 1,
        "default_hooks.logger.bar": False,
        "default_hooks.checkpoint.interval": iters,
        "experiment_name": f"{images.parent.name}_{iters}",
    }
    words = [f"{key}={value}" for key, value in options.items()]
    tools.train.main([str(CONFIG), "--work-dir", str(work_dir), "--cfg-options", *words])
    trace = read_trace(work_dir)
    losses = [trace[step]["loss"] for step in sorted(trace) if "loss" in trace[step]]
    if len(losses) != iters or not all(math.isfinite(loss) for loss in losses):
        raise SystemExit(f"expected {iters} finite losses, got {losses}")
    return losses


def check_export(images: Path, work_dir: Path, channels: int) -> torch.Tensor:
    """Features of the images by the exported file, which must say how to normalise them."""
    path = work_dir / "exports/teacher_latest.safetensors"
    if read_metadata(path)["arch"]["in_channels"] != channels:
        raise SystemExit(f"the export states other channels than {channels}")
    stated = read_statistics(path)
    expected = channel_statistics(ImageFolder(str(images), color="unchanged"))
    np.testing.assert_allclose(stated[:2], expected[:2])
    inputs = ImageSet(ImageFolder(str(images), color="unchanged"), 48)
    features = extract_features(build_backbone(path), inputs, mean=stated.mean, std=stated.std).cls
    if not features.isfinite().all() or features.std(dim=0).max() < 1e-3:
        raise SystemExit("the features are not finite or do not vary")
    return features


if __name__ == "__main__":
    main()
