"""Training steps of a linear head from images and from cached features of a frozen ViT-S/16.

    python benchmarks/feature_cache.py [--images 256] [--pairs 15] [--batch-size 32] [--threads 1]
        [--dtype fp32] [--out results.json]

Both are ``configs/classification/linear_vits16_folder.py`` with the pipeline of validation (decode,
resize to 256, centre crop of 224), on the same JPEGs (500 x 375, in a temporary folder), with the
loader in the training process. A step is: load a batch, preprocess, forward, backward, update.
Printed are the median times of a step, the median of the ratios of alternated steps, and after how
many epochs the cache has paid for its computation.
"""

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from data_pipeline import make_images, to_jpeg
from forward_cells import hardware
from mmengine.config import Config

import dinov3_mm
from dinov3_mm.engine import build_runner
from dinov3_mm.engine.config.host import set_data_root
from dinov3_mm.engine.feature_cache import use_feature_cache

CONFIG = Path(__file__).parent.parent / "configs/classification/linear_vits16_folder.py"
TARGET = 10.0


def write_folder(folder: Path, count: int) -> None:
    """JPEGs in two classes, for training and validation."""
    for index, image in enumerate(make_images(count)):
        for split in ("train", "val"):
            path = folder / split / f"class{index % 2}" / f"{index:05d}.jpg"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(to_jpeg(image))


def config(data: Path, weights: Path, work_dir: Path, batch_size: int) -> Config:
    """The config with the steps of validation, on the files."""
    cfg = Config.fromfile(CONFIG)
    set_data_root(cfg, str(data))
    cfg.model.backbone.init_cfg.checkpoint = str(weights)
    cfg.train_dataloader.dataset.pipeline = cfg.val_dataloader.dataset.pipeline
    cfg.train_dataloader.update(batch_size=batch_size, num_workers=0, persistent_workers=False)
    cfg.val_dataloader = cfg.val_cfg = cfg.val_evaluator = None
    cfg.test_dataloader = cfg.test_cfg = cfg.test_evaluator = None
    cfg.work_dir, cfg.randomness = str(work_dir), dict(seed=0)
    return cfg


def stepper(cfg: Config) -> Callable[[], float]:
    """A function that makes one training step and returns its seconds."""
    runner = build_runner(cfg)
    loop = runner.build_train_loop(cfg.train_cfg)
    runner.optim_wrapper = runner.build_optim_wrapper(runner.optim_wrapper)
    runner.model.init_weights()
    runner._train_loop = loop
    runner.call_hook("before_run")
    runner.model.train()
    batches = iter(loop.dataloader)

    def step() -> float:
        nonlocal batches
        start = time.perf_counter()
        batch = next(batches, None)
        if batch is None:
            batches = iter(loop.dataloader)
            batch = next(batches)
        runner.model.train_step(batch, runner.optim_wrapper)
        return time.perf_counter() - start

    return step


def parse_args() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=int, default=256)
    parser.add_argument("--pairs", type=int, default=15)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--dtype", choices=("fp32", "bf16"), default="fp32")
    parser.add_argument("--out", type=Path, help="write the figures as JSON")
    return parser.parse_args()


def main() -> None:
    """Run the benchmark."""
    args = parse_args()
    torch.set_num_threads(args.threads)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_folder(folder / "data", args.images)
        backbone = dinov3_mm.build_backbone("dinov3_vits16")
        weights = dinov3_mm.export_backbone(backbone, folder / "vits16.safetensors")
        plain = config(folder / "data", weights, folder / "images", args.batch_size)
        cached = config(folder / "data", weights, folder / "cached", args.batch_size)
        start = time.perf_counter()
        use_feature_cache(cached, str(folder / "cache"), args.dtype)
        computing = time.perf_counter() - start
        steps = {"images": stepper(plain), "cache": stepper(cached)}
        for step in steps.values():  # the first step allocates
            step()
        pairs = [(steps["images"](), steps["cache"]()) for _ in range(args.pairs)]
    medians = [statistics.median(times) for times in zip(*pairs)]
    ratio = statistics.median(slow / fast for slow, fast in pairs)
    steps_an_epoch = args.images / args.batch_size
    epochs = computing / (steps_an_epoch * (medians[0] - medians[1]))
    figures = {
        "images_ms": 1e3 * medians[0],
        "cache_ms": 1e3 * medians[1],
        "speed_up": ratio,
        "computing_s": computing,
        "epochs_to_pay": epochs,
    }
    for key, value in figures.items():
        print(f"{key:>14}: {value:.2f}")
    print(f"{'aim':>14}: {TARGET}")
    if args.out:
        record = {"figures": figures, "options": vars(args) | {"out": None}, **hardware("cpu")}
        args.out.write_text(json.dumps(record, indent=2, default=str) + "\n")


if __name__ == "__main__":
    main()
