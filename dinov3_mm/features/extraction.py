"""Features of an image source to disk: sharded over ranks, killed and continued at will."""

import json
import math
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
import torch
from mmengine.dist import barrier, broadcast_object_list, get_dist_info
from torch import Tensor

from dinov3_mm.checkpoints import atomic_write
from dinov3_mm.datasets.loader import default_num_workers
from dinov3_mm.datasets.sources import ImageSource

from .extraction_files import (
    FORMAT_VERSION,
    EarlierRun,
    ExtractionPlan,
    FieldSelection,
    check_same,
    compare_images,
    hash_paths,
)
from .extractor import FeatureExtractor
from .preparation import SourcePixels, group_by_size, load_batches
from .store import (
    INDEX_FILE,
    ShardBuffer,
    check_format,
    file_states,
    merge_shards,
    read_shard_header,
    write_shard,
)

# --- A run: shards that are left, their images, the files at the end ---


_UNKNOWN = (
    "{out} was written by an earlier version, which did not note the states of files: images that "
    "changed in place since then are not noticed; delete it to compute them anew"
)

Progress = Callable[[int, int], None]  # images with features, images left out


@dataclass
class ExtractionRun:
    """The state of a run on one rank.

    Attributes:
        extractor, source: the model and the images.
        out: folder of shards, or the file that they are merged into.
        fields: what is stored.
        plan: shards and settings.
        template: arrays without rows, of the shapes that shards have.
        description: what the index says about the model and the fields.
        content: compare files by a hash of their bytes too.
        buffers: shards under way.
        notes: what became of the images of an earlier run, in words.
    """

    extractor: FeatureExtractor
    source: ImageSource
    out: Path
    fields: FieldSelection
    plan: ExtractionPlan
    template: dict[str, np.ndarray]
    description: dict[str, Any]
    content: bool = False
    buffers: dict[int, ShardBuffer] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    @property
    def is_file(self) -> bool:
        return bool(self.out.suffix)

    @property
    def folder(self) -> Path:
        """Where the shards lie."""
        return self.out.with_name(f"{self.out.name}.parts") if self.is_file else self.out

    @property
    def index_file(self) -> Path:
        return self.out.with_suffix(".json") if self.is_file else self.out / INDEX_FILE

    @property
    def is_finished(self) -> bool:
        return self.index_file.is_file()

    @property
    def earlier(self) -> Path:
        """Where the shards of a run lie whose images were not all the same."""
        return self.folder.with_name(f"{self.folder.name}.earlier")

    def open(self) -> None:
        """Go on with what is on disk, or begin; on rank 0."""
        found = ExtractionPlan.load(self.folder)
        if self.is_finished or found is not None:
            index = json.loads(self.index_file.read_text()) if self.is_finished else None
            there = index["settings"] if index else found.settings
            earlier = EarlierRun.of(self.folder, self.out, index)
            paths = [self.source.path(i) for i in range(len(self.source))]
            check_same(_options(there), _options(self.plan.settings), self.out)
            same = there == self.plan.settings
            differences = compare_images(earlier, paths, same_list=same, content=self.content)
            if differences is None:  # hardly one of them: another data set
                check_same(there, self.plan.settings, self.out)
                if index and "files" not in index:
                    self.notes = [_UNKNOWN.format(out=self.out)]
            elif differences or not same:
                self.notes = differences or ["the images come in another order"]
                self._set_aside()
        elif self.is_file and self.out.exists():
            raise FileExistsError(f"{self.out} exists and was not written by this program")
        else:
            self.folder.mkdir(parents=True, exist_ok=True)
            self.plan.save(self.folder)

    def _set_aside(self) -> None:
        """Begin anew beside what an earlier run has left, whose rows are taken over.

        After a kill between any two steps, :meth:`open` repeats them.
        """
        if self.folder.is_dir():
            shutil.rmtree(self.earlier, ignore_errors=True)
            self.folder.rename(self.earlier)
        self.folder.mkdir(parents=True)
        self.plan.save(self.folder)
        if self.is_file and self.is_finished:
            self.earlier.mkdir(exist_ok=True)
            self.index_file.rename(self.earlier / INDEX_FILE)

    def pending(self) -> list[int]:
        """Shards without a file."""
        if self.is_finished:
            return []
        # An earlier run may have chosen other shards.
        self.plan = ExtractionPlan.load(self.folder)
        shards = range(self.plan.num_shards)
        return [s for s in shards if not (self.folder / self.plan.shard_file(s)).is_file()]

    def extract(self, shards: Sequence[int], num_workers: int, on_progress: Progress) -> None:
        """Extract and write shards."""
        if not shards:
            return
        images = {shard: self.plan.images_of(shard) for shard in shards}
        self.buffers = {shard: ShardBuffer(indices) for shard, indices in images.items()}
        self._note_states(images)
        images = {shard: self._take_over(shard, indices) for shard, indices in images.items()}
        native = self.extractor.preparation.size is None
        size = 1 if native else self.extractor.capacity(*self.extractor.preparation.size)
        batches = [
            indices[first : first + size]
            for indices in images.values()
            for first in range(0, len(indices), size)
        ]
        loaded = load_batches(
            SourcePixels(self.source),
            batches,
            self.extractor.preparation,
            num_workers=min(num_workers, len(batches)),
            pin_memory=self.extractor.device.type == "cuda",
        )
        groups = self._groups(loaded, native, on_progress)
        for (shard, indices), parts in self.extractor.run(groups, self.fields.select):
            first = 0
            for part in parts:
                count = len(next(iter(part.values())))
                self.buffers[shard].add(indices[first : first + count], part)
                first += count
            on_progress(len(indices), 0)
            self._write_if_complete(shard)

    def _note_states(self, images: dict[int, range]) -> None:
        """What the files are before they are read: one that changes meanwhile differs later."""
        for shard, indices in images.items():
            paths = [self.source.path(index) for index in indices]
            states = file_states(paths, content=self.content)
            self.buffers[shard].states = dict(zip(indices, states, strict=True))

    def _take_over(self, shard: int, indices: range) -> list[int]:
        """Fill a shard with rows of the run before, and return the images that it lacks."""
        earlier = EarlierRun.of(self.earlier, self.out)
        buffer = self.buffers[shard]
        missing = []
        for index in indices:
            row = earlier and earlier.row(self.source.path(index), buffer.states[index])
            if row is None:
                missing.append(index)
            else:
                buffer.add([index], row)
        if not missing:
            self._write_if_complete(shard)
        return missing

    def _groups(
        self, loaded: Iterator, native: bool, on_progress: Progress
    ) -> Iterator[tuple[tuple[int, tuple[int, ...]], Tensor]]:
        """((shard, indices), pixels) in order; failures go straight into the buffers."""

        def usable() -> Iterator[tuple[int, tuple[int, ...], Tensor]]:
            for groups, left_out in loaded:
                for index, reason in left_out:
                    shard = index // self.plan.shard_size
                    self.buffers[shard].leave_out(index, reason)
                    on_progress(0, 1)
                    self._write_if_complete(shard)
                for indices, pixels in groups:
                    yield indices[0] // self.plan.shard_size, indices, pixels

        for shard, entries in groupby(usable(), key=lambda entry: entry[0]):
            batches = ((indices, pixels) for _, indices, pixels in entries)
            if native:
                single = ((indices[0], pixels[0]) for indices, pixels in batches)
                batches = group_by_size(single, self.extractor.capacity)
            for indices, pixels in batches:
                yield (shard, indices), pixels

    def _write_if_complete(self, shard: int) -> None:
        buffer = self.buffers[shard]
        if not buffer.is_complete:
            return
        header = {
            "key": self.plan.key,
            "paths": [self.source.path(index) for index in buffer.kept],
            "files": [buffer.states[index] for index in buffer.kept],
            "left_out": [
                {
                    "path": self.source.path(index),
                    "reason": reason,
                    "file": buffer.states[index],
                }
                for index, reason in sorted(buffer.left_out.items())
            ],
        }
        arrays = buffer.arrays(self.template, self.fields.ragged)
        write_shard(self.folder / self.plan.shard_file(shard), arrays, header)
        del self.buffers[shard]

    def finish(self) -> None:
        """Merge and write the index; on rank 0, when all shards are there."""
        if self.is_finished:
            if self.is_file:
                shutil.rmtree(self.folder, ignore_errors=True)
            shutil.rmtree(self.earlier, ignore_errors=True)
            return
        shards = [self.folder / self.plan.shard_file(s) for s in range(self.plan.num_shards)]
        headers = [self._header(shard) for shard in shards]
        paths = [path for header in headers for path in header["paths"]]
        left_out = [entry for header in headers for entry in header["left_out"]]
        if not paths:
            raise ValueError(
                f"none of {len(left_out)} images could be used, e.g. {left_out[0]['path']}: "
                f"{left_out[0]['reason']}"
            )
        if self.is_file:
            with atomic_write(self.out) as partial:
                merge_shards(shards, partial, self.out.suffix)
        index = {
            "format_version": FORMAT_VERSION,
            "num_images": len(paths),
            **self.description,
            "settings": self.plan.settings,
            "shards": [] if self.is_file else self._shard_entries(shards, headers),
            "left_out": left_out,
            "paths": paths,
            "files": [state for header in headers for state in header["files"]],
        }
        with atomic_write(self.index_file) as partial:
            partial.write_text(json.dumps(index, indent=1) + "\n", encoding="utf-8")
        if self.is_file:
            shutil.rmtree(self.folder)
        shutil.rmtree(self.earlier, ignore_errors=True)

    def _header(self, shard: Path) -> dict[str, Any]:
        header = read_shard_header(shard)
        if header["key"] != self.plan.key:
            raise ValueError(f"{shard} belongs to another run; delete it and repeat the command")
        return header

    def _shard_entries(self, shards: Sequence[Path], headers: Sequence[dict]) -> list[dict]:
        return [{"file": s.name, "rows": len(h["paths"])} for s, h in zip(shards, headers)]


def _options(settings: dict[str, Any]) -> dict[str, Any]:
    """Settings without the images, which may come and go."""
    source = {k: v for k, v in settings["source"].items() if k not in ("num_images", "paths")}
    return {**settings, "source": source}


# --- From a source to files ---


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
