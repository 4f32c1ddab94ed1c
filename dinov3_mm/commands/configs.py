"""Look at configs: which there are, what one needs, what its images are like."""

import argparse
import fnmatch
import logging
from collections.abc import Sequence
from pathlib import Path

from mmengine.logging import MMLogger
from mmengine.registry import DATASETS

from dinov3_mm.command_line import ToolParser
from dinov3_mm.datasets import ImageFolder, ImageSource, channel_statistics
from dinov3_mm.engine import ConfigError, apply_options, parse_options, read_config, set_data
from dinov3_mm.engine.config.read import config_names
from dinov3_mm.engine.dry_run import check_file
from dinov3_mm.engine.dry_run.run import make_console
from dinov3_mm.engine.plan import make_plan, print_plan


def configs(argv: Sequence[str] | None = None) -> None:
    """Print the names of the configs, one a line."""
    parser = ToolParser(description="Names of the configs that come with the package.")
    parser.add_argument("pattern", nargs="?", help="part of a name, or a shell pattern: '*vitl16*'")
    args = parser.parse_args(argv)
    pattern = args.pattern or "*"
    if not any(sign in pattern for sign in "*?["):
        pattern = f"*{pattern}*"
    names = fnmatch.filter(config_names(), pattern)
    if not names:
        raise ConfigError(f"no config matches {args.pattern!r}; without a pattern all are listed")
    print("\n".join(names))


def plan(argv: Sequence[str] | None = None) -> None:
    """Predict memory, operations and communication of a training step from shapes.

    It takes seconds, and neither data nor weights nor a GPU. ``dinov3-mm train CONFIG --dry-run``
    runs the step itself on fake tensors.
    """
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
    args = parser.parse_args(argv)
    MMLogger.get_current_instance().setLevel(logging.WARNING)
    check_file(args.config)
    cfg = read_config(args.config)
    if args.data is not None:
        set_data(cfg, args.data)
    apply_options(cfg, parse_options(args.cfg_options))
    console = make_console()
    for gpus in args.gpus:
        predicted = make_plan(
            cfg,
            gpus,
            num_images=args.num_images,
            memory_gib=args.gpu_memory,
            gpus_per_node=args.gpus_per_node,
        )
        print_plan(predicted, args.gpu_memory, args.gpus_per_node, console)


def statistics(argv: Sequence[str] | None = None) -> None:
    """Mean and std per channel of a dataset, as lines for ``data_preprocessor`` of a config.

    Of a config the images of ``train_dataloader.source`` are read, of a folder its image files with
    ``color='unchanged'``. All images have to be on the scale that training sees, so give a folder
    the same --value-range and --channels.
    """
    parser = ToolParser(description="Mean and std per channel of a dataset.")
    parser.add_argument("data", help="config file, or folder of images")
    parser.add_argument(
        "--num-images", type=int, default=1000, help="images to read, spread evenly; default: 1000"
    )
    parser.add_argument(
        "--channels", type=int, nargs="+", help="of a folder: channels to keep, counted from 0"
    )
    parser.add_argument(
        "--value-range",
        type=float,
        nargs=2,
        metavar=("LOW", "HIGH"),
        help="of a folder: stored values that become 0 and 1",
    )
    parser.add_argument(
        "--cfg-options", nargs="+", default=[], metavar="KEY=VALUE", help="override config values"
    )
    args = parser.parse_args(argv)
    source = build_source(args)
    found = channel_statistics(source, args.num_images)
    print(f"# {len(found.mean)} channels, {found.num_images} of {len(source)} images")
    print(found.config_lines())


def build_source(args: argparse.Namespace) -> ImageSource:
    """Images of the folder, or of the config's training data."""
    if Path(args.data).is_dir():
        return ImageFolder(
            args.data, color="unchanged", channels=args.channels, value_range=args.value_range
        )
    if args.channels or args.value_range:
        raise ValueError(
            "--channels and --value-range belong to a folder; of a config set "
            "train_dataloader.source.channels and .value_range with --cfg-options"
        )
    cfg = read_config(args.data)
    apply_options(cfg, parse_options(args.cfg_options))
    return DATASETS.build(cfg.train_dataloader.source)
