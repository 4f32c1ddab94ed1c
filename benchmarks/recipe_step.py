"""Step of a recipe on one GPU: images per second, share of the peak, memory, by what is on.

    python benchmarks/recipe_step.py [--config configs/dinov3/vitl_im1k.py] [--batch 64]
        [--variants plain xformers compile ...] [--steps 20] [--out results.json]

Every variant runs in a process of its own on synthetic crops of the recipe's sizes: preprocessing,
teacher, student, losses, backward, clipping, AdamW, teacher update, in bf16. The share of the peak
divides the FLOPs of the step, as torch counts them without recomputation, by the rate of a large
bf16 matrix product on the same device. ``--options`` changes the config, e.g. for a run on the CPU:

    python benchmarks/recipe_step.py --device cpu --batch 2 --steps 2 --variants plain selective \\
        --options model.backbone.arch=tiny model.dino_head.num_prototypes=512 \\
        model.ibot_head.num_prototypes=512
"""

import argparse
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch
from mmengine.config import Config
from rich.console import Console
from rich.table import Table
from train_step import PEAK_SIZE, Peak, Trainer, peak_memory_mb

from dinov3_mm.engine import apply_options, parse_options
from dinov3_mm.engine.config import fill_defaults
from dinov3_mm.engine.strategies.ddp import compile_units, networks_of
from dinov3_mm.models.layers.fp8 import enable_fp8
from dinov3_mm.models.losses import compile_losses

ROOT = Path(__file__).parents[1]
VARIANTS = {
    "plain": {},
    "xformers": {"attn_backend": "xformers"},
    "varlen": {"attn_backend": "varlen"},
    "compile": {"compile": True},
    "compile-plain-losses": {"compile": True, "losses": False},
    "compile-xformers": {"compile": True, "attn_backend": "xformers"},
    "compile-varlen": {"compile": True, "attn_backend": "varlen"},
    "compile-chunked": {"compile": True, "prototype_chunk_size": 16384},
    "compile-fp8": {"compile": True, "fp8": True},
    "selective": {"with_cp": "selective"},
    "recompute": {"with_cp": True},
    "compile-selective": {"compile": True, "with_cp": "selective"},
    "compile-recompute": {"compile": True, "with_cp": True},
}


def load_config(arguments: argparse.Namespace, variant: dict) -> Config:
    """The recipe on synthetic images, with the options and the variant's settings."""
    cfg = Config.fromfile(arguments.config)
    apply_options(cfg, parse_options(arguments.options))
    cfg.train_cfg.global_batch_size = arguments.batch
    cfg.train_dataloader.source = dict(type="SyntheticScenes", length=256, image_size=256)
    for key in ("attn_backend", "with_cp"):
        if key in variant:
            cfg.model.backbone[key] = variant[key]
    if "prototype_chunk_size" in variant:
        cfg.model.prototype_chunk_size = variant["prototype_chunk_size"]
    fill_defaults(cfg)
    return cfg


def run_variant(name: str, arguments: argparse.Namespace) -> dict:
    """Measure one variant in this process."""
    variant = VARIANTS[name]
    trainer = Trainer(load_config(arguments, variant), "bf16", arguments.device)
    # Crops of a large batch take one process longer than the steps.
    batches = list(trainer.batches(2, num_workers=8 if trainer.device.type == "cuda" else 0))
    flops = trainer.count_flops(batches[0]) if not variant.get("with_cp") else None
    if variant.get("fp8"):
        for _, network in networks_of(trainer.model):
            enable_fp8(network.backbone)
    if variant.get("compile"):
        compile_units(trainer.model)
        compile_losses(variant.get("losses", True))
    for index in range(5):
        trainer.step(batches[index % 2])
    if trainer.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    seconds = []
    for index in range(arguments.steps):
        began = time.perf_counter()
        trainer.step(batches[index % 2])
        seconds.append(time.perf_counter() - began)
    step = statistics.median(seconds)
    memory = peak_memory_mb(trainer.device)
    peak = Peak(torch.bfloat16, arguments.device, arguments.peak_size).measure()
    return {
        "variant": name,
        "img_per_s": arguments.batch / step,
        "milliseconds": 1000 * step,
        "tflop_per_step": flops and flops / 1e12,
        "peak_tflop_per_s": peak / 1e12,
        "memory_gib": memory / 1024,
    }


def run_in_process(name: str, arguments: argparse.Namespace) -> dict:
    """Run a variant in a process of its own; its ``error`` if it cannot run here."""
    command = [sys.executable, __file__, "--variant", name, "--config", str(arguments.config)]
    for option in ("batch", "steps", "device", "peak_size"):
        command += [f"--{option.replace('_', '-')}", str(getattr(arguments, option))]
    command += ["--options", *arguments.options] if arguments.options else []
    run = subprocess.run(command, capture_output=True, text=True)
    if run.returncode:
        reason = run.stderr.strip().splitlines()[-1] if run.stderr.strip() else "no message"
        print(f"{name}: did not run: {reason}", flush=True)
        return {"variant": name, "error": reason}
    result = json.loads(run.stdout.splitlines()[-1])
    print(f"{name}: {result['img_per_s']:.1f} img/s, {result['memory_gib']:.1f} GiB", flush=True)
    return result


def print_table(results: list[dict], title: str) -> None:
    table = Table(title=title)
    for column in ("variant", "img/s", "ms", "share of peak", "GiB"):
        table.add_column(column, justify="left" if column == "variant" else "right")
    for row in results:
        table.add_row(
            row["variant"],
            f"{row['img_per_s']:.1f}",
            f"{row['milliseconds']:.1f}",
            f"{row['share_of_peak']:.1%}",
            f"{row['memory_gib']:.2f}",
        )
    Console().print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--config", default=ROOT / "configs/dinov3/vitl_im1k.py", type=Path)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--variants", nargs="+", default=list(VARIANTS), choices=VARIANTS)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument(
        "--peak-size", type=int, default=PEAK_SIZE, help="width of the product of the peak"
    )
    parser.add_argument("--options", nargs="+", default=[], help="changes of the config")
    parser.add_argument("--out", type=Path, help="write the results as JSON")
    parser.add_argument("--variant", choices=VARIANTS, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.variant:
        print(json.dumps(run_variant(arguments.variant, arguments)))
        return
    results = [run_in_process(name, arguments) for name in arguments.variants]
    failed = {result["variant"]: result["error"] for result in results if "error" in result}
    results = [result for result in results if "error" not in result]
    # Recomputation does arithmetic twice; the useful part is that of the variants without it.
    flops = next((r["tflop_per_step"] for r in results if r["tflop_per_step"]), float("nan"))
    for result in results:
        rate = flops / (result["milliseconds"] / 1000)
        result["share_of_peak"] = rate / result["peak_tflop_per_s"]
    device = torch.cuda.get_device_name() if arguments.device == "cuda" else arguments.device
    print_table(results, f"{arguments.config.stem}, batch {arguments.batch}, {device}")
    if arguments.out:
        setting = {"device": device, "torch": torch.__version__, "batch": arguments.batch}
        report = {"setting": setting, "variants": results, "did_not_run": failed}
        arguments.out.write_text(json.dumps(report, indent=2))


if __name__ == "__main__":
    main()
