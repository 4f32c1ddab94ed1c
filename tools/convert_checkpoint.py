"""Convert weights: ``python tools/convert_checkpoint.py SRC DST --to hf``.

Formats: ``official`` (.pth), ``hf`` and ``timm`` (folders), ``mm`` (.safetensors). The features of
the result, computed by the library it is for, are compared with those of the source first.
"""

import argparse
from collections.abc import Sequence

import dinov3_mm  # noqa: F401  (registers the backbones)
from dinov3_mm.checkpoints.convert import BAR, DTYPES, convert_checkpoint
from dinov3_mm.checkpoints.targets import TARGETS
from dinov3_mm.command_line import ToolParser, run_tool


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = ToolParser(description=__doc__)
    parser.add_argument("src", help="file, folder, URL or hub name of any known format")
    parser.add_argument("dst", help="file (official, mm) or folder (hf, timm) to write")
    parser.add_argument("--to", required=True, choices=TARGETS)
    parser.add_argument("--name", help="row of list_backbones.py, where the weights do not show it")
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
    parser.add_argument("--dtype", choices=DTYPES, help="of the weights; default: as in SRC")
    parser.add_argument(
        "--statistics", help="pretraining data (e.g. SAT-493M), where SRC does not tell"
    )
    parser.add_argument(
        "--no-compare",
        action="store_true",
        help=f"do not compare features (bar: {BAR:g} of the largest value)",
    )
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> None:
    args = parse_args(argv)
    report = convert_checkpoint(
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


if __name__ == "__main__":
    run_tool(main)
