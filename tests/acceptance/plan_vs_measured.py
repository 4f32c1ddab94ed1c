"""Predicted against measured memory of a training step: printed first, measured then.

    python -m tests.acceptance.plan_vs_measured [--arch small base] [--images 2] [--quick]
        [--out results.json]

Measured on real tensors: on the CPU the fullest moment of torch's allocator in a second step, from
the profiler's record of every allocation; on a GPU ``torch.cuda.max_memory_allocated``. The fake
step of the dry run stands beside. Aim: the prediction is within 10 %.

    python -m tests.acceptance.plan_vs_measured --fake CONFIG --gpus 8 64 256

compares the prediction with the fake step, for a config that needs more GPUs than there are.
"""

import argparse
import itertools
import json
import logging
import platform

import torch
from mmengine.config import Config
from mmengine.logging import MMLogger
from mmengine.optim import build_optim_wrapper
from mmengine.registry import MODELS

from dinov3_mm.checkpoints import atomic_write
from dinov3_mm.engine.dry_run import dry_run
from dinov3_mm.engine.dry_run.batches import crop_sets, make_batch
from dinov3_mm.engine.dry_run.config import needs_process_group, settle_config
from dinov3_mm.engine.dry_run.fake_world import fake_ranks
from dinov3_mm.engine.plan import own_peaks
from tests.engine.dry_run.real_step import measured_peak

BAR = 0.1
MIB = 2**20
IMAGES = 100_000  # of a data set that nobody reads

# Path and value of what differs from the plain step.
OPTIONS = {
    "plain": {},
    "selective": {"model.backbone.with_cp": "selective"},
    "everything recomputed": {"model.backbone.with_cp": True},
    "65,536 prototypes": {
        "model.dino_head.num_prototypes": 65536,
        "model.ibot_head.num_prototypes": 65536,
    },
    "65,536 prototypes in chunks": {
        "model.dino_head.num_prototypes": 65536,
        "model.ibot_head.num_prototypes": 65536,
        "model.prototype_chunk_size": 8192,
    },
    "stochastic depth": {"model.backbone.drop_path_rate": 0.3},
}


def step_config(arch: str, dtype: str, images: int, option: str) -> Config:
    """The ImageNet crops on one process."""
    cfg = Config.fromfile("configs/_base_/continue.py")
    head = {"num_prototypes": 4096}
    cfg.merge_from_dict(
        {
            "model.backbone": {"arch": arch, "init_cfg": None},
            "model.compute_dtype": dtype,
            "model.dino_head": head,
            "model.ibot_head": head,
            "train_cfg.global_batch_size": images,
            **OPTIONS[option],
        }
    )
    return cfg


def predicted(cfg: Config, world_size: int, *, on_gpu: bool) -> list[int]:
    """The plan's peak for every set of crop sizes."""
    with fake_ranks(world_size if needs_process_group(cfg, world_size) else None):
        settle_config(cfg, world_size, num_images=IMAGES)
        return own_peaks(cfg, world_size, on_gpu=on_gpu)


def measured_on_gpu(cfg: Config) -> int:
    """Most bytes of tensors on the GPU in a second step."""
    settle_config(cfg, 1, num_images=IMAGES)
    (crops,) = crop_sets(cfg, 1)
    model = MODELS.build(cfg.model)
    model.init_weights()
    model = model.cuda().train()
    wrapper = build_optim_wrapper(model, cfg.optim_wrapper)
    batch = make_batch(cfg, crops, channels=3)
    for _ in range(2):
        torch.cuda.reset_peak_memory_stats()
        model.set_step(teacher_temp=0.07)
        model.train_step(batch, wrapper)
        model.update_teacher(torch.where(wrapper.step_skipped, 1.0, 0.99))
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated()


def compare_real(archs: list[str], images: int, quick: bool) -> list[dict]:
    """One process, every option: predicted and measured bytes of each."""
    cases = list(itertools.product(archs, ("fp32", "bf16"), OPTIONS))
    cases = cases[:2] if quick else cases
    return [compare_case(arch, dtype, images, option) for arch, dtype, option in cases]


def compare_case(arch: str, dtype: str, images: int, option: str) -> dict:
    """Predicted, dry and measured bytes of a step of one process, on the GPU where there is one."""
    on_gpu = torch.cuda.is_available()
    cfg = step_config(arch, dtype, images, option)
    (plan,) = predicted(cfg, 1, on_gpu=on_gpu)
    fake = dry_run(step_config(arch, dtype, images, option), 1, num_images=IMAGES, on_gpu=on_gpu)
    name = f"ViT {arch}, {dtype}, {images} images, {option}"
    print(f"{name}: predicted {plan / MIB:.1f} MiB", end="", flush=True)
    cfg = step_config(arch, dtype, images, option)
    real = measured_on_gpu(cfg) if on_gpu else measured_peak(cfg)
    (step,) = fake.steps
    print(
        f", measured {real / MIB:.1f} MiB: {plan / real - 1:+.1%} (dry run "
        f"{step.peak.total / real - 1:+.2%})",
        flush=True,
    )
    return {
        "arch": arch,
        "dtype": dtype,
        "images": images,
        "option": option,
        "predicted_bytes": plan,
        "measured_bytes": real,
        "dry_run_bytes": step.peak.total,
        "predicted_over_measured": plan / real,
    }


def compare_fake(path: str, gpus: list[int]) -> list[dict]:
    """A config on any number of GPUs against its fake step."""
    cells = []
    for count in gpus:
        plans = predicted(Config.fromfile(path), count, on_gpu=True)
        report = dry_run(Config.fromfile(path), count, num_images=IMAGES)
        for plan, step in zip(plans, report.steps, strict=True):
            found = step.peak.total
            print(
                f"{path}, {count} GPUs, {step.crops}: predicted {plan / 2**30:.2f} GiB, dry run "
                f"{found / 2**30:.2f} GiB: {plan / found - 1:+.1%}",
                flush=True,
            )
            cells.append(
                {
                    "config": path,
                    "gpus": count,
                    "crops": str(step.crops),
                    "predicted_bytes": plan,
                    "dry_run_bytes": found,
                    "predicted_over_dry_run": plan / found,
                }
            )
    return cells


def passes(cell: dict) -> bool:
    """Whether the prediction is within the bar."""
    ratio = cell.get("predicted_over_measured") or cell["predicted_over_dry_run"]
    return abs(ratio - 1) <= BAR


def save(path: str, cells: list[dict]) -> None:
    """Write the cells with what they were measured on."""
    on_gpu = torch.cuda.is_available()
    machine = {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "device": torch.cuda.get_device_name() if on_gpu else "cpu",
        "account": "torch.cuda.max_memory_allocated" if on_gpu else "torch.profiler",
    }
    with atomic_write(path) as partial:
        partial.write_text(json.dumps({"machine": machine, "cells": cells}, indent=2) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--arch", nargs="+", default=["small", "base"])
    parser.add_argument("--images", type=int, default=2)
    parser.add_argument("--quick", action="store_true", help="the first two cases only")
    parser.add_argument("--fake", metavar="CONFIG")
    parser.add_argument("--gpus", type=int, nargs="+", default=[8])
    parser.add_argument("--out", metavar="FILE", help="JSON file of the figures")
    arguments = parser.parse_args()
    MMLogger.get_current_instance().setLevel(logging.WARNING)
    if arguments.fake:
        cells = compare_fake(arguments.fake, arguments.gpus)
    else:
        cells = compare_real(arguments.arch, arguments.images, arguments.quick)
    if arguments.out:
        save(arguments.out, cells)
    raise SystemExit(not all(map(passes, cells)))


if __name__ == "__main__":
    main()
