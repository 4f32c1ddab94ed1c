"""Attention of packed crops by backend, forward and backward, on the shapes of a recipe.

    python benchmarks/attention_backends.py [--arch large] [--images 64] [--record] [--out FILE]

The self-attention of one block, from its q, k, v projection to its output, in bf16: the student's
two global and eight local crops of every image. Backends run in turn, plain and compiled, and each
pair gives a ratio to 'sdpa'; a cell is the median of 15. ``--record`` writes which one is the
fastest compiled to the file that ``attn_backend='auto'`` reads (``DINOV3_MM_ATTENTION``, by default
in the user's cache). On a CPU only 'sdpa' runs, which shows that the script does.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from dinov3_mm.models.backbones.zoo import resolve_vit_arch
from dinov3_mm.models.layers import RotaryEmbedding2D, SelfAttention
from dinov3_mm.models.layers.attention import ATTN_BACKENDS, read_record, record_path

BACKENDS = ATTN_BACKENDS[1:]
PATCH = 16


class Case:
    """Attention with one backend on packed crops."""

    def __init__(self, backend: str, is_compiled: bool, arguments: argparse.Namespace) -> None:
        settings = resolve_vit_arch(arguments.arch, {})
        dims, heads = settings["embed_dims"], settings["num_heads"]
        device = torch.device(arguments.device)
        grids = [(size // PATCH,) * 2 for size in (arguments.global_size, arguments.local_size)]
        prefix = 1 + settings["num_registers"]
        counts = (2 * arguments.images, arguments.num_local * arguments.images)
        self.shapes = [(count, prefix + h * w) for count, (h, w) in zip(counts, grids)]
        rope = RotaryEmbedding2D(dims // heads).to(device)
        self.tables = [rope(*grid) for grid in grids]
        self.attention = SelfAttention(dims, heads, backend=backend).to(device)
        tokens = sum(images * length for images, length in self.shapes)
        self.x = torch.randn(tokens, dims, device=device, dtype=torch.bfloat16, requires_grad=True)
        self.grad = torch.randn_like(self.x)
        with torch.autocast(device.type, torch.bfloat16):
            self.packing = self.attention.pack(self.x, self.shapes)
        if self.packing.backend != backend:
            raise ValueError(f"{backend} does not run on {device}")
        if is_compiled:
            self.attention.compile()

    def run(self) -> Tensor:
        """Forward and backward pass."""
        with torch.autocast(self.x.device.type, torch.bfloat16):
            output = self.attention(self.x, self.shapes, self.tables, self.packing)
        return torch.autograd.grad(output, self.x, self.grad)[0]


def seconds(function: Callable[[], object], repeats: int) -> float:
    """Time of one call, finished on the device."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    began = time.perf_counter()
    for _ in range(repeats):
        function()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return (time.perf_counter() - began) / repeats


def compare(is_compiled: bool, arguments: argparse.Namespace) -> dict[str, dict[str, float]]:
    """Milliseconds, ratio to 'sdpa' and largest relative difference of the gradient."""
    cases = {}
    for backend in BACKENDS:
        try:
            case = Case(backend, is_compiled, arguments)
            case.run()
            cases[backend] = case
        except Exception as error:  # a backend that cannot run here is a result, not an end
            print(f"{backend}: does not run here: {str(error).splitlines()[0]}", flush=True)
    with torch.no_grad():
        for case in cases.values():
            case.attention.load_state_dict(cases["sdpa"].attention.state_dict())
            case.x.copy_(cases["sdpa"].x)
            case.grad.copy_(cases["sdpa"].grad)
    expected = cases["sdpa"].run().float()
    times: dict[str, list[float]] = {name: [] for name in cases}
    for _ in range(arguments.pairs):
        for name, case in cases.items():
            times[name].append(seconds(case.run, arguments.repeats))
    return {
        name: {
            "milliseconds": 1000 * statistics.median(times[name]),
            "ratio": statistics.median(a / b for a, b in zip(times[name], times["sdpa"])),
            "difference": (
                (case.run().float() - expected).abs().max() / expected.abs().max()
            ).item(),
        }
        for name, case in cases.items()
    }


def record(results: dict[str, dict[str, float]]) -> None:
    """Write the fastest backend of this GPU to the file that 'auto' reads."""
    path, known = record_path(), read_record()
    known[torch.cuda.get_device_name()] = {
        "torch": str(torch.__version__),
        "fastest": min(results, key=lambda name: results[name]["milliseconds"]),
        "milliseconds": {name: cell["milliseconds"] for name, cell in results.items()},
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(known, indent=2) + "\n")
    print(f"recorded in {path}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--arch", default="large")
    parser.add_argument("--images", type=int, default=64)
    parser.add_argument("--num-local", type=int, default=8)
    parser.add_argument("--global-size", type=int, default=224)
    parser.add_argument("--local-size", type=int, default=96)
    parser.add_argument("--pairs", type=int, default=15)
    parser.add_argument("--repeats", type=int, default=10, help="calls that are timed together")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--record", action="store_true", help="let 'auto' take the fastest one")
    parser.add_argument("--out", type=Path, help="write the results as JSON")
    arguments = parser.parse_args()
    if arguments.record and not arguments.device.startswith("cuda"):
        parser.error("--record is for a GPU: 'auto' takes 'sdpa' on a CPU")
    results = {}
    for state in ("plain", "compiled"):
        results[state] = compare(state == "compiled", arguments)
        for name, cell in results[state].items():
            print(
                f"{state:9} {name:9} {cell['milliseconds']:9.3f} ms, {cell['ratio']:.3f} of sdpa, "
                f"gradient differs by {cell['difference']:.1e}",
                flush=True,
            )
    if arguments.record:
        record(results["compiled"])
    if arguments.out:
        on_gpu = arguments.device.startswith("cuda")
        setting = {
            "device": torch.cuda.get_device_name() if on_gpu else arguments.device,
            "torch": torch.__version__,
            **{key: getattr(arguments, key) for key in ("arch", "images", "pairs")},
        }
        arguments.out.write_text(json.dumps({"setting": setting, **results}, indent=2) + "\n")


if __name__ == "__main__":
    main()
