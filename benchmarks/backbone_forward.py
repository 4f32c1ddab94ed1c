"""Inference speed of DINOv3ViT against the same model in transformers and timm.

    python benchmarks/backbone_forward.py [--archs small base] [--sizes 224 512] [--batches 1 8]
        [--dtypes fp32 bf16] [--pairs 15] [--threads N] [--device cpu] [--out results.json]

Every cell runs the three models in turn, on the same images and with the same weights: eval mode,
inference mode, no compilation, the peers with torch's fused attention. For bf16 each model is cast
as a whole. Printed are the median times, the largest difference of the normed tokens, and the
median over the rounds of (time of the better peer) / (our time); at the end the geometric mean of
the cells.
"""

import argparse
import json
import math
import os
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import timm
import torch
import transformers
from torch import Tensor, nn
from transformers import DINOv3ViTConfig, DINOv3ViTModel

from dinov3_mm.checkpoints import to_hf, to_timm
from dinov3_mm.models.backbones import DINOv3ViT

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
Forward = Callable[[Tensor], Tensor]


def build_ours(arch: str) -> DINOv3ViT:
    """Our model with the weights of an initialisation, and LayerScale and biases made visible."""
    model = DINOv3ViT(arch=arch).eval()
    model.init_weights()
    for name, parameter in model.named_parameters():
        if name.endswith("gamma"):
            nn.init.uniform_(parameter, 0.5, 1.5)
        elif name.endswith("bias") and "qkv" not in name:
            nn.init.normal_(parameter, std=0.1)
    return model


def build_transformers(ours: DINOv3ViT) -> nn.Module:
    """transformers' model with our weights and its fused attention."""
    ffn = ours.blocks[0].mlp
    gated = hasattr(ffn, "w1")
    config = DINOv3ViTConfig(
        hidden_size=ours.embed_dims,
        num_hidden_layers=ours.num_layers,
        num_attention_heads=ours.num_heads,
        intermediate_size=(ffn.w1 if gated else ffn.fc1).out_features,
        use_gated_mlp=gated,
        hidden_act="silu" if gated else "gelu",
        num_register_tokens=ours.num_registers,
        attn_implementation="sdpa",
    )
    state = to_hf(ours.state_dict())
    return DINOv3ViTModel.from_pretrained(None, config=config, state_dict=state).eval()


def build_timm(ours: DINOv3ViT, arch: str) -> nn.Module:
    """timm's model with our weights; without the qkv bias, as timm publishes it."""
    peer = timm.create_model(f"vit_{arch}_patch16_dinov3")
    peer.load_state_dict(to_timm(ours.state_dict(), qkv_bias=False))
    return peer.eval()


def build_models(arch: str, dtype: torch.dtype, device: str) -> dict[str, Forward]:
    """A function for each implementation that returns all normed tokens (B, 1 + R + N, D)."""
    ours = build_ours(arch)
    models = {
        "ours": ours,
        "transformers": build_transformers(ours),
        "timm": build_timm(ours, arch),
    }
    for model in models.values():
        model.to(device, dtype)
    return {
        "ours": models["ours"].forward_tokens,
        "transformers": lambda x: models["transformers"](x).last_hidden_state,
        "timm": models["timm"].forward_features,
    }


def difference(forwards: dict[str, Forward], images: Tensor) -> dict[str, float]:
    """Largest absolute difference of the normed tokens to ours."""
    output = forwards["ours"](images)
    tokens = torch.cat((output.cls[:, None], output.registers, output.patches), dim=1)
    return {
        name: (forward(images) - tokens).abs().max().item()
        for name, forward in forwards.items()
        if name != "ours"
    }


def timed(forward: Forward, images: Tensor) -> float:
    """Seconds of one call."""
    start = time.perf_counter()
    forward(images)
    if images.is_cuda:
        torch.cuda.synchronize()
    return time.perf_counter() - start


def measure(forwards: dict[str, Forward], images: Tensor, pairs: int) -> dict:
    """Alternate the models ``pairs`` times, each round starting with another one."""
    names = list(forwards)
    times: dict[str, list[float]] = {name: [] for name in names}
    differences = difference(forwards, images)  # also warms up
    for index in range(pairs):
        shift = index % len(names)
        for name in names[shift:] + names[:shift]:
            times[name].append(timed(forwards[name], images))
    medians = {name: statistics.median(values) for name, values in times.items()}
    better = min((name for name in names if name != "ours"), key=medians.get)
    ratios = [theirs / ours for theirs, ours in zip(times[better], times["ours"])]
    return {
        "milliseconds": {name: 1e3 * value for name, value in medians.items()},
        "better_peer": better,
        "ratio": statistics.median(ratios),
        "difference": differences,
    }


def run(args: argparse.Namespace) -> list[dict]:
    """Measure and print every cell."""
    results = []
    for arch in args.archs:
        for dtype in args.dtypes:
            torch.manual_seed(0)
            forwards = build_models(arch, DTYPES[dtype], args.device)
            for size in args.sizes:
                for batch in args.batches:
                    images = torch.randn(batch, 3, size, size).to(args.device, DTYPES[dtype])
                    cell = {"arch": arch, "dtype": dtype, "size": size, "batch": batch}
                    cell |= measure(forwards, images, args.pairs)
                    results.append(cell)
                    print_cell(cell)
    return results


def print_cell(cell: dict) -> None:
    """One line of the table."""
    times = "  ".join(f"{name} {ms:8.1f} ms" for name, ms in cell["milliseconds"].items())
    worst = max(cell["difference"].values())
    print(
        f"ViT-{cell['arch']:6} {cell['dtype']} {cell['size']} px batch {cell['batch']}:  {times}  "
        f"difference {worst:.1e}  ratio to {cell['better_peer']} {cell['ratio']:.2f}",
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
        "transformers": transformers.__version__,
        "timm": timm.__version__,
    }


def parse_args() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--archs", nargs="+", default=["small", "base"])
    parser.add_argument("--sizes", nargs="+", type=int, default=[224, 512])
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 8])
    parser.add_argument("--dtypes", nargs="+", default=["fp32", "bf16"], choices=DTYPES)
    parser.add_argument("--pairs", type=int, default=15)
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--out", type=Path, help="write the figures as JSON")
    return parser.parse_args()


def main() -> None:
    """Run the benchmark."""
    args = parse_args()
    torch.set_num_threads(args.threads)
    setting = hardware(args.device)
    print(setting)
    with torch.inference_mode():
        results = run(args)
    mean = math.exp(statistics.fmean(math.log(cell["ratio"]) for cell in results))
    print(f"geometric mean {mean:.3f}, lowest {min(cell['ratio'] for cell in results):.3f}")
    if args.out:
        report = {"setting": setting, "pairs": args.pairs, "geometric_mean": mean, "cells": results}
        args.out.write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
