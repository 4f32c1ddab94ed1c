"""Features of image files end to end against transformers' pipeline and a timm loop.

    python benchmarks/extraction.py [--images 200] [--pairs 15] [--threads N] [--workers N]
        [--batch-size 32] [--size 224] [--device cpu] [--dtype fp32] [--peers transformers timm]
        [--out results.json]

From the paths of JPEGs (500 x 375, in a temporary folder) to all normed tokens in memory: decode,
resize, normalise, ViT-S/16. All three have the same weights, threads, worker processes and
batch size. transformers runs ``pipeline('image-feature-extraction')`` with its own processor, timm
its own transform in a DataLoader; both with torch's fused attention, in inference mode. Printed are
the median times of a run, images/s, the median over the rounds of (time of the better peer) / (our
time), and the lowest cosine of our CLS tokens to theirs (they resize a little differently).
"""

import argparse
import json
import os
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path

import cv2
import torch
from backbone_forward import build_ours, build_timm, build_transformers
from data_pipeline import make_images, to_jpeg
from forward_cells import hardware, measure
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset

from dinov3_mm.apis import FeatureExtractor
from dinov3_mm.models.backbones.zoo import IMAGENET_MEAN, IMAGENET_STD

ARCH = "small"
TARGET = 1.3
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
Extract = Callable[[], Tensor]  # all normed tokens (images, 1 + R + N, D)


def write_jpegs(folder: Path, count: int) -> list[str]:
    """Write photographs and smooth noise as files."""
    paths = []
    for index, image in enumerate(make_images(count)):
        path = folder / f"{index:05d}.jpg"
        path.write_bytes(to_jpeg(image))
        paths.append(str(path))
    return paths


def ours(model: nn.Module, paths: list[str], args: argparse.Namespace) -> Extract:
    """Our extractor."""
    extractor = FeatureExtractor(
        model,
        image_size=args.size,
        mean=IMAGENET_MEAN,
        std=IMAGENET_STD,
        batch_size=args.batch_size,
        device=args.device,
        dtype=args.dtype,
    )

    def extract() -> Tensor:
        features = extractor(paths, num_workers=args.workers)
        return torch.cat((features.cls[:, None], features.registers, features.patches), dim=1)

    return extract


def transformers_pipeline(
    ours: nn.Module, paths: list[str], args: argparse.Namespace, folder: Path
) -> Extract:
    """The pipeline on a model and a processor saved to disk, as users load them."""
    from transformers import AutoImageProcessor, DINOv3ViTImageProcessor, pipeline

    folder = folder / "transformers"
    build_transformers(ours).save_pretrained(folder)
    size = {"height": args.size, "width": args.size}
    DINOv3ViTImageProcessor(size=size).save_pretrained(folder)
    pipe = pipeline(
        "image-feature-extraction",
        model=str(folder),
        image_processor=AutoImageProcessor.from_pretrained(folder),
        device=args.device,
        dtype=DTYPES[args.dtype],
    )
    options = {"batch_size": args.batch_size, "num_workers": args.workers}

    @torch.inference_mode()
    def extract() -> Tensor:
        return torch.cat(pipe(paths, return_tensors=True, **options)).float()

    return extract


class JpegFiles(Dataset):
    """Transformed images of timm's loop."""

    def __init__(self, paths: list[str], transform: Callable[[Image.Image], Tensor]) -> None:
        self.paths, self.transform = paths, transform

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> Tensor:
        return self.transform(Image.open(self.paths[index]).convert("RGB"))


def timm_loop(ours: nn.Module, paths: list[str], args: argparse.Namespace, _: Path) -> Extract:
    """timm's transform at the same size in a DataLoader."""
    import timm

    model = build_timm(ours, ARCH).to(args.device, DTYPES[args.dtype])
    config = timm.data.resolve_data_config({"input_size": (3, args.size, args.size)}, model=model)
    dataset = JpegFiles(paths, timm.data.create_transform(**config))

    @torch.inference_mode()
    def extract() -> Tensor:
        loader = DataLoader(dataset, batch_size=args.batch_size, num_workers=args.workers)
        batches = (images.to(args.device, DTYPES[args.dtype]) for images in loader)
        return torch.cat([model.forward_features(images).float().cpu() for images in batches])

    return extract


PEERS = {"transformers": transformers_pipeline, "timm": timm_loop}


def agreement(extracts: dict[str, Extract]) -> dict[str, float]:
    """Lowest cosine of our CLS tokens to those of the peers."""
    cls = {name: extract()[:, 0].cpu() for name, extract in extracts.items()}
    return {
        name: F.cosine_similarity(cls["ours"], tokens).min().item()
        for name, tokens in cls.items()
        if name != "ours"
    }


def _call(extract: Extract, _: Tensor) -> Tensor:
    return extract()


def parse_args() -> argparse.Namespace:
    """The command line."""
    cores = len(os.sched_getaffinity(0))
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=int, default=200)
    parser.add_argument("--pairs", type=int, default=15)
    parser.add_argument("--threads", type=int, default=cores)
    parser.add_argument("--workers", type=int, default=cores)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--size", type=int, default=224)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="fp32", choices=DTYPES)
    parser.add_argument("--peers", nargs="*", default=list(PEERS), choices=PEERS)
    parser.add_argument("--out", type=Path, help="write the figures as JSON")
    return parser.parse_args()


def main() -> None:
    """Run the benchmark."""
    args = parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    setting = {**hardware(args.device), "opencv": cv2.__version__, "workers": args.workers}
    print(setting)
    model = build_ours(ARCH)
    with tempfile.TemporaryDirectory() as folder:
        paths = write_jpegs(Path(folder), args.images)
        extracts = {name: PEERS[name](model, paths, args, Path(folder)) for name in args.peers}
        extracts["ours"] = ours(model, paths, args)
        cosines = agreement(extracts)
        # What is timed takes the paths that it was built with, and no images.
        calls = {name: partial(_call, extract) for name, extract in extracts.items()}
        result = measure(calls, torch.empty(0, device=args.device), args.pairs)
    del result["difference"]  # of resizing, not of the models: the cosine says more
    report = {"setting": setting, "pairs": args.pairs, "images": args.images, "size": args.size}
    report |= {"batch_size": args.batch_size, **result, "lowest_cosine": cosines}
    report["images_per_s"] = {
        name: 1e3 * args.images / value for name, value in result["milliseconds"].items()
    }
    print_report(report)
    if args.out:
        args.out.write_text(json.dumps(report, indent=2) + "\n")


def print_report(report: dict) -> None:
    """The figures as text."""
    for name, rate in report["images_per_s"].items():
        cosine = report["lowest_cosine"].get(name)
        agrees = f", lowest cosine of CLS to ours {cosine:.4f}" if cosine else ""
        print(f"{name:12} {rate:7.2f} images/s{agrees}")
    if "ratio" in report:
        print(f"ratio to {report['better_peer']} {report['ratio']:.3f} (target {TARGET})")


if __name__ == "__main__":
    main()
