"""Multi-crop with several sets of crop sizes, one of them per iteration (high-resolution stage)."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from mmengine.registry import TRANSFORMS

from dinov3_mm.datasets.transforms.multi_crop import MultiCrop

# Seed of the sequence of choices that the released models were adapted with.
_CHOICE_SEED = 65537
_SIZES = ("global_size", "local_size", "gram_size")


@TRANSFORMS.register_module()
class MultiResolutionCrop:
    """Draws the crop sizes of a whole iteration from several sets, by ratio (paper section 5.1).

    The choice depends on the iteration alone: all ranks make the same one, and a resumed run goes
    on with the sequence.

    Args:
        size_sets (list[dict]): Per set ``global_size``, ``local_size``, optionally ``gram_size``
            (in all sets or in none), and ``ratio``, its share of the iterations; ratios sum to 1.
        **shared: The other arguments of :class:`MultiCrop`.

    Raises:
        ValueError: If there is no set, the ratios do not sum to 1, or Gram crops are in some sets
            only.
    """

    def __init__(self, size_sets: Sequence[dict], **shared: Any) -> None:
        if not size_sets:
            raise ValueError("MultiResolutionCrop needs at least one set of sizes")
        for given in size_sets:
            unknown = sorted(set(given) - {*_SIZES, "ratio"})
            if unknown or not {"global_size", "local_size", "ratio"} <= set(given):
                raise ValueError(
                    f"a set of sizes has global_size, local_size, ratio and perhaps gram_size; got "
                    f"{dict(given)}"
                )
        self.ratios = [float(given["ratio"]) for given in size_sets]
        if min(self.ratios) <= 0 or abs(sum(self.ratios) - 1) > 1e-6:
            raise ValueError(f"the ratios must be positive and sum to 1, got {self.ratios}")
        with_gram = {given.get("gram_size") is not None for given in size_sets}
        if len(with_gram) > 1:
            raise ValueError("gram_size must be given in every set of sizes, or in none")
        self.variants = [
            MultiCrop(**{key: given[key] for key in _SIZES if key in given}, **shared)
            for given in size_sets
        ]
        self._choices = np.empty(0, np.int64)

    def at(self, iteration: int) -> MultiCrop:
        """The transform of an iteration (optimizer step, counted from 0)."""
        if iteration >= len(self._choices):
            # The beginning of a longer sequence is the shorter one.
            length = max(1024, 2 * (iteration + 1))
            rng = np.random.default_rng(_CHOICE_SEED)
            self._choices = rng.choice(len(self.ratios), size=length, p=self.ratios)
        return self.variants[self._choices[iteration]]
