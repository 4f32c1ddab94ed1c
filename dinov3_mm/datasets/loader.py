"""The data loader of pretraining: a look at its source, from a position to crops, batches."""

import copy
import gc
import os
import signal
from collections.abc import Iterable, Iterator
from typing import NamedTuple

import cv2
import numpy as np
import torch
from mmengine.logging import MMLogger, print_log
from mmengine.registry import DATASETS, TRANSFORMS
from torch.utils.data import DataLoader, Dataset

from dinov3_mm.datasets.sources.mixture import order_of
from dinov3_mm.errors import hint

from .collate import MultiCropCollate
from .images import BrokenImageError, ImageHeader
from .multiband import UNCHANGED
from .order import PositionBatchSampler, sample_generator, torch_seed
from .sources import BatchMixture, ImageSource, WeightedConcat
from .transforms import MultiCrop, MultiResolutionCrop

# --- A look at the source before training ---


_PROBES = 64
_LOADED_PROBES = 8
_TOLERATED_SHARE = 0.1


class _Probe(NamedTuple):
    index: int
    path: str
    header: ImageHeader


def check_source(source: ImageSource, min_image_size: int, small_images: str = "error") -> int:
    """Read the headers of up to 64 images spread over the source.

    Of files whose pixels are kept as they are, one is decoded as well; sources without ``probe``
    have one image loaded instead. Small images are no rarity in a photo collection, and
    upsampling a few of them does no harm; a source where more than a tenth of the probed images is
    small is most likely paired with the wrong crop size.

    Args:
        source (ImageSource): The images.
        min_image_size (int): Smallest side in pixels that is not small.
        small_images (str): ``'error'``, or ``'upscale'`` to accept any size.

    Returns:
        int: Channels of the images.

    Raises:
        ImportError: If a package is missing that the files need.
        ValueError: If no probed image can be read, if the images differ in their channels or lack
            chosen ones, or if more than a tenth of them is small and ``small_images`` is
            ``'error'``.
    """
    if small_images not in ("error", "upscale"):
        raise ValueError(f"small_images must be 'error' or 'upscale', got {small_images!r}")
    if isinstance(source, (BatchMixture, WeightedConcat)):
        return _check_parts(source, min_image_size, small_images)
    probes, broken = _probe(source)
    if not probes:
        raise ValueError(f"none of {len(broken)} probed images can be read, e.g. {broken[0]}")
    chosen = _format_of(source, "channels") if hasattr(source, "probe") else None
    channels = _check_channels(probes, chosen)
    if _format_of(source, "color") == UNCHANGED:
        _check_pixels(source, probes)
    if small_images == "error":
        _check_sizes(probes, min_image_size)
    return channels


def _check_parts(
    source: BatchMixture | WeightedConcat, min_image_size: int, small_images: str
) -> int:
    """Check every part of a mixture; all must have equally many channels."""
    channels = [check_source(part, min_image_size, small_images) for part in source.parts]
    if len(set(channels)) > 1:
        raise ValueError(
            f"the parts of the {type(source).__name__} have {channels} channels; choose equally "
            "many in each (color and channels of the sources)"
        )
    return channels[0]


def _probe(source: ImageSource) -> tuple[list[_Probe], list[str]]:
    """The readable probes, and messages about the others."""
    has_headers = hasattr(source, "probe")
    probes, broken = [], []
    number = min(len(source), _PROBES)
    for index in np.linspace(0, len(source) - 1, number).round().astype(int).tolist():
        try:
            if has_headers:
                header = source.probe(index)
            else:
                shape = source.load_image(index).shape
                header = ImageHeader(*shape[:2], shape[2] if len(shape) > 2 else 1)
        except BrokenImageError as error:
            broken.append(str(error))
            continue
        probes.append(_Probe(index, source.path(index), header))
        if not has_headers:
            break
    return probes, broken


def _format_of(source: ImageSource, name: str) -> object:
    """Value of a source's pixel format; None for sources that have no files."""
    return getattr(getattr(source, "format", None), name, None)


def _check_channels(probes: list[_Probe], chosen: list[int] | None) -> int:
    """Number of channels of all images, given the chosen ones of the files (None: all)."""
    examples: dict[int, list[str]] = {}
    for _, path, header in probes:
        examples.setdefault(header.channels, []).append(path)
    fewest = min(examples)
    if chosen is None and len(examples) == 1:
        return fewest
    if chosen is not None and fewest > max(chosen):
        return len(chosen)
    counts = "; ".join(
        f"{count} channels in {len(paths)} of {len(probes)} probed images, e.g. {paths[0]}"
        for count, paths in sorted(examples.items())
    )
    if chosen is not None:
        raise ValueError(f"not all images have the channels={chosen} (from 0): {counts}")
    raise ValueError(
        f"the images differ in their channels: {counts}. Choose channels that all of them have "
        f"with source.channels, e.g. channels={list(range(fewest))}, or take the others out"
    )


def _check_pixels(source: ImageSource, probes: list[_Probe]) -> None:
    """Decode one image: a header does not tell whether pixels fit value_range or need a codec."""
    broken = []
    for probe in probes[:_LOADED_PROBES]:
        try:
            source.load_image(probe.index)
            return
        except BrokenImageError as error:
            broken.append(str(error))
    raise ValueError(f"none of {len(broken)} probed images can be read, e.g. {broken[0]}")


def _check_sizes(probes: list[_Probe], min_image_size: int) -> None:
    """Raise if many images are smaller than the crops, tell if few are."""
    small = [probe for probe in probes if min(probe.header[:2]) < min_image_size]
    if not small:
        return
    _, path, (height, width, _) = small[0]
    facts = (
        f"{len(small)} of {len(probes)} probed images are smaller than the crop size of "
        f"{min_image_size} px, e.g. {path} of {width}x{height} px"
    )
    if len(small) > _TOLERATED_SHARE * len(probes):
        raise ValueError(
            f"{facts}; use smaller crops, or small_images='upscale' in the data loader config to "
            "train on enlarged images"
        )
    print_log(f"{facts}; they will be enlarged", logger="current")


# --- From a position to crops ---


_MAX_REPLACEMENTS = 50


class MultiCropDataset(Dataset):
    """Crops as a function of the sample position alone.

    Position ``p`` shows image ``perm_e(p mod n)`` of epoch ``e = p // n``, or what a mixture's own
    order says, augmented with the generator of ``p``. An unreadable image is replaced by one drawn
    from another generator of ``p``, so that every process that asks for ``p`` gets the same
    replacement.

    Args:
        source (ImageSource): The images.
        transform (MultiCrop | MultiResolutionCrop): ``transform.at(iteration)(image, rng)`` is a
            dict of crop lists.
        seed (int): Seed of the run.
        global_batch_size (int): Images per optimizer step, by which a position belongs to an
            iteration.
        num_channels (int | None): An image with another number of channels counts as unreadable;
            None: any number will do.

    Raises:
        ValueError: If the source is empty.
    """

    def __init__(
        self,
        source: ImageSource,
        transform: MultiCrop | MultiResolutionCrop,
        seed: int = 0,
        *,
        global_batch_size: int = 1,
        num_channels: int | None = None,
    ) -> None:
        if not len(source):
            raise ValueError(f"{type(source).__name__} holds no images")
        self.source = source
        self.transform = transform
        self.seed = seed
        self.num_channels = num_channels
        self.global_batch_size = global_batch_size
        self._order = order_of(source, seed, global_batch_size)

    def __len__(self) -> int:
        """Images per epoch; positions may go on past it."""
        return len(self.source)

    def source_index(self, position: int) -> int:
        """Index in the source of the image that belongs to a position."""
        return self._order(position)

    def __getitem__(self, position: int) -> dict:
        """One sample.

        Returns:
            dict: What the transform returns, with ``position`` and ``broken``, the messages about
            the images that could not be read for this position (usually none).

        Raises:
            RuntimeError: If no image could be read in many tries.
        """
        image, broken = self._load(position)
        transform = self.transform.at(position // self.global_batch_size)
        sample = transform(image, sample_generator(self.seed, "augment", position))
        sample["position"] = position
        sample["broken"] = broken
        return sample

    def _load(self, position: int) -> tuple[np.ndarray, list[str]]:
        """The image of a position, or its replacement, and what was wrong with the others."""
        index = self.source_index(position)
        broken: list[str] = []
        replacement = None
        while True:
            try:
                return self._checked(self.source.load_image(index), index), broken
            except BrokenImageError as error:
                broken.append(str(error))
                if len(broken) > _MAX_REPLACEMENTS:
                    raise RuntimeError(
                        f"{len(broken)} images in a row could not be read, the last one {error}; "
                        "check that the files are there and are images"
                    ) from error
            if replacement is None:
                replacement = sample_generator(self.seed, "replacement", position)
            index = int(replacement.integers(len(self.source)))

    def _checked(self, image: np.ndarray, index: int) -> np.ndarray:
        if self.num_channels not in (None, image.shape[-1]):
            raise BrokenImageError(
                self.source.path(index),
                f"has {image.shape[-1]} channels, the other images have {self.num_channels}",
            )
        return image


# --- From a config to the loader ---


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
        surplus (bool): See :class:`~dinov3_mm.datasets.order.BatchLayout`.
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
