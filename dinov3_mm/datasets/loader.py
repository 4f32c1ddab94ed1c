"""The data loader of pretraining."""

import copy
import gc
import os
import signal
from collections.abc import Iterable, Iterator

import cv2
import torch
from mmengine.logging import MMLogger
from mmengine.registry import DATASETS, TRANSFORMS
from torch.utils.data import DataLoader

from dinov3_mm.datasets.collate import MultiCropCollate
from dinov3_mm.datasets.multi_crop_dataset import MultiCropDataset
from dinov3_mm.datasets.randomness import torch_seed
from dinov3_mm.datasets.samplers import PositionBatchSampler
from dinov3_mm.datasets.source_check import check_source
from dinov3_mm.suggest import hint

LOADER_KEYS = (
    "source",
    "transform",
    "masking",
    "small_images",
    "min_image_size",
    "num_workers",
    "persistent_workers",
    "pin_memory",
    "prefetch_factor",
)
MASKING_KEYS = ("patch_size", "mask_probability", "mask_ratio", "random_shift", "mask_scope")
_MAX_DEFAULT_WORKERS = 8


class PretrainDataLoader(DataLoader):
    """DataLoader that counts unreadable images and logs each of them once, with its path.

    Attributes:
        num_broken (int): Replacements so far in this process.
    """

    num_broken = 0

    def __iter__(self) -> Iterator[dict]:
        logged: set[str] = set()
        for batch in super().__iter__():
            for message in batch.pop("broken"):
                self.num_broken += 1
                if message not in logged:
                    logged.add(message)
                    # MMEngine shows warnings of rank 0 only; each rank reads other files.
                    MMLogger.get_current_instance().error(
                        f"unreadable image replaced ({self.num_broken} so far): {message}"
                    )
            yield batch


def build_pretrain_dataloader(
    cfg: dict,
    *,
    global_batch_size: int,
    accumulate: int = 1,
    surplus: bool = False,
    seed: int = 0,
    rank: int = 0,
    world_size: int = 1,
    start_iter: int = 0,
    max_iters: int,
) -> PretrainDataLoader:
    """Build the loader whose k-th batch is micro batch k of this rank, counted from ``start_iter``.

    Args:
        cfg (dict): ``source`` (DATASETS config), ``transform`` (TRANSFORMS config, type
            ``MultiCrop`` by default, or ``MultiResolutionCrop``), ``masking`` (``patch_size`` = 16,
            ``mask_probability``, ``mask_ratio``, ``random_shift``, ``mask_scope``),
            ``small_images`` (``'error'`` or ``'upscale'``), ``min_image_size`` (the global crop
            size by default), ``num_workers`` (by default the cores per local rank, at most 8),
            ``persistent_workers``, ``pin_memory`` (by default when CUDA is there),
            ``prefetch_factor``.
        global_batch_size (int): Images per optimizer step over all ranks.
        accumulate (int): Micro batches per optimizer step.
        surplus (bool): See :class:`~dinov3_mm.datasets.samplers.BatchLayout`.
        seed (int): Seed of the run.
        rank (int): This process.
        world_size (int): Number of processes.
        start_iter (int): First optimizer step.
        max_iters (int): Optimizer step to stop before.

    Raises:
        ValueError: If a key is unknown, a crop size is not divisible by the patch size, the batch
            cannot be cut evenly, or the images do not fit the crops or differ in their channels.
    """
    check_keys(cfg, LOADER_KEYS, "train_dataloader")
    if "source" not in cfg:
        raise ValueError(
            "train_dataloader needs a 'source', e.g. dict(type='ImageFolder', root=...)"
        )
    masking = {"patch_size": 16, **cfg.get("masking", {})}
    check_keys(masking, MASKING_KEYS, "train_dataloader.masking")
    sampler = PositionBatchSampler(
        global_batch_size,
        rank,
        world_size,
        accumulate=accumulate,
        surplus=surplus,
        start_iter=start_iter,
        max_iters=max_iters,
    )
    transform = TRANSFORMS.build(
        {"type": "MultiCrop", **copy.deepcopy(dict(cfg.get("transform", {})))}
    )
    for variant in transform.variants:
        patches = masking["patch_size"]
        for patch_size in [patches] if isinstance(patches, int) else patches:
            check_sizes(variant, patch_size)
    sides = [variant.global_size for variant in transform.variants]
    source = DATASETS.build(copy.deepcopy(dict(cfg["source"])))
    num_channels = check_source(
        source,
        cfg.get("min_image_size") or min(sides),
        cfg.get("small_images", "error"),
    )
    collate = MultiCropCollate(
        sides,
        **masking,
        seed=seed,
        global_batch_size=global_batch_size,
        accumulate=accumulate,
    )
    num_workers = cfg.get("num_workers", default_num_workers())
    workers = {}
    if num_workers:
        workers = {
            "persistent_workers": cfg.get("persistent_workers", False),
            "prefetch_factor": cfg.get("prefetch_factor", 2),
        }
    return PretrainDataLoader(
        MultiCropDataset(
            source,
            transform,
            seed,
            global_batch_size=global_batch_size,
            num_channels=num_channels,
        ),
        batch_sampler=sampler,
        collate_fn=collate,
        num_workers=num_workers,
        pin_memory=cfg.get("pin_memory", torch.cuda.is_available()),
        worker_init_fn=init_worker,
        # Otherwise starting the workers would draw from torch's global generator.
        generator=torch.Generator().manual_seed(torch_seed(seed, start_iter)),
        **workers,
    )


def init_worker(_: int) -> None:
    """One thread per worker, and the garbage collector on even if the main process froze it.

    A scheduler that ends a job sends SIGTERM to every process, and a terminal Ctrl-C: the workers
    must live on until the main process has finished its step and saved; they end when it does.
    """
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    torch.set_num_threads(1)
    cv2.setNumThreads(0)
    gc.enable()


def default_num_workers() -> int:
    """Cores per process on this machine, between 1 and 8."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return max(1, min(_MAX_DEFAULT_WORKERS, cores // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))))


def check_keys(cfg: dict, known: Iterable[str], where: str) -> None:
    """Raise ValueError for a key that nobody reads, naming the nearest known one."""
    for key in cfg:
        if key not in known:
            raise ValueError(f"unknown key {key!r} in {where}; {hint(key, known)}")


def check_sizes(transform: object, patch_size: int) -> None:
    """Raise ValueError for a crop size that is no multiple of the patch size.

    Local crops may be told to end in a part of a patch (``partial_patches``); they have no masks.
    """
    for name in ("global_size", "local_size", "gram_size"):
        if name == "local_size" and transform.partial_patches:
            continue
        size = getattr(transform, name)
        if size is not None and size % patch_size:
            lower = size // patch_size * patch_size
            raise ValueError(
                f"{name}={size} is not divisible by the patch size {patch_size}; use "
                f"{lower or patch_size} or {lower + patch_size}"
            )
