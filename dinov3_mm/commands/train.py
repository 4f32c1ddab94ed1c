"""Train a config, start several processes that do, and run a captured step of theirs again.

``dinov3-mm train CONFIG [--resume] [--cfg-options key=value ...]`` is one process;
``--dry-run --world-size N`` checks a pretraining config without data, weights or GPU.
``dinov3-mm dist_train`` and its like run the scripts of ``tools/``, which travel with the package.
"""

import argparse
import os
import signal
import sys
from collections.abc import Sequence
from pathlib import Path

from mmengine.config import Config
from mmengine.runner import FlexibleRunner, Runner

from dinov3_mm.command_line import INTERRUPTED, ToolParser
from dinov3_mm.engine import (
    LAUNCHERS,
    ConfigError,
    apply_options,
    build_runner,
    end_processes,
    parse_options,
    read_config,
    resume_stage,
    run_training,
    set_data,
    set_resume,
    set_teacher,
    set_weights,
    start_from_stage,
    start_processes,
)
from dinov3_mm.engine.capture import ReplayReport, captured_ranks, replay_capture
from dinov3_mm.engine.config.check import is_host_config
from dinov3_mm.engine.config.host import set_data_root, set_host_weights, settle_host
from dinov3_mm.engine.config.read import SHIPPED, find_config
from dinov3_mm.engine.feature_cache import use_feature_cache

NEWEST = "newest"


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = ToolParser(description="Train a config.")
    parser.add_argument("config", help="config file")
    parser.add_argument("--work-dir", help="folder of checkpoints and logs; default: of the config")
    parser.add_argument(
        "--resume",
        nargs="?",
        const=NEWEST,
        metavar="PATH",
        help="continue from a checkpoint; without PATH from the newest of the work folder, "
        "or from the start if it has none. An older PATH begins a new branch: what is later than "
        "it in the work folder is set aside",
    )
    parser.add_argument(
        "--data",
        metavar="DIR",
        help="folder of images to train on and evaluate, or root of the data set of a downstream "
        "config",
    )
    parser.add_argument(
        "--weights",
        metavar="FILE_OR_NAME",
        help="backbone weights to start from, in any known format, or the name of a released "
        "checkpoint; for configs whose backbone has an init_cfg",
    )
    parser.add_argument(
        "--teacher",
        action="append",
        metavar="[NAME=]FILE",
        help="training checkpoint or export with heads of the teacher; for distillation configs. "
        "Of several teachers once for each, with its name",
    )
    parser.add_argument(
        "--from-stage",
        metavar="WORK_DIR",
        help="work folder of the earlier stage from which this one goes on; for later stages",
    )
    parser.add_argument(
        "--gram-iter",
        type=int,
        metavar="N",
        help="with --from-stage: the Gram teacher is the teacher of iteration N; default: of the "
        "config, or the newest",
    )
    parser.add_argument(
        "--cache-features",
        metavar="DIR",
        help="compute the features of the frozen backbone once, into DIR, and train the head from "
        "them; random crops and colours are replaced by the geometry of validation",
    )
    parser.add_argument(
        "--cache-dtype", choices=("fp32", "bf16"), default="fp32", help="of cached features"
    )
    parser.add_argument(
        "--cache-views",
        type=int,
        default=1,
        metavar="N",
        help="views of an image to cache: the first as in validation, the others with random flips "
        "and crops of the config, drawn once; default: 1",
    )
    parser.add_argument(
        "--cache-hash",
        action="store_true",
        help="notice changed images by their bytes, not by size and time alone",
    )
    parser.add_argument("--seed", type=int, help="seed of data order, crops, masks and weights")
    parser.add_argument(
        "--cfg-options",
        nargs="+",
        default=[],
        metavar="KEY=VALUE",
        help="override config values, e.g. train_cfg.max_iters=100 custom_hooks.0.interval=10",
    )
    parser.add_argument("--launcher", choices=LAUNCHERS, default="none")
    dry = parser.add_argument_group("dry run")
    dry.add_argument(
        "--dry-run",
        action="store_true",
        help="check the config and run a step without data, weights and GPU; print shapes, memory, "
        "schedules and collectives",
    )
    dry.add_argument("--world-size", type=int, metavar="N", help="processes to imitate; default: 1")
    dry.add_argument(
        "--num-images",
        type=int,
        metavar="N",
        help="size of the data set, for configs with values 'auto' and without --data",
    )
    dry.add_argument(
        "--gpu-memory", type=float, metavar="GIB", help="memory of a GPU, for a batch 'auto'"
    )
    return parser.parse_args(argv)


def load_config(args: argparse.Namespace) -> Config:
    """Config file plus what the command line says."""
    cfg = read_config(args.config)
    of_host = is_host_config(cfg)
    if args.data is not None:
        (set_data_root if of_host else set_data)(cfg, args.data)
    if args.weights is not None:
        (set_host_weights if of_host else set_weights)(cfg, args.weights)
    if args.teacher is not None:
        set_teacher(cfg, args.teacher)
    apply_options(cfg, parse_options(args.cfg_options))
    cfg.work_dir = args.work_dir or cfg.get("work_dir") or f"work_dirs/{Path(args.config).stem}"
    if args.seed is not None:
        cfg.randomness = {**(cfg.get("randomness") or {}), "seed": args.seed}
    if args.resume is not None:
        checkpoint = None if args.resume == NEWEST else args.resume
        set_resume(cfg, checkpoint, is_stage=args.from_stage is not None)
    return cfg


def settle_stage(cfg: Config, args: argparse.Namespace) -> list[str]:
    """Start a later stage from the one before it, unless it has begun; lines for the log."""
    if args.gram_iter is not None and args.from_stage is None:
        raise ConfigError("--gram-iter chooses a teacher of the stage in --from-stage; give both")
    if args.resume is not None and cfg.get("resume"):
        resume_stage(cfg)
        return []
    if args.from_stage is None:
        return []
    return start_from_stage(cfg, args.from_stage, gram_iter=args.gram_iter)


def cache_features(cfg: Config, args: argparse.Namespace) -> list[str]:
    """Train from features that are computed once; lines for the log."""
    if not is_host_config(cfg):
        raise ConfigError("--cache-features is for heads on a frozen backbone, not for pretraining")
    settle_host(cfg)
    return use_feature_cache(
        cfg,
        args.cache_features,
        args.cache_dtype,
        views=args.cache_views,
        content=args.cache_hash,
    )


def try_out(args: argparse.Namespace) -> None:
    """Dry run of the config."""
    from dinov3_mm.engine.dry_run import check_file, dry_runs, print_report

    if args.launcher != "none":
        raise ConfigError("--dry-run is one process; give --world-size N instead of a launcher")
    check_file(args.config)
    reports = dry_runs(
        load_config(args),
        1 if args.world_size is None else args.world_size,
        num_images=args.num_images,
        memory_gib=args.gpu_memory,
    )
    for report in reports:
        print_report(report)


def refuse_dry_options(args: argparse.Namespace) -> None:
    """Refuse options of a dry run in a run that would silently do without them."""
    for option, value in (
        ("--world-size", args.world_size),
        ("--num-images", args.num_images),
        ("--gpu-memory", args.gpu_memory),
    ):
        if value is not None:
            raise ConfigError(
                f"{option} is for dry runs: add --dry-run, or leave it out to train (several "
                "processes: tools/dist_train.sh CONFIG N)"
            )


def main(argv: Sequence[str] | None = None) -> int:
    """Train, or try out; the exit status."""
    args = parse_args(argv)
    if args.dry_run:
        try_out(args)
        return 0
    refuse_dry_options(args)
    start_processes(args.launcher)
    cfg = load_config(args)
    try:
        runner = prepare(cfg, args)
    except ConfigError as error:
        if args.resume is None or cfg.get("resume"):
            raise
        raise ConfigError(
            f"--resume: {cfg.work_dir} holds no checkpoint yet, so the run starts from the "
            f"beginning, which needs the options of the first start\n{error}"
        ) from error
    stopped_by = run_training(runner)
    end_processes()
    return INTERRUPTED if stopped_by == signal.SIGINT else 0


def prepare(cfg: Config, args: argparse.Namespace) -> FlexibleRunner | Runner:
    """The runner of a config."""
    notes = settle_stage(cfg, args)
    if args.resume is not None and not cfg.get("resume"):
        notes.append(
            f"resume: {cfg.work_dir} holds no checkpoint yet: the run starts from the beginning"
        )
    if args.cache_features is not None:
        notes += cache_features(cfg, args)
    return build_runner(cfg, notes=notes)


# --- Several processes ---


# Position of the config among the words of a script.
SCRIPTS = {"dist_train": 0, "dist_test": 0, "slurm_train": 2, "slurm_test": 2}


def launch(script: str, argv: Sequence[str] | None = None) -> None:
    """Run a launcher of ``tools/`` in place of this process; its config may be a name.

    Raises:
        ConfigError: there is no config of that name.
    """
    words = list(sys.argv[1:] if argv is None else argv)
    place = SCRIPTS[script]
    if len(words) > place and not words[place].startswith("-"):
        words[place] = find_config(words[place])
    os.environ.setdefault("PYTHON", sys.executable)
    os.execvp("bash", ["bash", str(SHIPPED / "tools" / f"{script}.sh"), *words])


# --- A captured step ---


def replay(argv: Sequence[str] | None = None) -> None:
    """Run a captured training step again.

    Captures are ``work_dir/captures/iter_*.pt``, with FSDP2 folders ``iter_*``, written by
    ``NonFiniteGuardHook`` when a loss or a gradient is not finite. One process runs the micro
    batches of each rank whose loss was bad. Prints the losses, the gradient norms, and where the
    first bad value arose.
    """
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
    args = parser.parse_args(argv)
    cfg = read_config(args.config)
    ranks = captured_ranks(args.capture) if args.rank is None else [args.rank]
    for rank in ranks:
        print(describe(replay_capture(args.capture, cfg, args.device, rank=rank)))


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
