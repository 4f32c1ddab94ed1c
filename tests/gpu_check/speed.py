"""Speed and memory on the device: the recipe's step, memory against the plan, extraction, k-NN."""

import gc
import logging
import tempfile
from importlib.util import find_spec
from pathlib import Path

import torch
from mmengine.config import Config
from mmengine.logging import MMLogger

from dinov3_mm.evaluation.knn import knn_scores, nearest_neighbours
from tests.acceptance.plan_vs_measured import BAR as MEMORY_BAR
from tests.acceptance.plan_vs_measured import compare_case, predicted
from tests.golden import assert_parity, load_golden
from tests.gpu_check.check import GIB, ROOT, Check, Skip, exact_products

RECIPE = ROOT / "configs/dinov3/vitl_im1k.py"
# Most valuable first: what does not fit into the time is what can be missed.
VARIANTS = ("plain", "compile", "compile-fp8", "compile-selective", "compile-varlen")
# Of the memory, what the plan's prediction may take: kernels, caches and its own error.
SHARE_OF_MEMORY = 0.75
LARGEST_BATCH = 64
IMAGENET = 1_281_167
# On a CPU the recipe shrinks to what runs in seconds.
TINY = (
    "model.backbone.arch=small",
    "model.dino_head.num_prototypes=512",
    "model.ibot_head.num_prototypes=512",
    "train_dataloader.transform.global_size=32",
    "train_dataloader.transform.local_size=16",
)


def recipe_step(check: Check) -> None:
    """``benchmarks/recipe_step.py`` on the ViT-L recipe, a variant at a time."""
    fitting = _largest_batch(check)
    batch = fitting if check.on_gpu else 2
    check.note("images in a step", batch)
    flops = None
    for variant in VARIANTS if check.on_gpu else ("plain", "compile-selective"):
        with check.part(variant):
            if "compile" in variant:
                check.require_compiler()
            if "fp8" in variant and torch.cuda.get_device_capability() < (8, 9):
                raise Skip("this GPU has no float8 products")
            found = _run_variant(variant, batch, check)
            flops = flops or found["tflop_per_step"]
            check.note(f"{variant}: images", found["img_per_s"], "per s")
            check.note(f"{variant}: step", found["milliseconds"], "ms")
            check.note(f"{variant}: peak memory", found["memory_gib"], "GiB")
            if flops:
                rate = flops / found["milliseconds"] * 1e3
                check.note(f"{variant}: rate", rate, "TFLOP/s")
                check.note(
                    f"{variant}: share of a large bf16 product",
                    rate / found["peak_tflop_per_s"],
                )


def _run_variant(variant: str, batch: int, check: Check) -> dict:
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "result.json"
        command = [str(ROOT / "benchmarks/recipe_step.py"), "--variants", variant]
        command += ["--config", str(RECIPE), "--batch", str(batch), "--out", str(out)]
        command += ["--device", check.device.type, "--steps", "10" if check.on_gpu else "1"]
        command += [] if check.on_gpu else ["--peak-size", "256", "--options", *TINY]
        report = check.json_of(command, out)
    if not report["variants"]:
        raise RuntimeError(report["did_not_run"][variant])
    return report["variants"][0]


def _largest_batch(check: Check) -> int:
    """Images of a step whose predicted memory fits the card, a multiple of 8 from 8 on."""
    peaks = []
    for images in (2, 4):
        cfg = Config.fromfile(RECIPE)
        cfg.strategy = dict(type="PretrainStrategy")
        cfg.train_cfg.global_batch_size = images
        peaks.append(max(predicted(cfg, 1, on_gpu=True)))
    slope = (peaks[1] - peaks[0]) / 2
    room = SHARE_OF_MEMORY * check.memory_gib * GIB - (peaks[0] - 2 * slope)
    images = int(room / slope)
    return max(2, min(LARGEST_BATCH, images // 8 * 8 or images // 2 * 2))


def memory_vs_plan(check: Check) -> None:
    """Peak of a step against ``tools/plan.py`` and the dry run."""
    MMLogger.get_current_instance().setLevel(logging.WARNING)
    large = "large" if check.is_large else "base"
    cases = [("base", 16, "plain"), ("base", 16, "selective"), (large, 8, "65,536 prototypes")]
    for arch, images, option in cases if check.on_gpu else [("small", 2, "plain")]:
        dtype = "bf16" if check.on_gpu else "fp32"
        name = f"ViT {arch}, {dtype}, {images} images, {option}"
        with check.part(name):
            gc.collect()
            cell = compare_case(arch, dtype, images, option)
            real = cell["measured_bytes"]
            check.note(f"{name}: measured", real / 2**20, "MiB")
            for what in ("predicted", "dry_run"):
                off = abs(cell[f"{what}_bytes"] / real - 1)
                check.at_most(f"{name}: {what.replace('_', ' ')}, off measured", off, MEMORY_BAR)


def extraction(check: Check) -> None:
    """``benchmarks/extraction.py``: images per second from JPEGs, beside transformers and timm."""
    peers = [name for name in ("transformers", "timm") if find_spec(name)]
    for name in {"transformers", "timm"} - set(peers):
        check.skip_part(f"{name} is not installed")
    for dtype in ("bf16", "fp32"):
        with check.part(dtype), tempfile.TemporaryDirectory() as folder:
            out = Path(folder) / "result.json"
            command = [str(ROOT / "benchmarks/extraction.py"), "--dtype", dtype]
            command += ["--device", check.device.type, "--out", str(out), "--peers", *peers]
            sizes = ("256", "3", "64") if check.on_gpu else ("4", "1", "4")
            command += ["--images", sizes[0], "--pairs", sizes[1], "--batch-size", sizes[2]]
            command += [] if check.on_gpu else ["--size", "64", "--workers", "0"]
            report = check.json_of(command, out)
            for name, rate in report["images_per_s"].items():
                check.note(f"{dtype}: {name}", rate, "images/s")
            # Peers resize a little differently, which shows more in small images.
            for name, cosine in report["lowest_cosine"].items():
                check.at_least(f"{dtype}: lowest cosine of CLS to {name}", cosine, 0.95)


def knn(check: Check) -> None:
    """Votes of the reference vectors, and neighbours of the CPU at the size of ImageNet."""
    exact_products()
    description, tensors = load_golden("heads_knn")
    tensors = {name: tensor.to(check.device) for name, tensor in tensors.items()}
    scores = knn_scores(
        tensors["in.train"],
        tensors["in.labels"],
        tensors["in.test"],
        ks=description["ks"],
        num_classes=description["num_classes"],
        temperature=description["T"],
        normalize=False,
    )
    worst = max(assert_parity(scores[k], tensors[f"out.probs_k{k}"]) for k in scores)
    check.holds("golden heads_knn", worst, "<= 1e-05 x max(1, largest value)", True)
    references, queries, dims = (IMAGENET, 4096, 1024) if check.on_gpu else (4096, 64, 32)
    if check.on_gpu and not check.is_large:
        references = 400_000
    generator = torch.Generator(check.device).manual_seed(0)
    bank = torch.randn(references, dims, device=check.device, generator=generator)
    asked = torch.randn(queries, dims, device=check.device, generator=generator)
    few = asked[:32]
    part = bank[: references // 4]
    expected = nearest_neighbours(few.cpu(), part.cpu(), 10)
    actual = nearest_neighbours(few, part, 10)
    worst = (actual[0].cpu() - expected[0]).abs().max().item()
    check.at_most("similarities against the CPU", worst, 1e-5)
    # Neighbours of nearly the same similarity may change places.
    same = (actual[1].cpu() == expected[1]).double().mean().item()
    check.at_least("neighbours of the CPU at the same place", same, 0.99)
    seconds = check.seconds(lambda: nearest_neighbours(asked, bank, 20), 1)
    check.note(f"{queries} queries, {references} references, {dims} features", seconds, "s")
    if references == IMAGENET:
        check.note("50,000 queries of ImageNet", seconds * 50_000 / queries, "s")
