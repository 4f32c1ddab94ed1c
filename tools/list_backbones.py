"""Table of the backbones: ``python tools/list_backbones.py [PATTERN] [--weights-only]``."""

from collections.abc import Sequence

from rich.console import Console
from rich.table import Table

from dinov3_mm import list_backbones
from dinov3_mm.command_line import ToolParser, run_tool
from dinov3_mm.models.backbones import ZOO

# Narrower, the columns would break within words.
MIN_WIDTH = 160


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


def main(argv: Sequence[str] | None = None) -> None:
    parser = ToolParser(description=__doc__)
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


if __name__ == "__main__":
    run_tool(main)
