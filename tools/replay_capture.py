"""Run a captured training step again: ``python tools/replay_capture.py CONFIG CAPTURE``.

Captures are ``work_dir/captures/iter_*.pt``, with FSDP2 folders ``iter_*``, written by
``NonFiniteGuardHook`` when a loss or a gradient is not finite. One process runs the micro batches
of each rank whose loss was bad. Prints the losses, the gradient norms, and where the first bad
value arose.
"""

import argparse
from collections.abc import Sequence

import dinov3_mm  # noqa: F401  (registers what configs name)
from dinov3_mm.command_line import ToolParser, run_tool
from dinov3_mm.engine import read_config
from dinov3_mm.engine.capture import ReplayReport, captured_ranks, replay_capture


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = ToolParser(description="Run a captured training step again.")
    parser.add_argument("config", help="config file of the run")
    parser.add_argument("capture", help="captured step: a file, or a folder of shards")
    parser.add_argument(
        "--rank",
        type=int,
        metavar="N",
        help="whose micro batches to run; default: of the ranks whose loss was not finite, of all "
        "where only a gradient was not",
    )
    parser.add_argument("--device", default="cpu", help="where to run; default: cpu")
    return parser.parse_args(argv)


def describe(report: ReplayReport) -> str:
    """Text of a report."""
    lines = [f"iteration {report.iteration}, rank {report.rank}"]
    for index, losses in enumerate(report.losses):
        lines.append(f"micro batch {index}:")
        lines += [f"  {name:<24} {value:.6g}" for name, value in losses.items()]
    lines.append("gradient norms:")
    lines += [f"  {name:<24} {value:.6g}" for name, value in report.grad_norms.items()]
    if report.bad_parameters:
        lines.append(f"parameters that are not finite: {', '.join(report.bad_parameters)}")
    if report.first_bad_module is not None:
        lines.append(f"first module with an output that is not finite: {report.first_bad_module}")
    lines.append("the step is finite here" if report.is_finite else "the step is not finite")
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> None:
    args = parse_args(argv)
    cfg = read_config(args.config)
    ranks = captured_ranks(args.capture) if args.rank is None else [args.rank]
    for rank in ranks:
        print(describe(replay_capture(args.capture, cfg, args.device, rank=rank)))


if __name__ == "__main__":
    run_tool(main)
