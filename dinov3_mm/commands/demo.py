"""Predict: ``dinov3-mm demo JOB CONFIG INPUTS... --checkpoint FILE``, and ``tools/demo_*.py``."""

import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from dinov3_mm.apis.prediction.jobs import (
    Classified,
    DepthEstimated,
    Detected,
    Segmented,
    classify,
    detect,
    estimate_depth,
    segment,
)
from dinov3_mm.apis.prediction.model import load_model
from dinov3_mm.command_line import ToolParser
from dinov3_mm.models.precision import AUTO, dtype_option


@dataclass(frozen=True)
class Demo:
    """A job on the command line.

    Attributes:
        run: its function.
        describe: JSON values about a result, printed as one line an image.
        out_dir: default folder of the pictures.
    """

    run: Callable[..., Any]
    describe: Callable[[Any], dict]
    out_dir: str


def _named(classes: Sequence[str], label: int) -> str:
    return classes[label] if classes else str(label)


def _classified(result: Classified) -> dict:
    return {
        _named(result.classes, i): round(float(result.scores[i]), 4) for i in result.labels.tolist()
    }


def _segmented(result: Segmented) -> dict:
    labels, counts = np.unique(result.labels, return_counts=True)
    shares = sorted(zip(counts / result.labels.size, labels.tolist()), reverse=True)
    return {_named(result.classes, label): round(float(share), 4) for share, label in shares}


def _detected(result: Detected) -> dict:
    objects = [
        {"class": _named(result.classes, label), "score": round(score, 4), "box": box}
        for label, score, box in zip(
            result.labels.tolist(), result.scores.tolist(), result.boxes.round(1).tolist()
        )
    ]
    return {"objects": objects}


def _depth(result: DepthEstimated) -> dict:
    values = {"min": result.depth.min(), "median": np.median(result.depth)}
    values["max"] = result.depth.max()
    return {name: round(float(value), 3) for name, value in values.items()}


DEMOS = {
    "classification": Demo(classify, _classified, "demo/classification"),
    "segmentation": Demo(segment, _segmented, "demo/segmentation"),
    "detection": Demo(detect, _detected, "demo/detection"),
    "depth": Demo(estimate_depth, _depth, "demo/depth"),
}


def run_demo(job: str, argv: Sequence[str] | None = None) -> None:
    """Run a model on images, print a line of JSON for each, write pictures."""
    demo = DEMOS[job]
    parser = ToolParser(description=f"{job.capitalize()} of images and videos.")
    parser.add_argument("config", help="config file")
    parser.add_argument("inputs", nargs="+", help="images, folders of images, or videos")
    parser.add_argument("--checkpoint", metavar="FILE", help="training checkpoint")
    parser.add_argument(
        "--weights",
        metavar="FILE_OR_NAME",
        help="weights of the backbone; with a checkpoint: where those lie that it leaves out",
    )
    parser.add_argument("--head", metavar="FILE", help="file of a released head")
    parser.add_argument("--out-dir", default=demo.out_dir, help=f"default: {demo.out_dir}")
    parser.add_argument("--device", help="default: the GPU if there is one")
    parser.add_argument(
        "--dtype",
        default=AUTO,
        type=dtype_option,
        help="of computing: fp32, bf16, or auto: the config's; default",
    )
    if job == "detection":
        parser.add_argument("--threshold", type=float, default=0.3, help="least score of a box")
    args = parser.parse_args(argv)
    options = {"threshold": args.threshold} if job == "detection" else {}
    model = load_model(
        args.config,
        args.checkpoint,
        weights=args.weights,
        head=args.head,
        device=args.device,
        dtype=args.dtype,
    )
    print(f"computing in {model.choice}", file=sys.stderr)
    for result in demo.run(model, args.inputs, out_dir=args.out_dir, **options):
        record = {"image": result.name, "dtype": model.dtype, **demo.describe(result)}
        print(json.dumps(record), flush=True)
    print(f"pictures: {args.out_dir}", file=sys.stderr)
