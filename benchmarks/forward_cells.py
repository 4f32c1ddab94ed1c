"""What the benchmarks of inference speed share: alternated timing, the table, the command line."""

import argparse
import importlib.metadata
import json
import math
import os
import platform
import statistics
import time
from collections.abc import Callable, Iterable
from pathlib import Path

import torch
from torch import Tensor

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
Forward = Callable[[Tensor], Tensor]


def timed(forward: Forward, images: Tensor) -> float:
    """Seconds of one call."""
    start = time.perf_counter()
    forward(images)
    if images.is_cuda:
        torch.cuda.synchronize()
    return time.perf_counter() - start


def measure(forwards: dict[str, Forward], images: Tensor, pairs: int) -> dict:
    """Alternate the models ``pairs`` times, each round starting with another one.

    ``forwards`` holds ours under 'ours'; all return the same tokens. Without a peer there is no
    ratio.
    """
    names = list(forwards)
    times: dict[str, list[float]] = {name: [] for name in names}
    tokens = {name: forward(images) for name, forward in forwards.items()}  # also warms up
    for index in range(pairs):
        shift = index % len(names)
        for name in names[shift:] + names[:shift]:
            times[name].append(timed(forwards[name], images))
    medians = {name: statistics.median(values) for name, values in times.items()}
    milliseconds = {name: 1e3 * value for name, value in medians.items()}
    peers = [name for name in names if name != "ours"]
    if not peers:
        return {"milliseconds": milliseconds, "difference": {}}
    better = min(peers, key=medians.get)
    ratios = [theirs / ours for theirs, ours in zip(times[better], times["ours"])]
    return {
        "milliseconds": milliseconds,
        "better_peer": better,
        "ratio": statistics.median(ratios),
        "difference": {name: _difference(tokens[name], tokens["ours"]) for name in peers},
    }


def _difference(tokens: Tensor, expected: Tensor) -> float:
    return (tokens - expected).abs().max().item()


def print_cell(model: str, cell: dict) -> None:
    """One line of the table."""
    times = "  ".join(f"{name} {ms:8.1f} ms" for name, ms in cell["milliseconds"].items())
    worst = max(cell["difference"].values())
    print(
        f"{model}-{cell['arch']:6} {cell['dtype']} {cell['size']} px batch {cell['batch']}:  "
        f"{times}  difference {worst:.1e}  ratio to {cell['better_peer']} {cell['ratio']:.2f}",
        flush=True,
    )


def hardware(device: str) -> dict[str, str | int]:
    """Processor or accelerator and the versions that matter."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    models = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return {
        "processor": models[0] if models else platform.processor(),
        "device": torch.cuda.get_device_name() if device.startswith("cuda") else "cpu",
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        **{name: _version(name) for name in ("transformers", "timm")},
    }


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def argument_parser(description: str) -> argparse.ArgumentParser:
    """Options that do not depend on the cells."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--dtypes", nargs="+", default=["fp32", "bf16"], choices=DTYPES)
    parser.add_argument("--pairs", type=int, default=15)
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--out", type=Path, help="write the figures as JSON")
    return parser


def run_benchmark(
    args: argparse.Namespace,
    model: str,
    cells: Iterable[tuple[str, int, int]],
    build: Callable[[str, torch.dtype, str], dict[str, Forward]],
) -> None:
    """Measure, print and write every cell (arch, size, batch) in every dtype.

    ``build`` returns a function for each implementation that gives all normed tokens.
    """
    torch.set_num_threads(args.threads)
    setting = hardware(args.device)
    print(setting)
    results = []
    cells = list(cells)
    with torch.inference_mode():
        for arch in dict.fromkeys(cell[0] for cell in cells):
            for dtype in args.dtypes:
                torch.manual_seed(0)
                forwards = build(arch, DTYPES[dtype], args.device)
                for size, batch in [cell[1:] for cell in cells if cell[0] == arch]:
                    images = torch.randn(batch, 3, size, size).to(args.device, DTYPES[dtype])
                    cell = {"arch": arch, "dtype": dtype, "size": size, "batch": batch}
                    cell |= measure(forwards, images, args.pairs)
                    results.append(cell)
                    print_cell(model, cell)
    mean = math.exp(statistics.fmean(math.log(cell["ratio"]) for cell in results))
    print(f"geometric mean {mean:.3f}, lowest {min(cell['ratio'] for cell in results):.3f}")
    if args.out:
        report = {"setting": setting, "pairs": args.pairs, "geometric_mean": mean, "cells": results}
        args.out.write_text(json.dumps(report, indent=2) + "\n")
