"""Test a model: ``python tools/test.py CONFIG [CHECKPOINT] [--tta] [--show-dir DIR]``.

Without a checkpoint it tests what the config loads by itself, such as a released backbone and head:
``python tools/test.py CONFIG --weights BACKBONE --head HEAD``. ``tools/dist_test.sh`` and
``tools/slurm_test.sh`` start several processes.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

from mmengine.config import Config

import dinov3_mm  # noqa: F401  (registers what configs name)
from dinov3_mm.command_line import ToolParser, run_tool
from dinov3_mm.engine import (
    LAUNCHERS,
    ConfigError,
    apply_options,
    end_processes,
    parse_options,
    read_config,
    start_processes,
)
from dinov3_mm.engine.config.host import set_data_root, set_head, set_host_weights
from dinov3_mm.engine.downstream import build_tester, draw_predictions, test, use_tta


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = ToolParser(description="Test a model.")
    parser.add_argument("config", help="config file")
    parser.add_argument("checkpoint", nargs="?", help="training checkpoint")
    parser.add_argument(
        "--work-dir",
        help="folder of the log and of metrics.json; default: test below that of training",
    )
    parser.add_argument("--data", metavar="DIR", help="root of the data set")
    parser.add_argument(
        "--weights",
        metavar="FILE_OR_NAME",
        help="weights of the backbone; with a checkpoint: where those lie that it leaves out",
    )
    parser.add_argument("--head", metavar="FILE", help="file of a released head")
    parser.add_argument("--tta", action="store_true", help="with test-time augmentation")
    parser.add_argument("--show-dir", metavar="DIR", help="write pictures of all predictions there")
    parser.add_argument(
        "--cfg-options",
        nargs="+",
        default=[],
        metavar="KEY=VALUE",
        help="override config values, e.g. test_dataloader.batch_size=4",
    )
    parser.add_argument("--launcher", choices=LAUNCHERS, default="none")
    # The checkpoint may stand after options, as in tools/dist_test.sh.
    return parser.parse_intermixed_args(argv)


def load_config(args: argparse.Namespace) -> Config:
    """Config file plus what the command line says."""
    cfg = read_config(args.config)
    if args.data is not None:
        set_data_root(cfg, args.data, count_classes=args.checkpoint is None)
    if args.weights is not None:
        set_host_weights(cfg, args.weights)
    if args.head is not None:
        if args.checkpoint is not None:
            raise ConfigError("--head and a checkpoint: both hold the head; give one")
        set_head(cfg, args.head)
    apply_options(cfg, parse_options(args.cfg_options))
    # Not the folder of training: the runner writes its config, which --tta changes.
    trained = cfg.get("work_dir") or f"work_dirs/{Path(args.config).stem}"
    cfg.work_dir = args.work_dir or f"{trained}/test"
    if args.show_dir is not None:
        draw_predictions(cfg, args.show_dir)
    if args.tta:
        use_tta(cfg)
    return cfg


def main(argv: Sequence[str] | None = None) -> None:
    args = parse_args(argv)
    start_processes(args.launcher)
    test(build_tester(load_config(args), args.checkpoint, weights=args.weights))
    end_processes()


if __name__ == "__main__":
    run_tool(main)
