"""From samples to the tensors of a step: patch masks, stacked crops, drawn colours."""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dinov3_mm.datasets.transforms.pixel_ops import Distortion
from dinov3_mm.models.pretraining.colors import COLORED_CROPS, JITTER

from .order import sample_generator

# --- Block-wise patch masks of iBOT (DINOv3 paper, section 3.1; as in BEiT) ---
#
# A plan fixes how many patches each mask hides and which crop gets which mask; a mask itself is
# drawn from a generator of its own. So a rank draws only the masks of its own crops and still
# agrees with all others on the plan.


MIN_BLOCK_PATCHES = 4
ASPECT_RATIO_RANGE = (0.3, 1 / 0.3)
ATTEMPTS_PER_BLOCK = 10


def max_block_patches(image_size: int, patch_size: int) -> float:
    """Largest number of patches that one block may add.

    The reference evaluates ``0.5 * S // p * S // p`` from left to right with floor division, which
    is not always half of the grid (112 / 16: 21, not 24.5).
    """
    return 0.5 * image_size // patch_size * image_size // patch_size


def mask_counts(
    num_masks: int, num_patches: int, probability: float, ratio: tuple[float, float]
) -> np.ndarray:
    """Masked patches of each of ``num_masks`` masks before shuffling.

    Returns:
        np.ndarray: ``(num_masks,)`` int64. The first ``int(num_masks * probability)`` entries are
        spread evenly over the ratio interval, its lower end excluded; the others are 0.
    """
    num_drawn = int(num_masks * probability)
    ratios = np.linspace(ratio[0], ratio[1], num_drawn + 1).astype(np.float32)[1:]
    counts = np.zeros(num_masks, np.int64)
    # float32 product, then truncation: the reference multiplies a float32 ratio.
    counts[:num_drawn] = (np.float32(num_patches) * ratios).astype(np.int64)
    return counts


def block_mask(
    num_masked: int,
    grid_size: tuple[int, int],
    max_block: float,
    rng: np.random.Generator,
    *,
    random_shift: bool = False,
) -> np.ndarray:
    """Mask with exactly ``num_masked`` hidden patches: random rectangles, the rest single patches.

    Args:
        num_masked (int): Patches to hide.
        grid_size (tuple[int, int]): Rows and columns of the patch grid.
        max_block (float): Most patches that one rectangle may add, see :func:`max_block_patches`.
        rng (np.random.Generator): Source of all draws.
        random_shift (bool): Roll the mask by two random offsets, which removes the centre bias.

    Returns:
        np.ndarray: ``grid_size`` bool, True where hidden.
    """
    mask = np.zeros(grid_size, bool)
    placed = place_blocks(mask, num_masked, max_block, rng)
    if placed < num_masked:
        free = np.flatnonzero(~mask)
        mask.reshape(-1)[rng.choice(free, num_masked - placed, replace=False)] = True
    if random_shift:
        mask = np.roll(mask, rng.integers(0, grid_size), axis=(0, 1))
    return mask


def place_blocks(
    mask: np.ndarray, num_masked: int, max_block: float, rng: np.random.Generator
) -> int:
    """Hide rectangles in ``mask`` in place and return how many patches they hide together.

    Stops at ``num_masked`` patches or when ten random rectangles in a row do not fit.
    """
    rows, columns = mask.shape
    log_low, log_high = (math.log(ratio) for ratio in ASPECT_RATIO_RANGE)
    placed = 0
    while placed < num_masked:
        budget = min(num_masked - placed, max_block)
        uniforms = rng.random((ATTEMPTS_PER_BLOCK, 4)).tolist()
        for area_draw, ratio_draw, top_draw, left_draw in uniforms:
            area = MIN_BLOCK_PATCHES + (budget - MIN_BLOCK_PATCHES) * area_draw
            ratio = math.exp(log_low + (log_high - log_low) * ratio_draw)
            height, width = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
            if width >= columns or height >= rows:
                continue
            top = int(top_draw * (rows - height + 1))
            left = int(left_draw * (columns - width + 1))
            block = mask[top : top + height, left : left + width]
            gained = height * width - np.count_nonzero(block)
            if 0 < gained <= budget:
                block[:] = True
                placed += gained
                break
        else:
            break
    return placed


class MaskPlanner:
    """Masks of the global crops of one micro batch, sliced for one rank.

    Args:
        image_size (int): Side of the global crops in pixels.
        patch_size (int): Side of a patch in pixels.
        probability (float): Share of global crops that get a mask.
        ratio (tuple[float, float]): Smallest and largest share of hidden patches.
        random_shift (bool): See :func:`block_mask`.
        scope (str): ``'global'`` plans the micro batch of all ranks together, so that the masks do
            not depend on the number of ranks; ``'rank'`` plans each rank's crops alone, as the
            reference does, which gives every rank the same number of hidden patches.
        num_global (int): Global crops per image.

    Raises:
        ValueError: If an argument is out of range.
    """

    def __init__(
        self,
        image_size: int,
        patch_size: int,
        *,
        probability: float = 0.5,
        ratio: tuple[float, float] = (0.1, 0.5),
        random_shift: bool = False,
        scope: str = "global",
        num_global: int = 2,
    ) -> None:
        if image_size % patch_size:
            raise ValueError(
                f"global crops of {image_size} px cannot be cut into patches of {patch_size} px; "
                f"use {image_size // patch_size * patch_size or patch_size} px"
            )
        if not 0 <= probability <= 1:
            raise ValueError(f"mask probability must be in [0, 1], got {probability}")
        if not 0 <= ratio[0] <= ratio[1] <= 1:
            raise ValueError(f"mask ratio must be 0 <= low <= high <= 1, got {tuple(ratio)}")
        if scope not in ("global", "rank"):
            raise ValueError(f"mask scope must be 'global' or 'rank', got {scope!r}")
        self.grid_size = (image_size // patch_size,) * 2
        self.max_block = max_block_patches(image_size, patch_size)
        self.probability = probability
        self.ratio = tuple(ratio)
        self.random_shift = random_shift
        self.scope = scope
        self.num_global = num_global

    @property
    def num_patches(self) -> int:
        """Patches per global crop."""
        return self.grid_size[0] * self.grid_size[1]

    def __call__(
        self, seed: int, micro_iteration: int, first: int, count: int, micro_batch_size: int
    ) -> np.ndarray:
        """Masks of the images ``first .. first + count`` of a micro batch.

        Args:
            seed (int): Seed of the run.
            micro_iteration (int): Micro batches since the start of training.
            first (int): Row of the rank's first image within the micro batch of all ranks.
            count (int): Images of the rank.
            micro_batch_size (int): Images of all ranks.

        Returns:
            np.ndarray: ``(num_global * count, num_patches)`` bool, crop-major.
        """
        rows, counts = self._plan(seed, micro_iteration, first, count, micro_batch_size)
        masks = np.zeros((len(rows), self.num_patches), bool)
        for target, (row, num_hidden) in enumerate(zip(rows, counts)):
            if num_hidden:
                rng = sample_generator(seed, "mask", micro_iteration, row)
                masks[target] = block_mask(
                    int(num_hidden),
                    self.grid_size,
                    self.max_block,
                    rng,
                    random_shift=self.random_shift,
                ).reshape(-1)
        return masks

    def num_hidden(
        self, seed: int, micro_iteration: int, first: int, count: int, micro_batch_size: int
    ) -> int:
        """Hidden patches of all masks that a call with these arguments draws, without drawing."""
        return int(self._plan(seed, micro_iteration, first, count, micro_batch_size)[1].sum())

    def _plan(
        self, seed: int, micro_iteration: int, first: int, count: int, micro_batch_size: int
    ) -> tuple[list[int], np.ndarray]:
        """Number of each mask's generator, and how many patches the mask hides."""
        if self.scope == "rank":
            plan_rows = self.num_global * count
            # Rows of different ranks must not share a generator.
            rows, offset, sub_plan = list(range(plan_rows)), self.num_global * first, first + 1
        else:
            plan_rows = self.num_global * micro_batch_size
            starts = (crop * micro_batch_size + first for crop in range(self.num_global))
            rows, offset, sub_plan = [s + i for s in starts for i in range(count)], 0, 0
        counts = mask_counts(plan_rows, self.num_patches, self.probability, self.ratio)
        sample_generator(seed, "mask_plan", micro_iteration, sub_plan).shuffle(counts)
        return [offset + row for row in rows], counts[rows]


# --- Drawn colour distortions of a batch, applied by ``MultiCropPreprocessor`` ---


def stack_colors(samples: Sequence[dict[str, Any]], channels: int) -> dict[str, Any]:
    """``colors`` of ``B`` samples to one dict, with rows in the order of the stacked crops.

    Args:
        samples: what ``MultiCrop(color_on='device')`` returns as ``colors``.
        channels: of the crops.

    Returns:
        dict: ``global_crops`` and ``local_crops``, each a dict of tensors as
        :func:`~dinov3_mm.models.pretraining.colors.apply_colors` takes it; ``blur_kernel``
        and ``solarize_threshold``.
    """
    first = samples[0]
    stacked = {
        key: _tensors([s[key][c] for c in range(len(first[key])) for s in samples], channels)
        for key in COLORED_CROPS
    }
    return {**stacked, **{key: value for key, value in first.items() if key not in COLORED_CROPS}}


def _tensors(drawn: list[Distortion], channels: int) -> dict[str, Tensor]:
    # Filled as arrays: writing single elements of tensors takes many times longer.
    jitter = np.full((len(drawn), len(JITTER)), -1)
    factors = np.ones((len(drawn), len(JITTER)))
    dropped = np.zeros((len(drawn), channels), bool)
    for row, distortion in enumerate(drawn):
        for place, (name, factor) in enumerate(distortion.jitter):
            jitter[row, place], factors[row, place] = JITTER.index(name), factor
        for channel in distortion.dropped:
            dropped[row, channel] = True
    return {
        "jitter": torch.from_numpy(jitter),
        "factors": torch.from_numpy(factors),
        "grayscale": torch.tensor([each.grayscale for each in drawn]),
        "blur_sigma": torch.tensor([each.blur_sigma or 0.0 for each in drawn], dtype=torch.float64),
        "solarize": torch.tensor([each.solarize for each in drawn]),
        "dropped": torch.from_numpy(dropped),
    }


# --- Crops and masks of one rank and micro batch ---


class MultiCropCollate:
    """Stacks crops crop-major and adds the patch masks of the global crops.

    Iteration and row range follow from the sample positions, so the collate function needs no
    counter and gives the same batch in any worker.

    Args:
        global_size (int | list[int]): Side of the global crops in pixels; every side that occurs.
        patch_size (int | list[int]): Side of a patch in pixels; of several the first is that of
            ``masks``, and all have their masks in ``masks_of``.
        mask_probability (float): Share of global crops that get a mask.
        mask_ratio (tuple[float, float]): Smallest and largest share of hidden patches.
        random_shift (bool): Roll masks by random offsets.
        mask_scope (str): ``'global'`` or ``'rank'``, see
            :class:`~dinov3_mm.datasets.collate.MaskPlanner`.
        seed (int): Seed of the run.
        global_batch_size (int): Images per optimizer step over all ranks.
        accumulate (int): Micro batches per optimizer step.

    Attributes:
        mask_share (tuple[int, int] | None): Make the masks for part ``index`` of ``count`` of the
            micro batch, instead of for the samples.

    Raises:
        ValueError: If an argument is out of range.
    """

    mask_share: tuple[int, int] | None = None

    def __init__(
        self,
        global_size: int | list[int],
        patch_size: int | list[int],
        *,
        mask_probability: float = 0.5,
        mask_ratio: tuple[float, float] = (0.1, 0.5),
        random_shift: bool = False,
        mask_scope: str = "global",
        seed: int = 0,
        global_batch_size: int,
        accumulate: int = 1,
    ) -> None:
        sides = {global_size} if isinstance(global_size, int) else set(global_size)
        self.patch_sizes = [patch_size] if isinstance(patch_size, int) else list(patch_size)
        self.planners = {
            (side, patch): MaskPlanner(
                side,
                patch,
                probability=mask_probability,
                ratio=mask_ratio,
                random_shift=random_shift,
                scope=mask_scope,
            )
            for side in sides
            for patch in self.patch_sizes
        }
        self.seed = seed
        self.global_batch_size = global_batch_size
        self.micro_batch_size = global_batch_size // accumulate

    def __call__(self, samples: list[dict]) -> dict:
        """Collate the ``B`` samples of consecutive positions within one micro batch.

        Returns:
            dict: ``global_crops (2B, C, S, S)``, ``local_crops (L*B, C, s, s)`` and, if the samples
            have them, ``gram_crops (2B, C, Sg, Sg)``, all with crop ``c`` of sample ``b`` in row
            ``c * B + b``; ``masks (2B, N)`` bool; ``mask_indices (M,)`` int64 into the flattened
            masks; ``masks_weight (M,)`` float32, one over the number of hidden patches of the row;
            ``num_masked (1,)`` int64; with several patch sizes ``masks_of``, these four for
            each of them, whose key is a string; ``positions (B,)`` int64; ``iteration`` int;
            ``broken``, the list of messages about unreadable images. Where colours are applied
            later, ``colors``, see :func:`stack_colors`.

        Raises:
            ValueError: If the positions are not consecutive or leave the micro batch.
        """
        positions = np.array([sample["position"] for sample in samples], np.int64)
        micro_iteration, first = divmod(int(positions[0]), self.micro_batch_size)
        count = len(samples)
        size = self.micro_batch_size
        # The last ranks of an uneven micro batch go on with its first images.
        follows = (np.diff(positions % size) % size == 1).all() or size == 1
        if not follows or (positions // size != micro_iteration).any():
            raise ValueError(
                "a batch must hold consecutive positions of one micro batch of "
                f"{self.micro_batch_size}, got {positions.tolist()}"
            )
        if self.mask_share is not None:
            part, num_parts = self.mask_share
            count = self.micro_batch_size // num_parts
            first = part * count
        side = samples[0]["global_crops"][0].shape[-1]
        place = (self.seed, micro_iteration, first, count, self.micro_batch_size)
        masks_of = {
            str(patch): mask_tensors(self.planners[side, patch](*place))
            for patch in self.patch_sizes
        }
        batch = {
            key: stack_crops([sample[key] for sample in samples])
            for key in ("global_crops", "local_crops", "gram_crops")
            if key in samples[0]
        }
        if "colors" in samples[0]:
            batch["colors"] = stack_colors(
                [sample["colors"] for sample in samples], batch["global_crops"].shape[1]
            )
        batch.update(masks_of[str(self.patch_sizes[0])])
        if len(masks_of) > 1:
            batch["masks_of"] = masks_of
        batch["positions"] = torch.from_numpy(positions)
        batch["iteration"] = int(positions[0]) // self.global_batch_size
        batch["broken"] = [message for sample in samples for message in sample["broken"]]
        return batch


def stack_crops(crops: list[list[np.ndarray]]) -> torch.Tensor:
    """``B`` lists of ``G`` crops ``(C, S, S)`` to one ``(G * B, C, S, S)`` tensor, crop-major."""
    num_crops = len(crops[0])
    return torch.from_numpy(np.stack([item[crop] for crop in range(num_crops) for item in crops]))


def mask_tensors(masks: np.ndarray) -> dict[str, torch.Tensor]:
    """``masks (R, N)`` bool to the tensors by which the iBOT loss finds the hidden patches."""
    counts = masks.sum(axis=1)
    indices = np.flatnonzero(masks)
    weights = (1 / counts.clip(min=1)).astype(np.float32)[indices // masks.shape[1]]
    return {
        "masks": torch.from_numpy(masks),
        "mask_indices": torch.from_numpy(indices),
        "masks_weight": torch.from_numpy(weights),
        "num_masked": torch.tensor([indices.size]),
    }
