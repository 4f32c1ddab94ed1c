"""Full-size backbones between all formats: ``python -m tests.acceptance.conversion_matrix``.

Every parameter is redrawn at random. Each conversion is compared with the library that reads the
result, and every format is converted to every other and back. Prints a table; needs transformers,
timm and 2 GB of disk. ``--names`` chooses rows of the zoo.
"""

import argparse
import logging
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch
from mmengine.registry import MODELS
from rich.console import Console
from rich.table import Table

from dinov3_mm.checkpoints.containers import open_checkpoint
from dinov3_mm.checkpoints.convert import convert_checkpoint
from dinov3_mm.checkpoints.formats.conversion import PERIODS_KEY
from dinov3_mm.models.backbones import ZOO
from tests.checkpoints.toys import redraw

NAMES = ("dinov3_vits16_lvd1689m", "dinov3_vits16plus_lvd1689m", "dinov3_convnext_tiny_lvd1689m")
FILES = {"official": "official.pth", "mm": "mm.safetensors", "hf": "hf", "timm": "timm"}


def write_official(name: str, path: Path) -> Path:
    """The backbone of a row as its released file: random weights, K biases 0, periods in bf16."""
    row = ZOO[name]
    backbone = MODELS.build(dict(type=row.backbone, arch=row.arch))
    backbone.init_weights()
    state = {key: tensor.clone() for key, tensor in redraw(backbone).state_dict().items()}
    for key in [key for key in state if key.endswith(".attn.qkv.bias")]:
        state[key] *= state[f"{key}_mask"]
    if PERIODS_KEY in state:
        state[PERIODS_KEY] = state[PERIODS_KEY].bfloat16()
    torch.save(state, path)
    return path


def differing(first: Path, second: Path) -> list[str]:
    """Names of tensors that are not equal to the bit."""
    opened = [open_checkpoint(path) for path in (first, second)]
    a, b = (each.read(each.names) for each in opened)
    return sorted(
        name
        for name in {*a, *b}
        if name not in a or name not in b or not torch.equal(a[name], b[name])
    )


def measure(name: str, folder: Path, table: Table) -> bool:
    """Add the rows of one backbone; True if everything is as it should be."""
    passed = True
    paths = {"official": write_official(name, folder / f"{name}_{FILES['official']}")}
    for target in ("mm", "hf", "timm"):
        paths[target] = folder / f"{name}_{FILES[target]}"
        convert_checkpoint(paths["official"], paths[target], to=target)
    for start in FILES:
        for via in (target for target in FILES if target != start):
            with tempfile.TemporaryDirectory(dir=folder) as place:
                there, back = Path(place, FILES[via]), Path(place, f"back_{FILES[start]}")
                report = convert_checkpoint(paths[start], there, to=via)
                convert_checkpoint(there, back, to=start, compare=False)
                changed = differing(paths[start], back)
            lost = [key for key in changed if "mask_token" not in key or via != "timm"]
            passed &= not lost and len(report.differences) == 2
            values = [f"{value:.1e}" for value in report.differences.values()]
            effect = "-" if report.periods_effect is None else f"{report.periods_effect:.1e}"
            table.add_row(name, start, via, *values, effect, ", ".join(changed) or "none")
    return passed


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--names", nargs="+", choices=ZOO, default=NAMES)
    names = parser.parse_args(argv).names
    logging.disable(logging.INFO)
    torch.manual_seed(0)
    table = Table(title="largest difference over the largest value")
    for column in (
        "backbone",
        "from",
        "to",
        "CLS",
        "patches",
        "rounded periods",
        "lost there and back",
    ):
        table.add_column(column)
    with tempfile.TemporaryDirectory() as folder:
        passed = [measure(name, Path(folder), table) for name in names]
    Console(width=140).print(table)
    if not all(passed):
        sys.exit("tensors were lost, or a library is missing")


if __name__ == "__main__":
    main()
