"""Which strategy fits: ``python tools/plan.py CONFIG --gpus 8 64 256 --gpu-memory 80``.

Predicts memory, operations and communication of a training step from shapes, in seconds and without
data, weights or GPU. ``tools/train.py CONFIG --dry-run`` runs the step itself on fake tensors.
"""

import argparse
import logging
from collections.abc import Sequence

from mmengine.logging import MMLogger

import dinov3_mm  # noqa: F401  (registers what configs name)
from dinov3_mm.command_line import ToolParser, run_tool
from dinov3_mm.engine import apply_options, parse_options, read_config, set_data
from dinov3_mm.engine.dry_run import check_file
from dinov3_mm.engine.dry_run.run import make_console
from dinov3_mm.engine.plan import make_plan, print_plan


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = ToolParser(description="Predict memory, work and traffic of a config.")
    parser.add_argument("config", help="pretraining config")
    parser.add_argument(
        "--gpus", type=int, nargs="+", required=True, metavar="N", help="numbers of GPUs to compare"
    )
    parser.add_argument(
        "--gpu-memory", type=float, default=80.0, metavar="GIB", help="of each GPU; default: 80"
    )
    parser.add_argument(
        "--gpus-per-node", type=int, default=8, metavar="N", help="GPUs of a machine; default: 8"
    )
    parser.add_argument("--data", metavar="DIR", help="folder of images, for values 'auto'")
    parser.add_argument(
        "--num-images", type=int, metavar="N", help="size of the data set, for values 'auto'"
    )
    parser.add_argument(
        "--cfg-options", nargs="+", default=[], metavar="KEY=VALUE", help="override config values"
    )
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> None:
    args = parse_args(argv)
    MMLogger.get_current_instance().setLevel(logging.WARNING)
    check_file(args.config)
    cfg = read_config(args.config)
    if args.data is not None:
        set_data(cfg, args.data)
    apply_options(cfg, parse_options(args.cfg_options))
    console = make_console()
    for gpus in args.gpus:
        plan = make_plan(
            cfg,
            gpus,
            num_images=args.num_images,
            memory_gib=args.gpu_memory,
            gpus_per_node=args.gpus_per_node,
        )
        print_plan(plan, args.gpu_memory, args.gpus_per_node, console)


if __name__ == "__main__":
    run_tool(main)
