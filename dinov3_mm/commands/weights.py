"""Weights: what there is, from one format to another, and for use without this package."""

import argparse
import inspect
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from rich.console import Console
from rich.table import Table

from dinov3_mm.apis.deployment.check import find_images, print_differences
from dinov3_mm.apis.deployment.graph import (
    DEFAULT_OUTPUTS,
    OUTPUTS,
    check_output_names,
    parse_size,
)
from dinov3_mm.apis.deployment.onnx_file import (
    DEFAULT_OPSET,
    DEFAULT_PROVIDER,
    check_opset,
    check_provider,
    export_onnx,
    require_onnx,
)
from dinov3_mm.apis.deployment.request import DTYPES, ExportReport, check_target
from dinov3_mm.apis.deployment.torch_file import export_torch
from dinov3_mm.checkpoints import (
    Statistics,
    build_backbone,
    list_backbones,
    read_statistics,
)
from dinov3_mm.checkpoints import convert as conversion
from dinov3_mm.checkpoints.targets import TARGETS
from dinov3_mm.command_line import ToolParser
from dinov3_mm.models.backbones.zoo import ZOO

# Narrower, the columns of the table of backbones would break within words.
MIN_WIDTH = 160


def backbones(argv: Sequence[str] | None = None) -> None:
    """Table of the backbones."""
    parser = ToolParser(description="Table of the backbones.")
    parser.add_argument("pattern", nargs="?", help="shell pattern, e.g. '*vitl16*'")
    parser.add_argument("--weights-only", action="store_true", help="only those with weights")
    parser.add_argument(
        "--width",
        type=int,
        help=f"characters a line; default: the terminal's, at least {MIN_WIDTH}",
    )
    args = parser.parse_args(argv)
    names = list_backbones(args.pattern, weights_only=args.weights_only)
    width = args.width or max(Console().width, MIN_WIDTH)
    Console(width=width).print(backbone_table(names))


def backbone_table(names: Sequence[str]) -> Table:
    """Rows of the zoo as a table for people."""
    table = Table(title=f"{len(names)} backbones", show_lines=True)
    table.add_column("name", no_wrap=True)
    table.add_column("backbone, arch")
    for column in ("params (M)", "GMACs at 224 px"):
        table.add_column(column, justify="right")
    table.add_column("data, licence")
    table.add_column("official file, Hugging Face, timm", overflow="fold")
    table.add_column("mean, std", no_wrap=True)
    for name in names:
        row = ZOO[name]
        origin = [row.data or "no weights", row.licence]
        places = [row.file, row.hf_id, row.timm_name]
        statistics = [" ".join(f"{v:.3f}" for v in values) for values in (row.mean, row.std)]
        table.add_row(
            name,
            f"{row.backbone}\n{row.arch}",
            f"{row.num_params / 1e6:.1f}",
            f"{row.gmacs:.1f}",
            *("\n".join(filter(None, lines)) for lines in (origin, places, statistics)),
        )
    return table


def convert(argv: Sequence[str] | None = None) -> None:
    """From one format to another.

    Formats: ``official`` (.pth), ``hf`` and ``timm`` (folders), ``mm`` (.safetensors). The features
    of the result, computed by the library it is for, are compared with those of the source first.
    """
    parser = ToolParser(description=inspect.getdoc(convert))
    parser.add_argument("src", help="file, folder, URL or hub name of any known format")
    parser.add_argument("dst", help="file (official, mm) or folder (hf, timm) to write")
    parser.add_argument("--to", required=True, choices=TARGETS)
    parser.add_argument(
        "--name", help="row of the table of backbones, where the weights do not show it"
    )
    parser.add_argument(
        "--periods",
        choices=("file", "exact"),
        default="file",
        help="RoPE periods of official and mm: as stored, or rounded as in the released files "
        "(file); unrounded, as transformers and timm compute them (exact)",
    )
    parser.add_argument(
        "--reset-bias-mask",
        action="store_true",
        help="set bias masks to 1/0/1, so that biases train",
    )
    parser.add_argument(
        "--dtype", choices=conversion.DTYPES, help="of the weights; default: as in SRC"
    )
    parser.add_argument(
        "--statistics", help="pretraining data (e.g. SAT-493M), where SRC does not tell"
    )
    parser.add_argument(
        "--no-compare",
        action="store_true",
        help=f"do not compare features (bar: {conversion.BAR:g} of the largest value)",
    )
    args = parser.parse_args(argv)
    report = conversion.convert_checkpoint(
        args.src,
        args.dst,
        to=args.to,
        name=args.name,
        periods=args.periods,
        reset_bias_mask=args.reset_bias_mask,
        dtype=args.dtype,
        statistics=args.statistics,
        compare=not args.no_compare,
    )
    print(report)


def export_parser(description: str) -> argparse.ArgumentParser:
    """Arguments that both exports have; ONNX adds its own with :func:`onnx_parser`."""
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
    """Arguments of the export to ONNX."""
    parser = export_parser(description)
    parser.add_argument("--opset", type=int, default=DEFAULT_OPSET, help="18 to 23, default 20")
    parser.add_argument(
        "--provider", default=DEFAULT_PROVIDER, help="execution provider to check on"
    )
    return parser


def _describe() -> str:
    return "of " + ", ".join(f"{name} {shape}" for name, shape in OUTPUTS.items())


def onnx(argv: Sequence[str] | None = None) -> None:
    """Export a backbone to ONNX, and keep the file only if ONNX Runtime computes it like PyTorch.

    dinov3-mm export onnx dinov3_backbone.safetensors backbone.onnx
    dinov3-mm export onnx dinov3_vits16 vits16.onnx --weights FILE.pth --dynamic
    """
    args = onnx_parser(inspect.getdoc(onnx)).parse_args(argv)

    def check() -> None:
        require_onnx()
        check_target(args.out, ".onnx")
        check_opset(args.opset)
        check_provider(args.provider)

    _run(args, check, partial(export_onnx, opset=args.opset, provider=args.provider))


def torch_export(argv: Sequence[str] | None = None) -> None:
    """Export a backbone with torch.export, and keep the file only if it computes like the model.

    dinov3-mm export torch dinov3_backbone.safetensors backbone.pt2 --dynamic
    """
    args = export_parser(inspect.getdoc(torch_export)).parse_args(argv)
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
