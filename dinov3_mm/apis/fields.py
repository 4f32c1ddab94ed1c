"""The named arrays that are stored of features."""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from dinov3_mm.features.shards import GRID_SUFFIX
from dinov3_mm.suggest import hint

from .tokens import FIELDS, ImageFeatures, Tokens

STORE_DTYPES = {"fp32": torch.float32, "fp16": torch.float16}


class FieldSelection:
    """Which tokens are stored, and under which names.

    The tokens of the last block have plain names (``'cls'``), those of other blocks carry its index
    (``'layers.5.cls'``).

    Args:
        what: any of 'cls', 'registers', 'patches', 'pooled' (mean patch).
        layers: further blocks.
        store_dtype: 'fp32' or 'fp16'.
        ragged: images have different sizes: patches are stored as one row per patch, with the rows
            and columns of each image under ``'patches.grid'``.

    Raises:
        ValueError: If a field or the dtype is unknown, or there is no field.
    """

    def __init__(
        self, what: Sequence[str], layers: Sequence[int], *, store_dtype: str, ragged: bool
    ) -> None:
        if store_dtype not in STORE_DTYPES:
            raise ValueError(
                f"unknown store_dtype {store_dtype!r}; {hint(str(store_dtype), STORE_DTYPES)}"
            )
        unknown = next((field for field in what if field not in FIELDS), None)
        if unknown is not None or not what:
            raise ValueError(f"cannot extract {unknown!r}; {hint(str(unknown), FIELDS)}")
        self._what = [field for field in FIELDS if field in what]
        self._sources = {"": None, **{f"layers.{index}.": index for index in layers}}
        self._dtype, self._ragged = STORE_DTYPES[store_dtype], ragged
        self.names = [prefix + field for prefix in self._sources for field in self._what]
        self.ragged = [name for name in self.names if ragged and name.endswith("patches")]

    def select(self, features: ImageFeatures) -> dict[str, np.ndarray]:
        """The stored arrays (B, ...) of features on any device."""
        arrays = {}
        for prefix, layer in self._sources.items():
            tokens = features if layer is None else features.layers[layer]
            for field in self._what:
                arrays[prefix + field] = self._store(getattr(tokens, field))
            if prefix + "patches" in self.ragged:
                arrays[prefix + "patches" + GRID_SUFFIX] = np.array(tokens.grids, np.int32)
        return arrays

    def describe(self, features: ImageFeatures) -> dict[str, dict]:
        """Shape of a row of each field, and the grid of patches where all images share it."""
        fields = {}
        for prefix, layer in self._sources.items():
            tokens: Tokens = features if layer is None else features.layers[layer]
            for field in self._what:
                name = prefix + field
                shape = list(getattr(tokens, field).shape[1:])
                fields[name] = {"shape": shape[-1:] if name in self.ragged else shape}
                if field == "patches" and not self._ragged:
                    fields[name]["grid"] = list(tokens.grid)
        return fields

    def empty(self, features: ImageFeatures) -> dict[str, np.ndarray]:
        """Arrays without rows, of the shapes and dtypes that shards have."""
        return {
            name: array[:0, 0] if name in self.ragged else array[:0]
            for name, array in self.select(features).items()
        }

    def _store(self, tensor: Tensor) -> np.ndarray:
        # A copy: a view of the CLS token would keep the patch tokens in memory.
        return tensor.to("cpu", self._dtype, copy=True).contiguous().numpy()
