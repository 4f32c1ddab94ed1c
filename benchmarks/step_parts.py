"""Parts of a training step beside its networks, each against the way it was done before.

    python benchmarks/step_parts.py [--arch large] [--images 64] [--prototypes 65536] [--out FILE]

Both ways run in turn, 15 pairs; a cell is the median ratio of their times and of the memory that
they take beside their inputs (on CUDA), with what counting bytes or kernels lets expect on a GPU:

    EMA: 8 passes of 4 bytes over the parameters and a temporary of their size; now 3 passes
    Sinkhorn-Knopp: 86 bytes for each logit (bf16 in, fp32 inside); compiled 54
    cross-entropy, forward and backward: 114 bytes for each logit; compiled 18
    stochastic depth: a permutation for every entry, branch and block, of 5 kernels each; now one
        draw, and a sort for each entry

An operator reads and writes its matrices once, operators that are compiled together once together;
a product with a vector reads its matrix.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from dinov3_mm.models.backbones import DINOv3ViT
from dinov3_mm.models.layers import draw_subset, draw_subsets
from dinov3_mm.models.losses import compile_losses, sinkhorn_knopp, soft_cross_entropy
from dinov3_mm.models.pretraining.student import follow

Way = Callable[[], object]
DROP_RATE = 0.3


def ema(arguments: argparse.Namespace) -> tuple[Way, Way]:
    """Teacher and student of the architecture, with a momentum on the device."""
    with torch.device(arguments.device):
        student, teacher = (DINOv3ViT(arch=arguments.arch) for _ in range(2))
        momentum = torch.full((), 0.994)
    teacher.requires_grad_(False)

    @torch.no_grad()
    def before() -> None:
        averages, values = list(teacher.parameters()), list(student.parameters())
        change = torch._foreach_sub(values, averages)
        torch._foreach_mul_(change, 1.0 - momentum)
        torch._foreach_add_(averages, change)

    return before, lambda: follow(teacher, student, momentum)


def logits_of(arguments: argparse.Namespace) -> Tensor:
    """Those of the masked patches: half of the global crops hide three tenths of 196 patches."""
    rows = int(arguments.images * 0.3 * 196)
    return torch.randn(rows, arguments.prototypes, device=arguments.device).bfloat16()


def in_pieces(run: Way, is_compiled: bool) -> Way:
    """``run`` with the losses compiled or not."""

    def way() -> object:
        compile_losses(is_compiled)
        return run()

    return way


def sinkhorn(arguments: argparse.Namespace) -> tuple[Way, Way]:
    """Assignments of the masked patches."""
    logits = logits_of(arguments)

    def run() -> Tensor:
        return sinkhorn_knopp(logits, 0.07)

    return in_pieces(run, False), in_pieces(run, True)


def cross_entropy(arguments: argparse.Namespace) -> tuple[Way, Way]:
    """IBOT loss of the masked patches and the gradient of their logits."""
    logits = logits_of(arguments)[None].requires_grad_()
    targets = torch.softmax(logits.detach().float(), -1)
    weights = torch.full((1, 1), 1.0 / logits.shape[1], device=arguments.device)

    def run() -> tuple[Tensor, ...]:
        return torch.autograd.grad(soft_cross_entropy(logits, targets, weights, 0.1), logits)

    return in_pieces(run, False), in_pieces(run, True)


def stochastic_depth(arguments: argparse.Namespace) -> tuple[Way, Way]:
    """Subsets of both branches of 24 blocks, for two global and eight local crops."""
    shapes = [(2 * arguments.images, 201), (8 * arguments.images, 41)]
    device, count = torch.device(arguments.device), 48
    return (
        lambda: [draw_subset(shapes, DROP_RATE, device) for _ in range(count)],
        lambda: draw_subsets(shapes, DROP_RATE, device, count),
    )


PARTS = {
    "ema": (ema, 0.38),
    "sinkhorn": (sinkhorn, 0.63),
    "cross-entropy": (cross_entropy, 0.16),
    "stochastic-depth": (stochastic_depth, 0.1),
}


def measure(way: Way) -> tuple[float, int]:
    """Seconds of a call, and on CUDA the bytes that it takes for a while."""
    if not torch.cuda.is_available():
        began = time.perf_counter()
        way()
        return time.perf_counter() - began, 0
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    held, began = torch.cuda.memory_allocated(), time.perf_counter()
    way()
    torch.cuda.synchronize()
    return time.perf_counter() - began, torch.cuda.max_memory_allocated() - held


def compare(name: str, arguments: argparse.Namespace) -> dict[str, float]:
    """Both ways of a part in turn."""
    build, expected = PARTS[name]
    ways = build(arguments)
    for way in (*ways, *ways):
        way()  # compiles
    rows = [[measure(way) for way in ways] for _ in range(arguments.pairs)]
    compile_losses(False)
    (_, old_bytes), (_, new_bytes) = rows[-1]
    return {
        "before_ms": 1000 * statistics.median(before[0] for before, _ in rows),
        "now_ms": 1000 * statistics.median(now[0] for _, now in rows),
        "ratio": statistics.median(now[0] / before[0] for before, now in rows),
        "expected_on_a_gpu": expected,
        "before_mib": old_bytes / 2**20,
        "now_mib": new_bytes / 2**20,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--arch", default="large")
    parser.add_argument("--images", type=int, default=64)
    parser.add_argument("--prototypes", type=int, default=65_536)
    parser.add_argument("--pairs", type=int, default=15)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--out", type=Path, help="write the results as JSON")
    arguments = parser.parse_args()
    results = {}
    for name in arguments.parts:
        cell = results[name] = compare(name, arguments)
        print(
            f"{name:16} {cell['before_ms']:9.3f} -> {cell['now_ms']:9.3f} ms: {cell['ratio']:.3f} "
            f"(a GPU: {cell['expected_on_a_gpu']} expected), {cell['before_mib']:.0f} -> "
            f"{cell['now_mib']:.0f} MiB",
            flush=True,
        )
    if arguments.out:
        on_gpu = arguments.device.startswith("cuda")
        setting = {
            "device": torch.cuda.get_device_name() if on_gpu else arguments.device,
            "torch": torch.__version__,
            **{key: getattr(arguments, key) for key in ("arch", "images", "prototypes", "pairs")},
        }
        arguments.out.write_text(
            json.dumps({"setting": setting, "parts": results}, indent=2) + "\n"
        )


if __name__ == "__main__":
    main()
