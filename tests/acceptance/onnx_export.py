"""ONNX Runtime against PyTorch for whole backbones with redrawn weights.

    python -m tests.acceptance.onnx_export [--models vits16 ...] [--dtype fp32] [--opset 20]

Each backbone is exported for 224 pixels and for varying sizes (224, 512, 336x448 from one file) and
compared on rendered scenes, with every parameter redrawn, so that the outputs are a few units
large. Bar in fp32: 1e-4. With --torch the files are those of torch.export.
"""

import argparse
import tempfile
import time
from pathlib import Path

import torch

from dinov3_mm.apis.deployment import ExportMismatchError, export_onnx, export_torch
from dinov3_mm.apis.deployment.onnx_file import DEFAULT_OPSET
from dinov3_mm.checkpoints import Statistics, build_backbone
from dinov3_mm.models.backbones.zoo import ZOO
from tests.checkpoints.toys import redraw

MODELS = ("vits16", "vits16plus", "vitb16", "convnext_tiny")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--models", nargs="+", default=MODELS)
    parser.add_argument("--dtype", default="fp32", choices=("fp32", "fp16", "bf16"))
    parser.add_argument("--opset", type=int, default=DEFAULT_OPSET)
    parser.add_argument("--torch", action="store_true", help="torch.export instead of ONNX")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    passed = [run(name, dynamic, arguments) for name in arguments.models for dynamic in (0, 1)]
    raise SystemExit(not all(passed))


def run(name: str, dynamic: int, arguments: argparse.Namespace) -> bool:
    """Export one backbone, print its largest differences; whether it passed."""
    row = ZOO[f"dinov3_{name}_lvd1689m"]
    backbone = redraw(build_backbone(f"dinov3_{name}"))
    common = dict(
        statistics=Statistics(row.mean, row.std),
        dynamic=bool(dynamic),
        dtype=arguments.dtype,
        outputs=("cls", "patches"),
    )
    start = time.perf_counter()
    title = f"{name}, {arguments.dtype}, {'varying sizes' if dynamic else '224'}"
    with tempfile.TemporaryDirectory() as folder:
        try:
            if arguments.torch:
                report = export_torch(backbone, Path(folder, f"{name}.pt2"), **common)
            else:
                path = Path(folder, f"{name}.onnx")
                report = export_onnx(backbone, path, opset=arguments.opset, **common)
        except (ExportMismatchError, RuntimeError) as error:
            print(f"{title}: FAILED, {error}", flush=True)
            return False
        size = report.path.stat().st_size / 1e6
    print(f"{title}: {size:.1f} MB, {time.perf_counter() - start:.0f} s", flush=True)
    for d in report.differences:
        print(
            f"  {d.output:8s} {'x'.join(map(str, d.images)):14s} max difference {d.max_abs:.2e}, "
            f"largest value {d.max_expected:.2f}, least cosine {d.min_cosine:.7f}",
            flush=True,
        )
    return True


if __name__ == "__main__":
    main()
