"""Train a head several times over one cache of features, and print a table.

``python tools/sweep.py CONFIG --cache-features DIR --grid optim_wrapper.optimizer.lr=[1e-4,1e-3]
model.decode_head.dropout_ratio=[0.0,0.1]``
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table

import dinov3_mm  # noqa: F401  (registers what configs name)
from dinov3_mm.command_line import ToolParser, run_tool
from dinov3_mm.engine import ConfigError, apply_options, parse_options, read_config
from dinov3_mm.engine.config.check import is_host_config
from dinov3_mm.engine.config.host import set_data_root, set_host_weights, settle_host
from dinov3_mm.engine.downstream import Trial, parse_grid, sweep
from dinov3_mm.engine.feature_cache import use_feature_cache


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
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
    return parser.parse_args(argv)


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


def main(argv: Sequence[str] | None = None) -> None:
    args = parse_args(argv)
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


if __name__ == "__main__":
    run_tool(main)
