"""Mean and std per channel of a dataset: ``python tools/compute_statistics.py CONFIG_OR_FOLDER``.

Of a config the images of ``train_dataloader.source`` are read, of a folder its image files with
``color='unchanged'``. Prints the lines for ``data_preprocessor`` of the config. All images have to
be on the scale that training sees, so give a folder the same --value-range and --channels.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

from mmengine.registry import DATASETS

import dinov3_mm  # noqa: F401  (registers what configs name)
from dinov3_mm.command_line import ToolParser, run_tool
from dinov3_mm.datasets import ImageFolder, ImageSource, channel_statistics
from dinov3_mm.engine import apply_options, parse_options, read_config


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
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
    return parser.parse_args(argv)


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


def main(argv: Sequence[str] | None = None) -> None:
    args = parse_args(argv)
    source = build_source(args)
    statistics = channel_statistics(source, args.num_images)
    print(f"# {len(statistics.mean)} channels, {statistics.num_images} of {len(source)} images")
    print(statistics.config_lines())


if __name__ == "__main__":
    run_tool(main)
