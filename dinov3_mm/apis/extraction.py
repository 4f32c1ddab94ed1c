"""Features of an image source to disk: sharded over ranks, killed and continued at will."""

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from mmengine.dist import barrier, broadcast_object_list, get_dist_info

from dinov3_mm.datasets.loader import default_num_workers
from dinov3_mm.datasets.sources import ImageSource
from dinov3_mm.features.merge import check_format
from dinov3_mm.features.plan import ExtractionPlan, hash_paths

from .extraction_run import ExtractionRun, Progress
from .extractor import FeatureExtractor
from .fields import FieldSelection

_SHARD_BYTES = 256 * 2**20
_MAX_SHARD_SIZE = 4096
# Patch tokens of large images can be 100 MB each: their shards stay small.
_RAGGED_SHARD_SIZE = 32


@dataclass
class ExtractionResult:
    """What is on disk after a run.

    Attributes:
        index: content of the index file.
        index_file: its path.
        resumed: shards that were there already.
        notes: what became of the images of an earlier run, in words.
    """

    index: dict[str, Any]
    index_file: Path
    resumed: int
    notes: list[str]


def extract_to_files(
    extractor: FeatureExtractor,
    source: ImageSource,
    out: str | Path,
    *,
    what: Sequence[str] = ("cls",),
    store_dtype: str = "fp32",
    shard_size: int | None = None,
    num_workers: int | None = None,
    source_options: Mapping[str, Any] | None = None,
    content: bool = False,
    on_start: Callable[[int, int], None] | None = None,
    on_progress: Progress | None = None,
) -> ExtractionResult:
    """Extract the features of all images of a source into a folder of shards, or into one file.

    With a process group every rank takes a share of the shards; ``out`` lies on a disk that all
    see. A shard is complete when its file exists: a killed run repeats only the shards that are
    not, with any number of ranks. Images that cannot be read are left out and named in the index.

    A run over images of which some were changed, added or removed since keeps the rows of the
    others. Where more than half of the images are gone it is refused, as it is with other options.

    Args:
        extractor: the model and its options.
        source: the images, e.g. ``ImageFolder(root)``.
        out: a folder, or a file that ends in .safetensors, .npy or .parquet.
        what: fields to store: 'cls', 'registers', 'patches', 'pooled'; also for the extractor's
            ``layers``.
        store_dtype: 'fp32' or 'fp16'.
        shard_size: images per shard; by default about 256 MiB, or 32 images if patches of different
            sizes are stored.
        num_workers: processes that decode; 0 decodes in this one.
        source_options: how the source reads its images; a rerun with others is refused.
        content: compare files by a hash of their bytes too, not only by size and time.
        on_start: called on every rank with the images it will extract, and those there already.
        on_progress: called on every rank after each batch with the images extracted and left out.

    Raises:
        FileExistsError: If ``out`` is a file that no run has written.
        ImportError: If the format needs a package that is not installed.
        ValueError: If ``out`` holds another run's features, the format does not fit, or no image
            could be read.
    """
    out = Path(out).expanduser()
    run = _prepare(extractor, source, out, what, store_dtype, shard_size, source_options or {})
    run.content = content
    _raise_together(run.open)
    rank, world_size = get_dist_info()
    # Ranks that looked for themselves could see different files.
    (pending,) = _broadcast([run.pending()])
    mine = pending[rank::world_size]
    if on_start is not None:
        there = run.plan.num_images - sum(len(run.plan.images_of(s)) for s in pending)
        on_start(sum(len(run.plan.images_of(s)) for s in mine), there)
    workers = default_num_workers() if num_workers is None else num_workers
    run.extract(mine, workers, on_progress or (lambda done, left_out: None))
    barrier()
    _raise_together(run.finish)
    index = json.loads(run.index_file.read_text(encoding="utf-8"))
    return ExtractionResult(index, run.index_file, run.plan.num_shards - len(pending), run.notes)


def _prepare(
    extractor: FeatureExtractor,
    source: ImageSource,
    out: Path,
    what: Sequence[str],
    store_dtype: str,
    shard_size: int | None,
    source_options: Mapping[str, Any],
) -> ExtractionRun:
    ragged = extractor.preparation.size is None
    fields = FieldSelection(what, extractor.layers, store_dtype=store_dtype, ragged=ragged)
    if out.suffix:
        check_format(out.suffix, fields.names, fields.ragged)
    preparation = extractor.preparation
    sides = preparation.size or (preparation.stride, preparation.stride)
    blank = torch.zeros(1, preparation.channels, *sides, dtype=torch.uint8)
    ((_, sample),) = extractor.stream([(None, blank)])
    template = fields.empty(sample)
    if shard_size is None:
        shard_size = _default_shard_size(template, fields.ragged, len(source), get_dist_info()[1])
    elif shard_size < 1:
        raise ValueError(f"shard_size is {shard_size}; expected 1 or more")
    described = extractor.describe()
    paths = (source.path(index) for index in range(len(source)))
    settings = {
        "fingerprint": described["fingerprint"],
        **extractor.options,
        "fields": fields.names,
        "store_dtype": store_dtype,
        "source": {**source_options, "num_images": len(source), "paths": hash_paths(paths)},
    }
    description = {
        "model": described,
        "statistics": extractor.statistics._asdict(),
        "fields": fields.describe(sample),
    }
    settings = json.loads(json.dumps(settings))  # as it comes back from disk: lists, no tuples
    plan = ExtractionPlan(settings, len(source), shard_size)
    return ExtractionRun(extractor, source, out, fields, plan, template, description)


def _default_shard_size(
    template: Mapping[str, np.ndarray], ragged: Sequence[str], num_images: int, ranks: int
) -> int:
    if ragged:
        return _RAGGED_SHARD_SIZE
    row_bytes = sum(a.dtype.itemsize * math.prod(a.shape[1:]) for a in template.values())
    return max(1, min(_SHARD_BYTES // row_bytes, _MAX_SHARD_SIZE, -(-num_images // ranks)))


def _raise_together(step: Callable[[], None]) -> None:
    """Run a step on rank 0; its error ends all ranks instead of leaving them waiting."""
    errors: list[Exception | None] = [None]
    if get_dist_info()[0] == 0:
        try:
            step()
        except Exception as error:  # handed to all ranks, and raised on each
            errors = [error]
    (error,) = _broadcast(errors)
    if error is not None:
        raise error


def _broadcast(values: list) -> list:
    """The values of rank 0."""
    broadcast_object_list(values, src=0)
    return values
