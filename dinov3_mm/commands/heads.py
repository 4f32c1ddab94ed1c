"""Test a model, and train a head for every combination of values.

Without a checkpoint ``dinov3-mm test CONFIG`` tests what the config loads by itself, such as a
released backbone and head: ``dinov3-mm test CONFIG --weights BACKBONE --head HEAD``.
``dinov3-mm sweep CONFIG --cache-features DIR --grid optim_wrapper.optimizer.lr=[1e-4,1e-3]
model.decode_head.dropout_ratio=[0.0,0.1]`` prints a table.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

from mmengine.config import Config
from rich.console import Console
from rich.table import Table

from dinov3_mm.command_line import ToolParser
from dinov3_mm.engine import (
    LAUNCHERS,
    ConfigError,
    apply_options,
    end_processes,
    parse_options,
    read_config,
    start_processes,
)
from dinov3_mm.engine.config.check import is_host_config
from dinov3_mm.engine.config.host import (
    set_data_root,
    set_head,
    set_host_weights,
    settle_host,
)
from dinov3_mm.engine.downstream import (
    Trial,
    build_tester,
    draw_predictions,
    parse_grid,
    sweep,
    test,
    use_tta,
)
from dinov3_mm.engine.feature_cache import use_feature_cache


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


def test_command(argv: Sequence[str] | None = None) -> None:
    """Score a model."""
    args = parse_args(argv)
    start_processes(args.launcher)
    test(build_tester(load_config(args), args.checkpoint, weights=args.weights))
    end_processes()


def sweep_command(argv: Sequence[str] | None = None) -> None:
    """Train a head for every combination of values, and print a table."""
    parser = ToolParser(description="Train a head for every combination of values.")
    parser.add_argument("config", help="config of a head on a frozen backbone")
    parser.add_argument(
        "--grid",
        nargs="+",
        required=True,
        metavar="KEY=[V1,V2,...]",
        help="config values to try; all combinations are trained",
    )
    parser.add_argument(
        "--cache-features", metavar="DIR", help="compute the features once, into DIR"
    )
    parser.add_argument("--cache-dtype", choices=("fp32", "bf16"), default="fp32")
    parser.add_argument("--cache-views", type=int, default=1, metavar="N")
    parser.add_argument("--cache-hash", action="store_true")
    parser.add_argument("--data", metavar="DIR", help="root of the data set")
    parser.add_argument("--weights", metavar="FILE_OR_NAME", help="weights of the backbone")
    parser.add_argument("--work-dir", help="folder of the trials; default: of the config")
    parser.add_argument(
        "--cfg-options", nargs="+", default=[], metavar="KEY=VALUE", help="set in all trials"
    )
    args = parser.parse_args(argv)
    cfg = read_config(args.config)
    if not is_host_config(cfg):
        raise ConfigError("a sweep trains heads on a frozen backbone; this config pretrains")
    if args.data is not None:
        set_data_root(cfg, args.data)
    if args.weights is not None:
        set_host_weights(cfg, args.weights)
    apply_options(cfg, parse_options(args.cfg_options))
    settle_host(cfg)
    if args.cache_features is not None:
        lines = use_feature_cache(
            cfg,
            args.cache_features,
            args.cache_dtype,
            views=args.cache_views,
            content=args.cache_hash,
        )
        print("\n".join(lines))
    work_dir = Path(args.work_dir or f"work_dirs/sweep_{Path(args.config).stem}")
    trials = list(sweep(cfg, parse_grid(args.grid), work_dir))
    Console(width=160).print(table(trials))


def table(trials: Sequence[Trial]) -> Table:
    """Values and metrics, a row a trial."""
    metrics = list(dict.fromkeys(name for trial in trials for name in trial.metrics))
    result = Table(*trials[0].values, *metrics, "seconds")
    for trial in trials:
        numbers = [
            f"{trial.metrics[name]:.4g}" if name in trial.metrics else "" for name in metrics
        ]
        result.add_row(*map(str, trial.values.values()), *numbers, f"{trial.seconds:.0f}")
    return result
