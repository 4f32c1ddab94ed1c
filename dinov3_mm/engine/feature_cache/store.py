"""The files of a feature cache: shards of safetensors and an index."""

import json
from collections import OrderedDict
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from dinov3_mm.checkpoints import atomic_write
from dinov3_mm.engine.config import ConfigError

from .codec import decode, encode

INDEX = "index.json"
_STRUCTURE = "structure"
_OPEN_SHARDS = 16


def shard_path(folder: Path, number: int) -> Path:
    """File of the shard with a number."""
    return folder / f"shard-{number:05d}.safetensors"


def write_shard(path: Path, samples: Iterable[Any]) -> None:
    """Write samples; the file appears when it is complete."""
    tensors: dict[str, Tensor] = {}
    for position, sample in enumerate(samples):
        structure, parts = encode(sample)
        tensors[f"{position}/{_STRUCTURE}"] = structure
        tensors.update({f"{position}/{name}": tensor.clone() for name, tensor in parts.items()})
    with atomic_write(path) as partial:
        save_file(tensors, partial)


def write_index(folder: Path, length: int, per_shard: int) -> None:
    """Say that a cache is complete."""
    index = {"format_version": 1, "length": length, "per_shard": per_shard}
    with atomic_write(folder / INDEX) as partial:
        partial.write_text(json.dumps(index, indent=2) + "\n")


def read_index(folder: Path) -> dict[str, Any]:
    """The index of a complete cache.

    Raises:
        ConfigError: there is none.
    """
    path = folder / INDEX
    if not path.is_file():
        raise ConfigError(f"{folder} holds no feature cache: there is no {INDEX}")
    return json.loads(path.read_text())


class FeatureStore:
    """Samples of a cache by index.

    Args:
        folder: of a complete cache.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        index = read_index(self.folder)
        self.length: int = index["length"]
        self.per_shard: int = index["per_shard"]
        self._shards: OrderedDict[int, Any] = OrderedDict()

    def __getstate__(self) -> dict[str, Any]:
        # Every worker process opens the files for itself.
        return {**self.__dict__, "_shards": OrderedDict()}

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> Any:
        number, position = divmod(index, self.per_shard)
        shard = self._shard(number)
        return decode(
            shard.get_tensor(f"{position}/{_STRUCTURE}"),
            lambda name: shard.get_tensor(f"{position}/{name}"),
        )

    def _shard(self, number: int) -> Any:
        if number not in self._shards:
            if len(self._shards) == _OPEN_SHARDS:
                self._shards.popitem(last=False)
            self._shards[number] = safe_open(shard_path(self.folder, number), framework="pt")
        self._shards.move_to_end(number)
        return self._shards[number]
