"""From a global sample position to the augmented crops of one image."""

import numpy as np
from torch.utils.data import Dataset

from dinov3_mm.datasets.randomness import sample_generator
from dinov3_mm.datasets.sources import BrokenImageError, ImageSource
from dinov3_mm.datasets.sources.mixture import order_of
from dinov3_mm.datasets.transforms import MultiCrop, MultiResolutionCrop

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
