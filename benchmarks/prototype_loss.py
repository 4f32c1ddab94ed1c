"""Memory and time of the iBOT loss with and without whole logits, at the 7B's prototype count.

    python benchmarks/prototype_loss.py [--prototypes 262144] [--patches 256] [--out FILE]

Both run in turn in processes of their own: teacher logits, Sinkhorn, student logits, loss, gradient
of features and prototypes, fp32. The peak is what the process needs above its inputs: on CUDA by
torch's allocator, on the CPU by the operating system.
"""

import argparse
import json
import multiprocessing
import resource
import time
from pathlib import Path

import torch
import torch.nn.functional as F

from dinov3_mm.models.losses import ibot_loss, sinkhorn_knopp
from dinov3_mm.models.losses.prototypes import chunked_cross_entropy, sinkhorn_assignments

WIDTH, TEACHER_TEMP, STUDENT_TEMP = 256, 0.07, 0.1


def plain(inputs: list[torch.Tensor], weights: torch.Tensor, _: int) -> torch.Tensor:
    student, prototypes, teacher, teacher_prototypes = inputs
    targets = sinkhorn_knopp(F.linear(teacher, teacher_prototypes), TEACHER_TEMP)
    logits = F.linear(student, prototypes)
    return ibot_loss(logits, targets, weights, 1, student_temp=STUDENT_TEMP)


def chunked(inputs: list[torch.Tensor], weights: torch.Tensor, chunk_size: int) -> torch.Tensor:
    student, prototypes, teacher, teacher_prototypes = inputs
    targets = sinkhorn_assignments(teacher, teacher_prototypes, TEACHER_TEMP, chunk_size=chunk_size)
    pairs = torch.ones(1, 1, device=student.device)
    return chunked_cross_entropy(
        student[None], prototypes, targets, pairs, weights, STUDENT_TEMP, chunk_size=chunk_size
    )


def measure(name: str, arguments: argparse.Namespace, results) -> None:
    """Run one of the two in this process; put peak bytes, seconds, loss and gradient norms."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    generator = torch.Generator().manual_seed(0)
    shapes = [(arguments.patches, WIDTH), (arguments.prototypes, WIDTH)] * 2
    inputs = [
        F.normalize(torch.randn(*shape, generator=generator), dim=-1).to(device) for shape in shapes
    ]
    for tensor in inputs[:2]:
        tensor.requires_grad_()
    weights = torch.ones(arguments.patches, device=device) / arguments.patches
    before = _peak(device)
    began = time.perf_counter()
    loss = {"plain": plain, "chunked": chunked}[name](inputs, weights, arguments.chunk_size)
    grads = torch.autograd.grad(loss, inputs[:2])
    norms = [grad.norm().item() for grad in grads]
    results.put((_peak(device) - before, time.perf_counter() - began, loss.item(), norms))


def _peak(device: str) -> int:
    if device == "cuda":
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--prototypes", type=int, default=262_144)
    parser.add_argument("--patches", type=int, default=256)
    parser.add_argument("--chunk-size", type=int, default=8192)
    parser.add_argument("--out", type=Path, help="write the figures to this JSON file")
    arguments = parser.parse_args()
    context = multiprocessing.get_context("spawn")
    figures = {}
    for name in ("plain", "chunked"):
        results = context.Queue()
        process = context.Process(target=measure, args=(name, arguments, results))
        process.start()
        peak, seconds, loss, norms = results.get()
        process.join()
        figures[name] = {
            "peak_mib": round(peak / 2**20, 1),
            "seconds": round(seconds, 2),
            "loss": loss,
            "gradient_norms": norms,
        }
        print(f"{name:8} peak {peak / 2**20:8.1f} MiB, {seconds:6.2f} s, loss {loss:.6f}, {norms}")
    memory = figures["chunked"]["peak_mib"] / figures["plain"]["peak_mib"]
    duration = figures["chunked"]["seconds"] / figures["plain"]["seconds"]
    print(f"chunked / plain: memory {memory:.3f}, time {duration:.2f}")
    if arguments.out:
        figures["ratio"] = {"memory": round(memory, 3), "time": round(duration, 2)}
        figures["setting"] = {
            "prototypes": arguments.prototypes,
            "patches": arguments.patches,
            "chunk_size": arguments.chunk_size,
            "device": "cuda" if torch.cuda.is_available() else "cpu",
            "threads": torch.get_num_threads(),
            "torch": torch.__version__,
        }
        arguments.out.write_text(json.dumps(figures, indent=2) + "\n")


if __name__ == "__main__":
    main()
