"""Speed and memory of a pretraining step, against the matrix-product peak of the same machine.

    python benchmarks/train_step.py [--models quickstart vit_small] [--dtypes fp32 bf16]
        [--steps 15] [--threads 2] [--device cpu] [--out results.json] [--profile]

Each cell runs in its own process. A step is what training does: preprocessing, teacher, student,
losses, backward, clipping, AdamW, teacher update. After each step a matrix product of the same
dtype and with the same threads is timed; the share of peak is the median of the paired ratios.
FLOPs are those of the matrix products, convolutions and attention of the step as torch counts them.
Then the step is run from the data loader, and the share of the time spent waiting for data is
printed. ``--profile`` lists where the time goes, operator by operator.
"""

import argparse
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch
from mmengine.config import Config
from mmengine.optim import build_optim_wrapper
from mmengine.registry import MODELS
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import (
    FlopCounterMode,
    sdpa_backward_flop_count,
    sdpa_flop_count,
)

import dinov3_mm  # noqa: F401  (registers what configs name)
from dinov3_mm.datasets import build_pretrain_dataloader
from dinov3_mm.engine.config import fill_defaults

ROOT = Path(__file__).parents[1]
QUICKSTART = ROOT / "configs" / "quickstart" / "scenes_pretrain.py"
PEAK_SIZE = 2048
GEMM_OPS = (
    "mm",
    "addmm",
    "bmm",
    "baddbmm",
    "convolution",
    "linear",
    "scaled_dot_product",
    "mkldnn",
)


# Attention on the CPU, which torch's counter does not know.
CPU_ATTENTION = {
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: (
        lambda query, key, value, *_, **__: sdpa_flop_count(query, key, value)
    ),
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: (
        lambda grad, query, key, value, *_, **__: sdpa_backward_flop_count(grad, query, key, value)
    ),
}


def vit_small() -> Config:
    """ViT-S/16, 2 x 224 and 8 x 96 pixels, 8192 prototypes, batch 4."""
    head = {"in_dims": 384, "num_prototypes": 8192, "hidden_dims": 2048, "bottleneck_dims": 256}
    return Config(
        {
            "model": {
                "type": "DINOv3",
                "backbone": {"type": "DINOv3ViT", "arch": "small"},
                "dino_head": {"type": "DINOv3Head", **head},
                "ibot_head": {"type": "DINOv3Head", **head},
            },
            "train_dataloader": {
                "source": {"type": "SyntheticScenes", "length": 64, "image_size": 256},
                "transform": {"type": "MultiCrop", "global_size": 224, "local_size": 96},
            },
            "train_cfg": {"global_batch_size": 4},
            "optim_wrapper": {
                "type": "PretrainOptimWrapper",
                "constructor": "PretrainOptimConstructor",
                "optimizer": {"type": "AdamW", "lr": 1e-4},
                "paramwise_cfg": {"layerwise_decay": 0.9, "patch_embed_lr_mult": 0.2},
                "clip_grad": 3.0,
            },
        }
    )


def load_config(name: str) -> Config:
    """A built-in cell, or a pretraining config by path."""
    if name == "vit_small":
        cfg = vit_small()
    else:
        cfg = Config.fromfile(QUICKSTART if name == "quickstart" else name)
    fill_defaults(cfg)
    return cfg


class Trainer:
    """A model with its optimizer and what hooks do around a step."""

    def __init__(self, cfg: Config, dtype: str, device: str):
        torch.manual_seed(0)
        self.model = MODELS.build({**cfg.model, "compute_dtype": dtype})
        self.model.init_weights()
        self.model.to(device).train()
        self.device = torch.device(device)
        self.optim_wrapper = build_optim_wrapper(self.model, cfg.optim_wrapper)
        self.batch_size = cfg.train_cfg["global_batch_size"]
        self.loader_cfg = cfg.train_dataloader

    def batches(self, count: int, num_workers: int):
        """Iterator over ``count`` collated batches."""
        loader = build_pretrain_dataloader(
            {**self.loader_cfg, "num_workers": num_workers},
            global_batch_size=self.batch_size,
            max_iters=count,
        )
        return iter(loader)

    def step(self, batch: dict) -> None:
        """One training step, finished on the device."""
        self.model.set_step(teacher_temp=0.07)
        self.model.train_step(dict(batch), self.optim_wrapper)
        self.model.update_teacher(0.99)
        self.synchronize()

    def synchronize(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()

    def count_flops(self, batch: dict) -> int:
        """FLOPs of the matrix products, convolutions and attention of a step."""
        with FlopCounterMode(display=False, custom_mapping=CPU_ATTENTION) as counter:
            self.step(batch)
        return counter.get_total_flops()


class Peak:
    """Rate of a large matrix product, FLOP/s."""

    def __init__(self, dtype: torch.dtype, device: str, size: int = PEAK_SIZE):
        self.a, self.b = (torch.randn(size, size, dtype=dtype, device=device) for _ in range(2))
        self.is_cuda = self.a.is_cuda
        self.repeats = 50 if self.is_cuda else 1
        self.measure()

    def measure(self) -> float:
        """Best of three."""
        return max(self._once() for _ in range(3))

    def _once(self) -> float:
        began = time.perf_counter()
        for _ in range(self.repeats):
            self.a @ self.b
        if self.is_cuda:
            torch.cuda.synchronize()
        return self.repeats * 2 * len(self.a) ** 3 / (time.perf_counter() - began)


def run_cell(name: str, dtype: str, args: argparse.Namespace) -> dict:
    """Measure one model in one dtype."""
    torch.set_num_threads(args.threads)
    trainer = Trainer(load_config(name), dtype, args.device)
    stored = list(trainer.batches(2, num_workers=0))
    for batch in stored:
        trainer.step(batch)
    flops = trainer.count_flops(stored[0])
    peak = Peak(torch.bfloat16 if dtype == "bf16" else torch.float32, args.device)
    seconds, peaks = [], []
    for index in range(args.steps):
        began = time.perf_counter()
        trainer.step(stored[index % 2])
        seconds.append(time.perf_counter() - began)
        peaks.append(peak.measure())
    result = {
        "model": name,
        "dtype": dtype,
        "batch_size": trainer.batch_size,
        "img_per_s": trainer.batch_size / statistics.median(seconds),
        "gflop_per_step": flops / 1e9,
        "gflop_per_s": flops / statistics.median(seconds) / 1e9,
        "peak_gflop_per_s": statistics.median(peaks) / 1e9,
        "share_of_peak": statistics.median(flops / s / p for s, p in zip(seconds, peaks)),
        "peak_memory_mb": peak_memory_mb(trainer.device),
        "data_wait": data_wait(trainer, args.steps, args.workers),
    }
    if args.profile:
        result["profile"] = profile_step(trainer, stored[0])
    return result


def peak_memory_mb(device: torch.device) -> float:
    """Largest memory of this process: allocated on the GPU, or resident on the CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def data_wait(trainer: Trainer, steps: int, workers: int) -> float:
    """Share of the time of training from the loader that is spent waiting for it."""
    batches = trainer.batches(steps + 1, workers)
    next(batches)
    waited, began = 0.0, time.perf_counter()
    for _ in range(steps):
        asked = time.perf_counter()
        batch = next(batches)
        waited += time.perf_counter() - asked
        trainer.step(batch)
    return waited / (time.perf_counter() - began)


def profile_step(trainer: Trainer, batch: dict) -> list[dict]:
    """Operators by their own time, largest first."""
    on_cuda = trainer.device.type == "cuda"
    activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * on_cuda
    with profile(activities=activities) as profiler:
        trainer.step(batch)
    key = "self_device_time_total" if on_cuda else "self_cpu_time_total"
    events = sorted(profiler.key_averages(), key=lambda e: -getattr(e, key))
    total = sum(getattr(event, key) for event in events)
    return [
        {
            "op": event.key,
            "share": getattr(event, key) / total,
            "calls": event.count,
            "is_gemm": any(op in event.key for op in GEMM_OPS),
        }
        for event in events[:25]
    ]


def print_profile(result: dict) -> None:
    rows = result["profile"]
    gemm = sum(row["share"] for row in rows if row["is_gemm"])
    print(
        f"\n{result['model']} {result['dtype']}: matrix products {gemm:.0%} of the operators' time"
    )
    for row in rows:
        mark = "*" if row["is_gemm"] else " "
        print(f"  {mark} {row['share']:6.1%}  x{row['calls']:<5} {row['op'][:80]}")


def run_in_process(name: str, dtype: str, args: argparse.Namespace) -> dict:
    """Run a cell in a process of its own, so that its peak memory is its own."""
    command = [sys.executable, __file__, "--cell", name, dtype]
    for option in ("steps", "threads", "workers", "device"):
        command += [f"--{option}", str(getattr(args, option))]
    if args.profile:
        command.append("--profile")
    print(f"{name} {dtype} ...", file=sys.stderr, flush=True)
    environment = {**os.environ, "OMP_NUM_THREADS": str(args.threads)}
    output = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(output.stdout.splitlines()[-1])


def print_table(results: list[dict]) -> None:
    print(
        f"{'model':<12} {'dtype':<5} {'batch':>5} {'img/s':>8} {'GFLOP/s':>8} {'peak':>8} "
        f"{'share':>6} {'MB':>7} {'data wait':>9}"
    )
    for r in results:
        print(
            f"{Path(r['model']).stem:<12} {r['dtype']:<5} {r['batch_size']:>5} "
            f"{r['img_per_s']:>8.2f} {r['gflop_per_s']:>8.1f} {r['peak_gflop_per_s']:>8.1f} "
            f"{r['share_of_peak']:>6.0%} {r['peak_memory_mb']:>7.0f} {r['data_wait']:>9.1%}"
        )
    rates = {(r["model"], r["dtype"]): r["img_per_s"] for r in results}
    for model in dict.fromkeys(r["model"] for r in results):
        if {(model, "fp32"), (model, "bf16")} <= rates.keys():
            ratio = rates[model, "bf16"] / rates[model, "fp32"]
            print(f"{Path(model).stem}: bf16 is {ratio:.2f} times as fast as fp32")


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="+", default=["quickstart", "vit_small"])
    parser.add_argument("--dtypes", nargs="+", default=["fp32", "bf16"], choices=["fp32", "bf16"])
    parser.add_argument("--steps", type=int, default=15)
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--workers", type=int, default=1, help="processes of the data loader")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--out", type=Path, help="write the results as JSON")
    parser.add_argument("--profile", action="store_true", help="list operators by time")
    parser.add_argument("--cell", nargs=2, metavar=("MODEL", "DTYPE"), help=argparse.SUPPRESS)
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    if args.cell:
        print(json.dumps(run_cell(*args.cell, args)))
        return
    results = [run_in_process(m, d, args) for m in args.models for d in args.dtypes]
    print_table(results)
    if args.profile:
        for result in results:
            print_profile(result)
    if args.out:
        machine = {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "processor": platform.processor() or platform.machine(),
            "threads": args.threads,
            "device": args.device,
        }
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(json.dumps({"machine": machine, "results": results}, indent=2) + "\n")


if __name__ == "__main__":
    main()
