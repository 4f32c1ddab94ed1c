"""Backbone features of a data set, computed once."""

import json
import math
from pathlib import Path
from typing import Any

import torch
from mmengine.config import Config
from mmengine.dataset import pseudo_collate
from mmengine.dist import barrier, get_rank, get_world_size
from mmengine.registry import DATASETS, MODELS, DefaultScope
from rich.progress import track
from torch import Tensor, nn

from dinov3_mm.checkpoints import atomic_write
from dinov3_mm.engine.config import ConfigError
from dinov3_mm.engine.precision import (
    DTYPES,
    SWITCH,
    asked_dtype,
    autocast_module,
    choose_dtype,
    describe_choice,
)
from dinov3_mm.suggest import hint

from .origin import check_frozen, check_repeatable, differences, origin_of
from .store import INDEX, shard_path, write_index, write_shard

ORIGIN = "origin.json"
# Files of a size that reads and copies well.
_SHARD_BYTES = 256 * 2**20


class UnequalSizesError(ConfigError):
    """Samples of several sizes, whose features cannot be stacked."""


@torch.no_grad()
def compute_cache(
    cfg: Config, loader_cfg: dict, folder: Path, *, training: bool, dtype: str = "fp32"
) -> tuple[list[str], dict]:
    """Write what the backbone of a config gives for every sample of a data set.

    Ranks share the work by shards. A cache that is there already is used if it was made from the
    same backbone, data and preprocessing; one that was interrupted goes on.

    Args:
        cfg: config of a host, with a frozen backbone.
        loader_cfg: the data loader whose data set is meant.
        folder: where to write.
        training: preprocess as in training.
        dtype: of stored features, 'fp32' or 'bf16'; half the size with bf16. The backbone computes
            in the config's ``compute_dtype``, as it does in training; the cache states both.

    Returns:
        Lines for the log, and the ``metainfo`` of the data set.

    Raises:
        ConfigError: features that would change in training, or a folder with a cache of something
            else.
        UnequalSizesError: samples of several sizes.
    """
    if dtype not in DTYPES:
        raise ConfigError(f"feature cache: dtype is {dtype!r}; {hint(dtype, DTYPES)}")
    with DefaultScope.overwrite_default_scope(cfg.get("default_scope", "mmengine")):
        backbone = MODELS.build(cfg.model.backbone)
        preprocessor = MODELS.build(cfg.model.data_preprocessor)
        dataset = DATASETS.build(loader_cfg["dataset"])
    backbone.init_weights()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    backbone, preprocessor = backbone.to(device).eval(), preprocessor.to(device)
    check_frozen(backbone, preprocessor)
    asked = asked_dtype(cfg) or "fp32"
    computed = choose_dtype(asked, device)
    origin = origin_of(cfg, loader_cfg["dataset"], backbone, dtype, computed)
    origin = json.loads(json.dumps(origin))  # tuples become lists, as in the file
    _check_same(folder, origin)
    if (folder / INDEX).is_file():
        line = f"features of {len(dataset)} samples from {folder}: computed in {computed}"
        return [f"{line}, stored as {dtype}"], dict(dataset.metainfo)
    check_repeatable(dataset, loader_cfg["dataset"].get("pipeline", []))
    if computed == "bf16":
        autocast_module(backbone, DTYPES[computed])
    worker = _Worker(backbone, preprocessor, dataset, training, DTYPES[dtype])
    per_shard = _samples_per_shard(worker.sample(0), len(dataset))
    _claim(folder, origin)
    shards = range(math.ceil(len(dataset) / per_shard))
    mine = [number for number in shards if number % get_world_size() == get_rank()]
    description = f"features of {len(dataset)} samples"
    for number in track(mine, description=description, disable=get_rank() != 0):
        path = shard_path(folder, number)
        if not path.exists():
            stop = min((number + 1) * per_shard, len(dataset))
            write_shard(path, (worker.sample(i) for i in range(number * per_shard, stop)))
    barrier()
    if get_rank() == 0:
        write_index(folder, len(dataset), per_shard)
    barrier()
    size = sum(file.stat().st_size for file in folder.glob("*.safetensors")) / 2**30
    line = f"computed {description} into {folder}: {size:.2f} GiB, {dtype}"
    line += f"; computed in {describe_choice(asked, computed, device)}"
    return [line], dict(dataset.metainfo)


class _Worker:
    """Computes a sample; all samples must have one size, because features are stacked later."""

    def __init__(
        self,
        backbone: nn.Module,
        preprocessor: nn.Module,
        dataset: Any,
        training: bool,
        dtype: torch.dtype,
    ) -> None:
        self.backbone = backbone
        self.preprocessor = preprocessor
        self.dataset = dataset
        self.training = training
        self.dtype = dtype
        self._size: torch.Size | None = None

    def sample(self, index: int) -> dict[str, Any]:
        data = self.preprocessor(pseudo_collate([self.dataset[index]]), self.training)
        images = data["inputs"]
        self._size = self._size or images.shape
        if images.shape != self._size:
            raise UnequalSizesError(
                f"feature cache: sample {index} has the size {tuple(images.shape[2:])}, others "
                f"{tuple(self._size[2:])}; give the pipeline a fixed size (resize, then crop or "
                "pad)"
            )
        features = self._stored(self.backbone(images))
        return {"inputs": features, "data_samples": data["data_samples"][0]}

    def _stored(self, output: Any) -> Any:
        if isinstance(output, Tensor):
            return output[0].to(self.dtype)
        return tuple(self._stored(part) for part in output)


def _samples_per_shard(sample: dict[str, Any], length: int) -> int:
    def size(part: Any) -> int:
        if isinstance(part, Tensor):
            return part.numel() * part.element_size()
        return sum(map(size, part))

    return max(1, min(length, _SHARD_BYTES // max(1, size(sample["inputs"]))))


def _check_same(folder: Path, origin: dict[str, Any]) -> None:
    """Refuse a folder that is the place of another cache, complete or begun."""
    mark = folder / ORIGIN
    if not mark.is_file():
        return
    # Caches of earlier versions were computed in fp32 and do not say so.
    found = {SWITCH: "fp32", **json.loads(mark.read_text())}
    changed = differences(found, origin)
    if changed:
        advice = f" ({SWITCH}={found[SWITCH]} goes on with it)" if changed == [SWITCH] else ""
        raise ConfigError(
            f"feature cache: {folder} was made from something else: {', '.join(changed)} differ; "
            f"give another folder, or remove it{advice}"
        )


def _claim(folder: Path, origin: dict[str, Any]) -> None:
    """Mark a folder as the place of this cache."""
    barrier()  # all ranks have looked
    if get_rank() == 0:
        folder.mkdir(parents=True, exist_ok=True)
        with atomic_write(folder / ORIGIN) as partial:
            partial.write_text(json.dumps(origin, indent=2) + "\n")
    barrier()
