"""Samples of one rank and micro batch to the tensors of a training step."""

import numpy as np
import torch

from dinov3_mm.datasets.masking import MaskPlanner
from dinov3_mm.datasets.transforms.colors import stack_colors


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
            :class:`~dinov3_mm.datasets.masking.MaskPlanner`.
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
