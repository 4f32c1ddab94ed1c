"""Heads with and without the feature cache on rendered scenes; its seconds; a rank that fails.

    python -m tests.acceptance.feature_cache [--weights FILE] [--iterations 60] [--images 96]
        [--jobs classification segmentation] [--seeds 1]

Trains the quickstart's heads with the random steps of the shipped configs added (crops and flips;
scales for label maps): on images, from one cached view, and from four. The scores are those of
unseen scenes. ``--weights`` is the backbone of tools/quickstart.sh; without it the toy backbone is
a random one, whose scores are low, and only their difference tells something.

Then the seconds of computing with one and two loader workers, and the seconds from the start until
both of two gloo ranks have ended of which one raises in its second batch. Exits with 1 if that
takes 10 s from the error on, or if four views cost more than a tenth of the score.
"""

import argparse
import multiprocessing
import sys
import tempfile
import time
from pathlib import Path

import torch
import torch.distributed as dist
from mmengine.config import Config

from dinov3_mm.checkpoints import export_backbone
from dinov3_mm.engine import build_runner
from dinov3_mm.engine.feature_cache import compute, use_feature_cache
from tests.acceptance.frozen_quickstart import config as quickstart
from tests.checkpoints.toys import quickstart_backbone

METRICS = {"classification": "accuracy/top1", "segmentation": "mIoU"}
LIMIT_S = 10.0
LEAST = 0.9
# The random steps of configs/classification and configs/segmentation, in the quickstart's sizes.
STEPS = {
    "classification": [dict(type="RandomResizedCrop", scale=64)],
    "segmentation": [
        dict(type="RandomResize", scale=(100000, 96), ratio_range=(0.5, 2.0), keep_ratio=True),
        dict(type="RandomCrop", crop_size=(96, 96), cat_max_ratio=0.75),
    ],
}


def make_config(job: str, weights: str, work_dir: Path, seed: int, args) -> Config:
    """The quickstart of a job with random crops, short."""
    cfg = quickstart(job, weights, work_dir, seed)
    cfg.train_dataloader.dataset.length = args.images
    cfg.val_dataloader.dataset.length = args.images // 2
    cfg.train_dataloader.dataset.pipeline[1:1] = STEPS[job]
    cfg.train_dataloader.sampler = dict(type="InfiniteSampler", shuffle=True)
    cfg.train_dataloader.num_workers = cfg.val_dataloader.num_workers = 0
    cfg.train_dataloader.persistent_workers = cfg.val_dataloader.persistent_workers = False
    cfg.train_cfg = dict(
        type="IterBasedTrainLoop", max_iters=args.iterations, val_interval=args.iterations
    )
    cfg.default_hooks.checkpoint = dict(
        type="CheckpointHook", by_epoch=False, interval=args.iterations
    )
    cfg.train_dataloader.batch_size = 16
    cfg.param_scheduler = []  # those of the quickstart count epochs
    cfg.default_hooks.logger = dict(type="LoggerHook", log_metric_by_epoch=False)
    cfg.log_processor = dict(by_epoch=False)
    return cfg


def score(cfg: Config, metric: str) -> float:
    """Train and validate."""
    runner = build_runner(cfg)
    runner.train()
    return float(runner.message_hub.get_scalar(f"val/{metric}").current())


def compare(job: str, weights: str, folder: Path, args) -> bool:
    """Scores of a job without a cache, and with one and four views."""
    means = {}
    for name, views in (("images", 0), ("one view", 1), ("four views", 4)):
        values, computing, start = [], 0.0, time.perf_counter()
        for seed in range(args.seeds):
            work_dir = folder / f"{job}_{name.replace(' ', '_')}_{seed}"
            cfg = make_config(job, weights, work_dir, seed, args)
            if views:
                begin = time.perf_counter()
                use_feature_cache(cfg, str(folder / f"{job}_cache"), views=views)
                computing += time.perf_counter() - begin
            values.append(score(cfg, METRICS[job]))
        means[name] = sum(values) / len(values)
        seconds = time.perf_counter() - start
        print(
            f"{job:>15} {name:>10}: {METRICS[job]} {means[name]:.2f} ({seconds:.0f} s, of which "
            f"{computing:.0f} s computing features)",
            flush=True,
        )
    return means["four views"] >= LEAST * means["images"]


def time_workers(weights: str, folder: Path, args) -> None:
    """Seconds of computing with one and two loader workers."""
    for workers in (1, 2):
        cfg = make_config("classification", weights, folder / "none", 0, args)
        cfg.train_dataloader.num_workers = workers
        cfg.val_dataloader = cfg.val_cfg = cfg.val_evaluator = None
        start = time.perf_counter()
        use_feature_cache(cfg, str(folder / f"workers_{workers}"), views=4)
        seconds = time.perf_counter() - start
        print(f"{4 * args.images} views with {workers} workers: {seconds:.1f} s", flush=True)


def rank_main(rank: int, weights: str, folder: Path, args, failed) -> None:
    """One of two ranks; rank 1 raises in its second batch."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"file://{folder}/store", rank=rank, world_size=2)
    samples = compute._Computation.samples
    calls = []

    def dying(self, prepared):
        calls.append(1)
        if rank == 1 and len(calls) == 3:  # the first is a look at one image
            failed.value = time.time()
            raise RuntimeError("out of memory")
        return samples(self, prepared)

    compute._Computation.samples = dying
    cfg = make_config("classification", weights, folder / "none", 0, args)
    try:
        use_feature_cache(cfg, str(folder / "ranks"), views=4)
    except RuntimeError as error:
        print(f"rank {rank}: {type(error).__name__}: {error}", flush=True)
        sys.exit(1)


def fail_together(weights: str, folder: Path, args) -> bool:
    """Whether both ranks end soon after one of them has raised."""
    context = multiprocessing.get_context("fork")
    failed = context.Value("d", 0.0)
    ranks = [
        context.Process(target=rank_main, args=(rank, weights, folder, args, failed))
        for rank in range(2)
    ]
    for process in ranks:
        process.start()
    for process in ranks:
        process.join(120)
    seconds = time.time() - failed.value
    ended = all(process.exitcode == 1 for process in ranks)
    print(f"both ranks ended {seconds:.1f} s after one of them raised: {ended}", flush=True)
    return ended and seconds < LIMIT_S


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--weights", help="backbone of tools/quickstart.sh; default: a random one")
    parser.add_argument("--jobs", nargs="+", default=list(METRICS), choices=METRICS)
    parser.add_argument("--iterations", type=int, default=60)
    parser.add_argument("--images", type=int, default=96)
    parser.add_argument("--seeds", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        torch.manual_seed(0)
        weights = args.weights or str(
            export_backbone(quickstart_backbone(), folder / "toy.safetensors")
        )
        passed = [fail_together(weights, folder, args)]
        time_workers(weights, folder, args)
        passed += [compare(job, weights, folder, args) for job in args.jobs]
    print("passed" if all(passed) else "FAILED")
    sys.exit(not all(passed))


if __name__ == "__main__":
    main()
