"""The command lines of tools/export_onnx.py and tools/export_torch.py."""

import argparse
from collections.abc import Callable
from functools import partial
from typing import Any

from rich.console import Console

from dinov3_mm.checkpoints import Statistics, build_backbone, read_statistics
from dinov3_mm.command_line import ToolParser
from dinov3_mm.models.backbones.zoo import ZOO

from .check import find_images, print_differences
from .graph import DEFAULT_OUTPUTS, OUTPUTS, check_output_names, parse_size
from .onnx_file import (
    DEFAULT_OPSET,
    DEFAULT_PROVIDER,
    check_opset,
    check_provider,
    export_onnx,
    require_onnx,
)
from .request import DTYPES, ExportReport, check_target
from .torch_file import export_torch


def export_parser(description: str) -> argparse.ArgumentParser:
    """Arguments that both tools have; the ONNX tool adds its own with :func:`onnx_parser`."""
    parser = ToolParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("weights_or_name", help="weight file, folder or hub name; or a backbone")
    parser.add_argument("out", help="file to write")
    parser.add_argument("--weights", help="weights for a backbone given by name")
    parser.add_argument(
        "--random-weights", action="store_true", help="export an untrained backbone, to measure it"
    )
    parser.add_argument(
        "--image-size",
        nargs="+",
        metavar="S",
        help="side, or HEIGHTxWIDTH; with --dynamic the sizes to check (default 224; dynamic: "
        "224 512 336x448)",
    )
    parser.add_argument("--dynamic", action="store_true", help="height and width may vary")
    parser.add_argument("--batch", type=int, help="fix the number of images; default: it varies")
    parser.add_argument(
        "--outputs", nargs="+", default=list(DEFAULT_OUTPUTS), metavar="OUT", help=_describe()
    )
    parser.add_argument(
        "--layers", nargs="+", type=int, help="blocks or stages from 0 (negative: from the end)"
    )
    parser.add_argument("--dtype", default="fp32", choices=tuple(DTYPES))
    parser.add_argument(
        "--images", nargs="+", help="files or folders to check with; default: rendered scenes"
    )
    parser.add_argument(
        "--tolerance",
        type=float,
        help="largest |difference| (default 1e-4); for 16 bits as a share of the largest value",
    )
    for name in ("mean", "std"):
        parser.add_argument(
            f"--{name}", nargs="+", type=float, help="of the input, if the weights do not state it"
        )
    return parser


def onnx_parser(description: str) -> argparse.ArgumentParser:
    """Arguments of tools/export_onnx.py."""
    parser = export_parser(description)
    parser.add_argument("--opset", type=int, default=DEFAULT_OPSET, help="18 to 23, default 20")
    parser.add_argument(
        "--provider", default=DEFAULT_PROVIDER, help="execution provider to check on"
    )
    return parser


def _describe() -> str:
    return "of " + ", ".join(f"{name} {shape}" for name, shape in OUTPUTS.items())


def run_onnx(args: argparse.Namespace) -> None:
    """What tools/export_onnx.py does."""

    def check() -> None:
        require_onnx()
        check_target(args.out, ".onnx")
        check_opset(args.opset)
        check_provider(args.provider)

    _run(args, check, partial(export_onnx, opset=args.opset, provider=args.provider))


def run_torch(args: argparse.Namespace) -> None:
    """What tools/export_torch.py does."""
    _run(args, lambda: check_target(args.out, ".pt2"), export_torch)


def _run(
    args: argparse.Namespace, check: Callable[[], Any], export: Callable[..., ExportReport]
) -> None:
    """Export and print the differences."""
    console = Console()
    check()  # before weights are read
    report = _export(args, export)
    print_differences(report.differences, report.bounds, console)
    size = sum(p.stat().st_size for p in report.path.parent.glob(f"{report.path.name}*"))
    outputs = list(report.metadata["outputs"])
    # Not wrapped: a path is copied.
    console.print(f"{report.path}: {size / 1e6:.1f} MB, outputs {outputs}", soft_wrap=True)


def _export(args: argparse.Namespace, export: Callable[..., ExportReport]) -> ExportReport:
    check_output_names(args.outputs)
    sizes = args.image_size and [parse_size(size) for size in args.image_size]
    images = args.images and find_images(args.images)
    statistics = input_statistics(args)
    backbone = build_backbone(args.weights_or_name, args.weights)
    return export(
        backbone,
        args.out,
        statistics=statistics,
        outputs=args.outputs,
        layers=args.layers,
        image_sizes=sizes,
        dynamic=args.dynamic,
        batch=args.batch,
        dtype=args.dtype,
        images=images,
        tolerance=args.tolerance,
        source="random" if args.random_weights else args.weights or args.weights_or_name,
    )


def input_statistics(args: argparse.Namespace) -> Statistics:
    """Statistics of the weights: as given, as their file states, or of the named checkpoint.

    Raises:
        ValueError: if a name comes without weights, or nothing states the statistics.
    """
    rows = [row for name, row in ZOO.items() if args.weights_or_name in (name, row.official_name)]
    if args.random_weights and not (rows and args.weights is None):
        raise ValueError("--random-weights goes with the name of a backbone and without --weights")
    if rows and args.weights is None and not args.random_weights:
        raise ValueError(
            f"{args.weights_or_name} is a name; give its weights with --weights FILE, or export "
            "an untrained network with --random-weights"
        )
    if (args.mean is None) != (args.std is None):
        raise ValueError("--mean and --std belong together; give both or none")
    if args.mean is not None:
        return Statistics(tuple(args.mean), tuple(args.std))
    if rows and args.random_weights:
        return Statistics(rows[0].mean, rows[0].std)
    try:
        return read_statistics(args.weights or args.weights_or_name)
    except ValueError:
        if rows:
            return Statistics(rows[0].mean, rows[0].std)
        raise
