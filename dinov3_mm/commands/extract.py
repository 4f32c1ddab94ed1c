"""Extract features: ``dinov3-mm extract IMAGES --weights FILE --out OUT``.

IMAGES is a folder, a list (.txt, .csv) or image files; OUT a folder of shards, or one file that
ends in .safetensors, .npy or .parquet. The same command goes on after an interruption.

One process by default; several are started by torchrun with ``--launcher pytorch``, or by srun with
``--launcher slurm``.
"""

import argparse
import time
from collections.abc import Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch.distributed as dist
from mmengine.dist import get_dist_info
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn

from dinov3_mm.apis import FeatureExtractor, extract_to_files
from dinov3_mm.command_line import ToolParser
from dinov3_mm.datasets.sources import FileSource, ImageFolder, ImageList
from dinov3_mm.engine import LAUNCHERS, start_processes
from dinov3_mm.engine.hooks.progress import memory_text
from dinov3_mm.features.preparation import (
    INTERPOLATIONS,
    NATIVE,
    NATIVE_MODES,
    RESIZE_MODES,
    ImageFiles,
)
from dinov3_mm.features.tokens import FIELDS, FOUR_EVEN
from dinov3_mm.models.precision import AUTO, dtype_option

LIST_SUFFIXES = (".txt", ".csv", ".lst")
SECONDS_BETWEEN_LINES = 30.0
SHOWN_FAILURES = 20
ON_INTERRUPT = "interrupted; the same command goes on"
console = Console()


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = ToolParser(description=__doc__.splitlines()[0])
    parser.add_argument("images", nargs="+", help="folder, list (.txt, .csv) or image files")
    parser.add_argument(
        "--weights", required=True, metavar="FILE|NAME", help="weight file, folder, URL or name"
    )
    parser.add_argument("--out", required=True, help="folder, or *.safetensors, *.npy, *.parquet")
    parser.add_argument(
        "--random-init", action="store_true", help="with a name: random weights, a baseline"
    )
    parser.add_argument(
        "--what",
        nargs="+",
        default=["cls"],
        choices=(*FIELDS, "layers"),
        help="what to store; 'layers' stores it for four evenly spaced blocks too; default: cls",
    )
    parser.add_argument(
        "--layers", nargs="+", type=int, metavar="BLOCK", help="store it for these blocks too"
    )
    parser.add_argument("--no-norm", action="store_true", help="leave the final norm out")
    inputs = parser.add_argument_group("inputs")
    inputs.add_argument(
        "--image-size", type=image_size, metavar="SIZE|HxW|native", help="default: 256"
    )
    inputs.add_argument("--resize", choices=(*RESIZE_MODES, *NATIVE_MODES))
    inputs.add_argument("--interpolation", choices=INTERPOLATIONS, default="bilinear")
    inputs.add_argument("--mean", nargs="+", type=float, help="default: of the weights")
    inputs.add_argument("--std", nargs="+", type=float, help="default: of the weights")
    inputs.add_argument("--tile", type=int, help="cut larger images into tiles of this side")
    inputs.add_argument("--overlap", type=int, help="pixels that tiles share; default: tile / 8")
    inputs.add_argument("--color", help="rgb, gray, or unchanged for other channels and 16 bits")
    inputs.add_argument("--channels", nargs="+", type=int, help="with unchanged: those to keep")
    inputs.add_argument(
        "--value-range", nargs=2, type=float, help="with unchanged: stored values of 0 and 1"
    )
    inputs.add_argument(
        "--decode-min-side",
        type=int,
        help="decode large JPEGs at a fraction of their size that keeps this side; faster, and "
        "changes the pixels slightly",
    )
    running = parser.add_argument_group("running")
    running.add_argument("--batch-size", type=int, default=32)
    running.add_argument("--max-tokens-per-batch", type=int, default=32768)
    running.add_argument(
        "--dtype",
        default=AUTO,
        type=dtype_option,
        help="of computing: fp32, bf16, or auto: bf16 on a GPU; default",
    )
    running.add_argument("--store-dtype", default="fp32", choices=("fp32", "fp16"))
    running.add_argument("--shard-size", type=int, help="images per shard; default: about 256 MiB")
    running.add_argument(
        "--hash-files",
        action="store_true",
        help="notice changed images by their bytes, not by size and time alone",
    )
    running.add_argument("--num-workers", type=int, help="decoding processes per rank")
    running.add_argument("--device", help="default: CUDA if it is there")
    running.add_argument("--launcher", choices=LAUNCHERS, default="none")
    return parser.parse_args(argv)


def image_size(text: str) -> int | tuple[int, int] | str:
    """``224``, ``480x640`` or ``native``."""
    if text == NATIVE:
        return NATIVE
    try:
        sides = tuple(int(side) for side in text.lower().split("x"))
    except ValueError:
        sides = ()
    if not 1 <= len(sides) <= 2:
        raise argparse.ArgumentTypeError(f"expected 224, 480x640 or native, got {text!r}")
    return sides[0] if len(sides) == 1 else sides


def source_options(args: argparse.Namespace) -> dict[str, Any]:
    """Arguments of the image source that were given."""
    names = ("color", "channels", "value_range", "decode_min_side")
    return {name: getattr(args, name) for name in names if getattr(args, name) is not None}


def build_source(images: Sequence[str], options: dict[str, Any]) -> FileSource:
    """The source behind the positional arguments.

    Raises:
        FileNotFoundError: If something does not exist.
        ValueError: If a folder or a list holds no image, or is not given alone.
    """
    paths = [Path(image).expanduser() for image in images]
    missing = [str(path) for path in paths if not path.exists()]
    if missing:
        raise FileNotFoundError(
            f"{missing[0]} does not exist; expected a folder of images, a list "
            f"({', '.join(LIST_SUFFIXES)}) or image files"
        )
    sources = [path for path in paths if path.is_dir() or path.suffix.lower() in LIST_SUFFIXES]
    if not sources:
        return ImageFiles([str(path) for path in paths], **options)
    if len(paths) > 1:
        raise ValueError(f"{sources[0]} is a folder or a list; give it alone")
    kind = ImageFolder if paths[0].is_dir() else ImageList
    return kind(str(paths[0]), **options)


class ProgressReport:
    """Images/s, time left and memory of the main process: a bar on a terminal, else lines."""

    def __init__(self) -> None:
        self._total = self._done = self._left_out = 0
        self._bar: Progress | None = None

    def start(self, total: int, there: int) -> None:
        """Begin with ``total`` images of this rank; ``there`` were extracted by an earlier run."""
        self._total, self._began, self._shown = total, time.perf_counter(), time.perf_counter()
        if there:
            console.print(f"{there} images are there from an earlier run")
        if console.is_terminal and total:
            columns = (BarColumn(24), TaskProgressColumn(), TextColumn("{task.fields[status]}"))
            self._bar = Progress(*columns, console=console)
            self._task = self._bar.add_task("extract", total=total, status="")
            self._bar.start()

    def update(self, done: int, left_out: int) -> None:
        """Some more images have features, or have been left out."""
        self._done += done
        self._left_out += left_out
        if self._bar is not None:
            advance = done + left_out
            self._bar.update(self._task, advance=advance, status=self._status())
        elif time.perf_counter() - self._shown > SECONDS_BETWEEN_LINES:
            self._shown = time.perf_counter()
            console.print(self._status(), highlight=False)

    def stop(self) -> None:
        """Give the terminal back and print the rate."""
        if self._bar is not None:
            self._bar.stop()
        if self._done:
            console.print(self._status(), highlight=False)

    def _status(self) -> str:
        seen = self._done + self._left_out
        rate = seen / (time.perf_counter() - self._began)
        eta = timedelta(seconds=round((self._total - seen) / rate))
        ranks = get_dist_info()[1]
        shared = f" on each of {ranks} ranks" if ranks > 1 else ""
        broken = f", {self._left_out} left out" if self._left_out else ""
        return (
            f"{seen}/{self._total} images{shared}, {rate:.1f} images/s, {eta} left, "
            f"{memory_text()}{broken}"
        )


def extract(args: argparse.Namespace) -> None:
    """Run what the command line says."""
    options = source_options(args)
    source = build_source(args.images, options)
    layers = args.layers or (FOUR_EVEN if "layers" in args.what else None)
    extractor = FeatureExtractor(
        args.weights,
        random_init=args.random_init,
        image_size=args.image_size,
        resize=args.resize,
        interpolation=args.interpolation,
        layers=layers,
        norm=not args.no_norm,
        dtype=args.dtype,
        device=args.device,
        mean=args.mean,
        std=args.std,
        batch_size=args.batch_size,
        max_tokens_per_batch=args.max_tokens_per_batch,
        tile=args.tile,
        overlap=args.overlap,
    )
    is_main = get_dist_info()[0] == 0
    if is_main:
        console.print(f"computing in {extractor.choice}", highlight=False)
    report = ProgressReport()
    result = extract_to_files(
        extractor,
        source,
        args.out,
        what=[field for field in args.what if field != "layers"] or ["cls"],
        store_dtype=args.store_dtype,
        shard_size=args.shard_size,
        num_workers=args.num_workers,
        source_options=options,
        content=args.hash_files,
        on_start=report.start if is_main else None,
        on_progress=report.update if is_main else None,
    )
    if is_main:
        report.stop()
        for note in result.notes:
            console.print(note, highlight=False, soft_wrap=True)
        summarise(args.out, result.index)


def summarise(out: str, index: dict[str, Any]) -> None:
    """Print what is on disk."""
    left_out = index["left_out"]
    lines = [f"left out: {entry['path']}: {entry['reason']}" for entry in left_out[:SHOWN_FAILURES]]
    if len(left_out) > SHOWN_FAILURES:
        lines.append(f"... and {len(left_out) - SHOWN_FAILURES} more; all are in the index")
    fields = ", ".join(f"{name} {entry['shape']}" for name, entry in index["fields"].items())
    lines.append(f"{index['num_images']} images in {out}: {fields}")
    lines.append(f"dinov3_mm.apis.load_features({str(out)!r}) opens them")
    print("\n".join(lines))


def main(argv: Sequence[str] | None = None) -> None:
    args = parse_args(argv)
    # A rank may wait for the others much longer than for a collective of a training.
    start_processes(args.launcher, timeout_s=7 * 24 * 3600.0)
    extract(args)
    if dist.is_initialized():
        dist.destroy_process_group()
