"""Peak memory of training a ViT adapter on a frozen ViT-S/16, against a ViT that trains with it.

    python benchmarks/adapter_memory.py [--arch small] [--size 448] [--images 2] [--threads 1]
        [--out results.json]

A step is forward, mean of the squared outputs, backward and AdamW. Measured is the second step: on
the CPU the fullest moment of torch's allocator, from the profiler's record of every allocation; on
a GPU ``torch.cuda.max_memory_allocated``. Model, gradients and moments count. The ratios are those
to the ViT that trains.
"""

import argparse
import gc
import json
import os
import platform
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile, record_function

from dinov3_mm.checkpoints import atomic_write
from dinov3_mm.models.adapters.vit_adapter import DINOv3ViTAdapter
from dinov3_mm.models.backbones import DINOv3ViT

MIB = 2**20
MEASURED = "measured step"
# Arguments of the ViT and of the adapter.
CASES = {
    "ViT trains": ({"frozen_stages": -1}, {}),
    "ViT trains, recomputed": ({"frozen_stages": -1, "with_cp": True}, {"with_cp": True}),
    "frozen": ({}, {}),
    "frozen, extractors recomputed": ({}, {"with_cp": True}),
}


def build(arch: str, backbone: dict, adapter: dict, device: str) -> DINOv3ViTAdapter:
    """An adapter over four layers of a ViT, frozen unless ``backbone`` says otherwise."""
    layers = DINOv3ViT.arch_zoo[arch]["num_layers"]
    dims = DINOv3ViT.arch_zoo[arch]["embed_dims"]
    model = DINOv3ViTAdapter(
        {"type": "DINOv3ViT", "arch": arch, "frozen_stages": layers, **backbone},
        interaction_indexes=[i * layers // 4 - 1 for i in range(1, 5)],
        num_heads=dims // 64,
        **adapter,
    )
    torch.manual_seed(0)
    model.init_weights()
    return model.to(device).train()


def peak(arch: str, case: str, size: int, images: int) -> int:
    """Bytes at the fullest moment of a second training step."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    gc.collect()
    settings = dict(activities=[ProfilerActivity.CPU], profile_memory=True, acc_events=True)
    with profile(**settings) as recorded:
        model = build(arch, *CASES[case], device)
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        optimizer = torch.optim.AdamW(trained, lr=1e-4)
        batch = torch.randn(images, 3, size, size, device=device)
        for name in ("first step", MEASURED):
            if device == "cuda":
                torch.cuda.reset_peak_memory_stats()
            with record_function(name):
                optimizer.zero_grad()
                sum((output**2).mean() for output in model(batch)).backward()
                optimizer.step()
    return torch.cuda.max_memory_allocated() if device == "cuda" else _fullest(recorded)


def _fullest(recorded: profile) -> int:
    events = recorded.profiler.kineto_results.events()
    step = next(event for event in events if event.name() == MEASURED)
    changes = [(e.start_ns(), e.nbytes()) for e in events if e.name() == "[memory]"]
    total = highest = 0
    for moment, size in sorted(changes, key=lambda change: change[0]):
        total += size
        if step.start_ns() <= moment <= step.end_ns():
            highest = max(highest, total)
    return highest


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--arch", default="small", choices=sorted(DINOv3ViT.arch_zoo))
    parser.add_argument("--size", type=int, default=448)
    parser.add_argument("--images", type=int, default=2)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    bytes_of = {}
    for case in CASES:
        bytes_of[case] = peak(args.arch, case, args.size, args.images)
        ratio = bytes_of[case] / bytes_of["ViT trains"]
        print(f"{case:32s} {bytes_of[case] / MIB:8.0f} MiB  {ratio:5.2f}", flush=True)
    if args.out:
        result = {
            "arch": args.arch,
            "size": args.size,
            "images": args.images,
            "torch": torch.__version__,
            "machine": f"{platform.machine()}, {os.cpu_count()} cores",
            "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
            "peak_mib": {case: round(size / MIB, 1) for case, size in bytes_of.items()},
        }
        with atomic_write(args.out) as partial:
            Path(partial).write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
