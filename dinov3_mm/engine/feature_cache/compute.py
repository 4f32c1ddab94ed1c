"""Backbone features of a data set: which are missing, and their computation."""

import json
import math
import shutil
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from mmengine.config import Config
from mmengine.dataset import Compose
from mmengine.dist import broadcast_object_list, get_rank, get_world_size
from mmengine.registry import DATASETS, DefaultScope
from rich.progress import track
from torch.utils.data import DataLoader, Dataset

from dinov3_mm.checkpoints import atomic_write
from dinov3_mm.checkpoints.frozen import fingerprint
from dinov3_mm.datasets.images import BrokenImageError
from dinov3_mm.datasets.loader import init_worker
from dinov3_mm.datasets.transforms.host_steps import ORIENTATION
from dinov3_mm.errors import ConfigError, hint
from dinov3_mm.features.frozen import together
from dinov3_mm.features.store import SHARD_BYTES, FileState, file_states, is_same, some
from dinov3_mm.models.precision import DTYPES, SWITCH, describe_choice

from .store import Batch, Call, FeatureStore, Place, Sample, flatten, map_outputs, origin_key
from .store import size_of as size_of_sample
from .views import (
    CachedModel,
    NotCacheableError,
    SeenError,
    Views,
    drawn_from,
    for_features,
    plain,
    recorded,
    stamp,
    without_pipeline,
)

ORIGIN = "origin.json"
_TRIES = 8


@dataclass
class CachedData:
    """A data set whose images have features.

    Attributes:
        dataset: gives records without any step.
        views: their pipelines.
        num_views: of each image.
        training: preprocess and call the model as in training.
        scope: host of the steps.
    """

    dataset: Any
    views: Views
    num_views: int
    training: bool
    scope: str

    @property
    def names(self) -> list[str]:
        """Names of the views."""
        return [self.views.name(view) for view in range(self.num_views)]


def build_data(
    loader: dict, views: Views, num_views: int, training: bool, scope: str
) -> CachedData:
    """Build the data set of a loader for :func:`compute_features`."""
    with DefaultScope.overwrite_default_scope(scope):
        dataset = DATASETS.build(without_pipeline(loader["dataset"]))
    if hasattr(dataset, "full_init"):
        dataset.full_init()
    num_views = num_views if views.further else 1
    return CachedData(dataset, views, num_views, training, scope)


def image_keys(dataset: Any, config: dict) -> list[str]:
    """Names of the images of a data set, under which a cache finds them again.

    An image that is no file, as a rendered one, belongs to the data set that makes it.
    """
    of_config = origin_key(json.loads(json.dumps(Config(dict(d=config)).to_dict(), default=str)))
    name = getattr(dataset, "image_name", None)
    names = (
        str(name(i) if name else dataset.get_data_info(i)["img_path"]) for i in range(len(dataset))
    )
    paths = [Path(name) for name in names]
    return [str(p.absolute()) if p.is_file() else f"{of_config}:{p}" for p in paths]


def compute_features(
    cfg: Config,
    cached: CachedModel,
    data: CachedData,
    loader: dict,
    folder: Path,
    *,
    dtype: str = "fp32",
    content: bool = False,
) -> list[str]:
    """Write what the frozen part of a model gives for every image of a data set.

    What is there already is kept where image, preprocessing and backbone are the same: images that
    were added or have changed are computed, whatever the labels. A computation that was interrupted
    goes on. Ranks share the images; an error on one of them ends all.

    Args:
        cfg: config of a host.
        cached: its model.
        data: its data set.
        loader: config of the data loader: batch size and workers.
        folder: where to write.
        dtype: of stored features, 'fp32' or 'bf16'; half the size with bf16. The backbone computes
            in the config's ``compute_dtype``, as it does in training; the cache states both.
        content: compare files by a hash of their bytes too.

    Returns:
        Lines for the log.

    Raises:
        ConfigError: features that would change in training, a folder with a cache of something
            else, a disk that is too small.
        NotCacheableError: a model that does not call its backbone image by image.
    """
    if dtype not in DTYPES:
        raise ConfigError(f"feature cache: dtype is {dtype!r}; {hint(dtype, DTYPES)}")
    origin = _origin(cfg, cached, data, dtype)
    _check_same(folder, origin)
    config = without_pipeline(loader["dataset"])
    keys = image_keys(data.dataset, config)
    plan = _on_first_rank(lambda: _missing(folder, origin, keys, data, content))
    jobs, states, first_shard, lines = plan
    total = f"features of {len(keys)} samples"
    if not jobs:
        line = f"{total} from {folder}: computed in {cached.computed}, stored as {dtype}"
        return [line, *lines]
    worker = _Computation(cached, data, keys, dtype)
    together("the feature cache", lambda: _check(worker, folder, jobs))
    _on_first_rank(lambda: _claim(folder, origin))
    store = FeatureStore(folder, origin_key(origin))
    _run(worker, loader, jobs, states, store, first_shard, dtype)
    store = FeatureStore(folder, origin_key(origin))
    _on_first_rank(store.delete_unused)
    size = sum(file.stat().st_size for file in folder.glob("*.safetensors")) / 2**30
    asked = describe_choice(cached.asked, cached.computed, cached.device)
    line = f"computed {total} into {folder}: {size:.2f} GiB, {dtype}; computed in {asked}"
    return [line, *lines]


def _missing(
    folder: Path, origin: dict, keys: list[str], data: CachedData, content: bool
) -> tuple[list[tuple[int, int]], dict[str, FileState | None], int, list[str]]:
    """(index, view) without features, states of files, the next shard, and lines that say why."""
    store = FeatureStore(folder, origin_key(origin))
    states = dict(zip(keys, file_states(keys, content=content), strict=True))
    jobs, done, changed, new = [], set(), [], []
    for index, key in enumerate(keys):
        if key in done:
            continue  # listed twice
        done.add(key)
        for view, name in enumerate(data.names):
            place = store.places.get((key, name))
            if place is not None and is_same(place.state, states[key]):
                continue
            jobs.append((index, view))
            if not view:
                (new if place is None else changed).append(key)
    lines = []
    known = {path for path, _ in store.places}
    gone = known - states.keys()
    if changed:
        lines.append(f"{len(changed)} images have changed since: computed anew: {some(changed)}")
    if new and known:
        lines.append(f"{len(new)} images are new: {some(new)}")
    if gone:
        lines.append(
            f"{len(gone)} images in {folder} are not in this data set and are not used: "
            f"{some(sorted(gone))}"
        )
    unseen = [key for key, state in states.items() if state is None]
    if unseen and data.training:
        lines.append(f"{len(unseen)} images are no files: changes of them are not noticed")
    return jobs, states, store.next_shard, lines


class _Steps(Dataset):
    """Prepared inputs of jobs, made by worker processes."""

    def __init__(self, data: CachedData, keys: list[str], jobs: Sequence[tuple[int, int]]) -> None:
        self.data, self.keys, self.jobs = data, keys, jobs
        self._pipelines: dict[int, tuple[Compose, Compose]] = {}

    def __len__(self) -> int:
        return len(self.jobs)

    def __getitem__(self, number: int) -> tuple[tuple[int, int], dict | str]:
        index, view = self.jobs[number]
        try:
            return (index, view), self.prepared(index, view)
        except BrokenImageError as error:
            if not self.data.training:
                raise  # a score over fewer images is no score
            return (index, view), str(error)

    def prepared(self, index: int, view: int, salt: int = 0) -> dict:
        """A sample as the pipeline packs it, with what is needed to repeat the steps."""
        load, rest = self._pipeline(view)
        with drawn_from(self.keys[index], view, salt):
            record = load(self.data.dataset[index])
            original = (*record["img"].shape[:2], record.get(ORIENTATION, 1))
            packed = rest(record)
            return {**packed, "original": original, "stamp": stamp()}

    def _pipeline(self, view: int) -> tuple[Compose, Compose]:
        if view not in self._pipelines:
            steps = for_features(self.data.views.steps(view))
            with DefaultScope.overwrite_default_scope(self.data.scope):
                self._pipelines[view] = Compose(steps[:1]), Compose(steps[1:])
        return self._pipelines[view]


class _Computation:
    """Runs a model on prepared inputs and keeps what its frozen part gives."""

    def __init__(self, cached: CachedModel, data: CachedData, keys: list[str], dtype: str) -> None:
        self.cached, self.data, self.keys = cached, data, keys
        self.dtype = DTYPES[dtype]
        self.steps = _Steps(data, keys, ())

    @torch.no_grad()
    def samples(self, prepared: Sequence[dict]) -> list[Sample]:
        """Samples of prepared inputs of any sizes, equal sizes together."""
        groups: dict[torch.Size, list[int]] = {}
        for number, item in enumerate(prepared):
            groups.setdefault(item["inputs"].shape, []).append(number)
        found: list[Sample | None] = [None] * len(prepared)
        for numbers in groups.values():
            parts = [prepared[number] for number in numbers]
            calls = self._calls(parts)
            for row, (number, part) in enumerate(zip(numbers, parts, strict=True)):
                own = [
                    Call(map_outputs(lambda t, r=row: t[r].to(self.dtype).cpu(), outputs), size)
                    for outputs, size in calls
                ]
                found[number] = Sample(own, part["original"], part["stamp"])
        return found

    def _calls(self, parts: list[dict]) -> list[tuple[Any, tuple[int, int]]]:
        batch = {key: [part[key] for part in parts] for key in ("inputs", "data_samples")}
        calls: list[tuple[Any, tuple[int, int]]] = []
        model = self.cached.model
        with recorded(self.cached.frozen, calls, stop=self.data.training):
            if self.data.training:
                inputs = model.data_preprocessor(batch, True)["inputs"]
                with suppress(SeenError):
                    model.extract_feat(inputs)
            else:
                model.test_step(batch)
        for outputs, _ in calls:
            if any(len(leaf) != len(parts) for leaf in flatten(outputs)[0]):
                raise NotCacheableError(
                    "the model gives its backbone other batches than one image each"
                )
        if not calls:
            raise NotCacheableError("the model does not call its backbone")
        return calls


def _check(worker: _Computation, folder: Path, jobs: Sequence[tuple[int, int]]) -> None:
    """Refuse a pipeline that is random without saying so, and a disk that is too small."""
    sample = None
    for index in dict.fromkeys(index for index, _ in jobs[:_TRIES]):
        try:
            first, second = (worker.steps.prepared(index, 0, salt) for salt in (0, 1))
        except BrokenImageError:
            continue
        a, b = first["inputs"], second["inputs"]
        if a.shape != b.shape or not torch.equal(a, b):
            types = [step["type"] for step in worker.data.views.first]
            raise ConfigError(
                f"feature cache: {worker.keys[index]} came out differently when it was read twice; "
                f"a step of the pipeline is random ({types})"
            )
        sample = sample or worker.samples([first])[0]
    if sample is None:
        return
    place = next(parent for parent in (folder, *folder.absolute().parents) if parent.exists())
    need, free = size_of_sample(sample) * len(jobs), shutil.disk_usage(place).free
    if need > free:
        raise DiskError(
            f"feature cache: {len(jobs)} views of {len(worker.keys)} images need about "
            f"{need / 2**30:.1f} GiB, {place} has {free / 2**30:.1f} GiB free; give a folder on "
            "another disk, fewer --cache-views, --cache-dtype bf16, or smaller images"
        )


class DiskError(ConfigError):
    """Features that do not fit on the disk."""


def _run(
    worker: _Computation,
    loader: dict,
    jobs: list[tuple[int, int]],
    states: dict[str, FileState | None],
    store: FeatureStore,
    first_shard: int,
    dtype: str,
) -> None:
    """Compute this rank's share; the ranks meet after every batch, so that an error ends all."""
    rank, ranks = get_rank(), get_world_size()
    size = max(1, loader.get("batch_size", 1))
    workers = loader.get("num_workers", 0)
    mine = jobs[rank::ranks]
    rounds = math.ceil(math.ceil(len(jobs) / ranks) / size)
    batches = iter(
        DataLoader(
            _Steps(worker.data, worker.keys, mine),
            batch_size=size,
            num_workers=min(workers, len(mine)),
            collate_fn=list,
            worker_init_fn=init_worker,
            generator=torch.Generator(),  # else the loader draws from the global generator
        )
    )
    batch = Batch()
    number = first_shard + rank

    def step(is_last: bool) -> None:
        nonlocal batch, number
        usable = []
        for job, item in next(batches, []):
            key = worker.keys[job[0]], worker.data.views.name(job[1])
            if isinstance(item, str):
                batch.leave_out(key, states[key[0]], item)
            else:
                usable.append((key, item))
        found = worker.samples([item for _, item in usable])
        for (key, _), sample in zip(usable, found, strict=True):
            batch.add(key, states[key[0]], sample)
        if (is_last or batch.num_bytes >= SHARD_BYTES) and (batch.samples or batch.left_out):
            store.write(number, batch, dtype)
            batch, number = Batch(), number + ranks

    description = f"features of {len(jobs)} views"
    for turn in track(range(rounds), description=description, disable=rank != 0):
        together("the feature cache", lambda last=turn == rounds - 1: step(last))


def _origin(cfg: Config, cached: CachedModel, data: CachedData, dtype: str) -> dict[str, Any]:
    """JSON values on which all features of a cache depend; images come and go."""
    backbone = cached.model.backbone
    frozen = cached.frozen
    origin = {
        "format_version": 2,
        "pipeline": plain(for_features(data.views.first)),
        "preprocessor": Config(dict(p=cfg.model.data_preprocessor)).to_dict()["p"],
        "backbone": {
            "fingerprint": fingerprint(frozen),
            "out_indices": list(getattr(frozen, "out_indices", ())),
            "out_type": getattr(frozen, "out_type", None),
            "final_norm": getattr(frozen, "final_norm", None),
            "layers": list(getattr(backbone, "interaction_indexes", ())),
            "windows": getattr(backbone, "num_windows", None),
        },
        "calls": None if data.training else Config(dict(t=_test_options(cfg))).to_dict()["t"],
        "dtype": dtype,
        SWITCH: cached.computed,
    }
    return json.loads(json.dumps(origin))  # tuples become lists, as in the file


def _test_options(cfg: Config) -> dict:
    """What of a model's test options decides its calls of the backbone."""
    found = cfg.model.get("test_cfg") or {}
    return {name: found[name] for name in ("mode", "crop_size", "stride", "flip") if name in found}


def differences(origin: dict, other: dict, prefix: str = "") -> list[str]:
    """Dotted names of the values in which two origins differ."""
    found = []
    for name in sorted({*origin, *other}):
        mine, theirs = origin.get(name), other.get(name)
        if isinstance(mine, dict) and isinstance(theirs, dict):
            found += differences(mine, theirs, f"{prefix}{name}.")
        elif mine != theirs:
            found.append(f"{prefix}{name}")
    return found


def _check_same(folder: Path, origin: dict[str, Any]) -> None:
    """Refuse a folder that is the place of another cache, complete or begun."""
    mark = folder / ORIGIN
    if not mark.is_file():
        return
    found = json.loads(mark.read_text())
    if "format_version" not in found:
        raise ConfigError(
            f"feature cache: {folder} was written by an earlier version, which did not note the "
            "files; remove it, or give another folder"
        )
    changed = differences(found, origin)
    if changed:
        advice = f" ({SWITCH}={found[SWITCH]} goes on with it)" if changed == [SWITCH] else ""
        raise ConfigError(
            f"feature cache: {folder} was made from something else: {', '.join(changed)} differ; "
            f"give another folder, or remove it{advice}"
        )


def _claim(folder: Path, origin: dict[str, Any]) -> None:
    """Mark a folder as the place of this cache."""
    folder.mkdir(parents=True, exist_ok=True)
    with atomic_write(folder / ORIGIN) as partial:
        partial.write_text(json.dumps(origin, indent=2) + "\n")


def _on_first_rank(work: Callable[[], Any]) -> Any:
    """The result of rank 0, on all ranks."""
    result = together("the feature cache", lambda: work() if get_rank() == 0 else None)
    if get_world_size() == 1:
        return result
    answer = [result]
    broadcast_object_list(answer)
    return answer[0]


def place_of(store: FeatureStore, key: str, view: str) -> Place:
    """Where an image lies in a complete cache."""
    place = store.places.get((key, view))
    if place is None:
        raise ConfigError(
            f"feature cache: {store.folder} has no features of {key}; it was added after they were "
            "computed: start again"
        )
    return place
