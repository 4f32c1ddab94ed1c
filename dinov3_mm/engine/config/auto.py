"""Values 'auto' of a config: the rules, the facts that they need, and what follows from both."""

import copy
import math
import multiprocessing
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
from mmengine.config import Config, ConfigDict
from mmengine.registry import DATASETS, MODELS
from mmengine.utils import import_modules_from_strings

from dinov3_mm.datasets.evaluation_images import HeldOutSplit
from dinov3_mm.errors import ConfigError

# --- Hyper-parameters of continued pretraining from data set, batch, run length and backbone ---
#
# Every rule is a pure function that returns the value and one line that says how it came about.
# Where a number is taken from a released recipe (arXiv 2508.10104 and its configurations), the
# comment names it; the rest is a judgement, with its reason.


# A prototype needs images to stand for: the ImageNet recipe has 65,536 for 1.28 M images. More
# than a batch can fill leave Sinkhorn-Knopp with near-uniform targets: the largest released ratio
# is 262,144 for a batch of 4,096.
IMAGES_PER_PROTOTYPE = 20
PROTOTYPES_PER_BATCH_IMAGE = 64
PROTOTYPES = (256, 65536)

# Learning rate of a ViT-B at batch 1024; narrower networks take more and wider ones less, down to
# the rate at which the high-resolution stage adapts the 7B (7.07e-5 at batch 2048).
LR_AT_1024 = 1e-4
LR_WIDTH = 768
LEAST_LR_AT_1024 = 5e-5

# Long enough for random heads; as long as the released configuration that adapts a ViT-L.
EPOCHS = 20
ITERATION_LIMITS = (500, 25_000)

# EMA momentum 0.994 at batch 1920: the teacher averages the students of the last 320,000 images.
TEACHER_IMAGES = 1920 / (1 - 0.994)
TEACHER_SHARE = 0.1

HEAD_START_SHARE = 0.1
HEAD_START = (100, 1000)

HELD_OUT_IMAGES = 2000
HELD_OUT_EVERY = (5, 1000)

# What may be tried for a GPU, the most first, and what a process on the CPU gets.
IMAGES_PER_PROCESS = (128, 64, 32, 16, 8)
IMAGES_PER_CPU_PROCESS = 16
LARGEST_BATCH = 1024
# Of a GPU's memory. The rest is for evaluations, for what compiled blocks keep otherwise, and for
# the reserve of the plan: nobody looks at a batch that nobody chose before the run is over.
USABLE_MEMORY = 0.75


class Derived(NamedTuple):
    """A value and where it comes from, in words."""

    value: Any
    text: str


def held_out_every(num_images: int) -> Derived:
    """One image in how many is kept for evaluation: about 2000, a fifth of small sets."""
    low, high = HELD_OUT_EVERY
    every = min(max(round(num_images / HELD_OUT_IMAGES), low), high)
    return Derived(
        every, f"evaluation on 1 image in {every}, about {num_images // every} of {num_images}"
    )


def global_batch(per_process: int, world_size: int, accumulate: int, num_images: int) -> Derived:
    """Images of an optimizer step, not more than half of the data set.

    An image that is twice in a batch is its own nearest neighbour for KoLeo.
    """
    step = world_size * accumulate
    largest = max(step, min(LARGEST_BATCH, num_images // 2) // step * step)
    batch = min(per_process * step, largest)
    micro = f" x {accumulate} micro batches" if accumulate > 1 else ""
    cut = f", cut to {batch}" if batch < per_process * step else ""
    return Derived(
        batch,
        f"global batch {batch} = {per_process} images x {world_size} process(es){micro}{cut}",
    )


def iterations(num_images: int, batch: int) -> Derived:
    """Length of the run: 20 epochs, within the limits of ``ITERATIONS``."""
    low, high = ITERATION_LIMITS
    wanted = math.ceil(EPOCHS * num_images / batch)
    value = min(max(wanted, low), high)
    limit = f", at least {low}" if wanted < low else f", at most {high}" if wanted > high else ""
    source = f"{EPOCHS} epochs x {num_images} images / batch {batch}"
    return Derived(value, f"iterations {value} = {source}{limit}")


def prototypes(num_images: int, batch: int) -> Derived:
    """Prototypes of a head: as many as the images can fill, a power of two."""
    low, high = PROTOTYPES
    from_data = num_images / IMAGES_PER_PROTOTYPE
    from_batch = PROTOTYPES_PER_BATCH_IMAGE * batch
    value = min(max(_power_of_two(min(from_data, from_batch)), low), high)
    return Derived(
        value,
        f"prototypes {value} = power of two below {num_images} images / {IMAGES_PER_PROTOTYPE} and "
        f"{PROTOTYPES_PER_BATCH_IMAGE} x batch {batch}, within {low} to {high}",
    )


def learning_rate(width: int, batch: int) -> Derived:
    """Peak learning rate: by width, and with the square root of the batch relative to 1024."""
    base = max(LR_AT_1024 * LR_WIDTH / width, LEAST_LR_AT_1024)
    value = float(f"{base * math.sqrt(batch / 1024):.3g}")
    return Derived(
        value, f"learning rate {value:.3g} = {base:.3g} (width {width}) x sqrt({batch} / 1024)"
    )


def head_start(max_iters: int) -> Derived:
    """Iterations in which only the heads learn: a tenth of the run."""
    low, high = HEAD_START
    value = min(max(round(HEAD_START_SHARE * max_iters), low), high, max_iters // 4)
    return Derived(
        value,
        f"backbone frozen for {value} iterations = {HEAD_START_SHARE:.0%} of {max_iters}, within "
        f"{low} to {high} and a quarter of the run",
    )


def backbone_warmup(freeze: int) -> Derived:
    """Iterations over which the backbone's learning rate rises: as long as it was frozen."""
    return Derived(freeze, f"backbone warm-up {freeze} iterations, as long as the freeze")


def warmup(freeze: int) -> Derived:
    """Warm-up of the learning rate: over half of the freeze, so it concerns the heads."""
    return Derived(freeze // 2, f"learning-rate warm-up {freeze // 2} iterations, half the freeze")


def teacher_momentum(batch: int, max_iters: int) -> Derived:
    """EMA momentum that averages over as many images as the released recipe, and fits the run.

    Per image it is ``0.994 ** (batch / 1920)``. A teacher that averages over more than a tenth of
    the run would never follow.
    """
    released, share = TEACHER_IMAGES / batch, TEACHER_SHARE * max_iters
    horizon = max(min(released, share), 2.0)
    value = round(1 - 1 / horizon, 6)
    return Derived(
        value,
        f"EMA momentum {value:g}: averages over {horizon:.0f} iterations, the smaller of "
        f"{released:.0f} (0.994 ** ({batch} / 1920)) and {TEACHER_SHARE:.0%} of the run",
    )


def interval(what: str, max_iters: int, parts: int, largest: int | None = None) -> Derived:
    """Iterations between two events of which a run has ``parts``, or more in long runs."""
    value = max(1, max_iters // parts)
    value = value if largest is None else min(value, largest)
    return Derived(value, f"{what} every {value} iterations")


def _power_of_two(value: float) -> int:
    """Largest power of two that is not above ``value``, at least 1."""
    return 1 << max(0, math.floor(math.log2(max(value, 1))))


# --- From the values 'auto' to numbers ---


# Key of the config and of a checkpoint's meta data that keeps what was derived.
RECORD = "derived"

# Where 'auto' asks for a rule, beside the heads of the model.
SECTIONS = ("train_cfg", "train_dataloader", "optim_wrapper", "custom_hooks", "default_hooks")

BATCH = "train_cfg.global_batch_size"
ITERATIONS = "train_cfg.max_iters"
HEADS = ("model.dino_head.num_prototypes", "model.ibot_head.num_prototypes")
_SCHEDULE = "custom_hooks.OptimScheduleHook"
_TEACHER = "custom_hooks.TeacherEMAHook"
FREEZE = f"{_SCHEDULE}.backbone_freeze_iters"
LR = tuple(f"{_SCHEDULE}.lr{leaf}" for leaf in ("", ".base", ".peak", ".value"))
MOMENTUM = tuple(f"{_TEACHER}.momentum{leaf}" for leaf in ("", ".base", ".start", ".peak"))
SPLITS = ("train_dataloader.source.every", "custom_hooks.FolderEvalHook.every")
EVALUATIONS = ("FolderEvalHook", "KNNEvalHook", "RetrievalEvalHook", "DenseProbeHook")


@dataclass(frozen=True)
class DataFacts:
    """Sizes of the data set.

    Attributes:
        num_images: images of the source, held-out ones included.
        num_train: images that are trained on.
        every: one image in how many is held out; None without a split.
    """

    num_images: int
    num_train: int
    every: int | None


def resolve_auto(
    cfg: Config,
    *,
    world_size: int = 1,
    stored: Mapping[str, Any] | None = None,
    data: DataFacts | None = None,
    memory_gib: float | None = None,
) -> list[str]:
    """Settle every 'auto' of a pretraining config in place; explicit values stay.

    What was derived is kept in the config under ``derived``, so that its dump and every
    checkpoint hold it.

    Args:
        cfg: completed config.
        world_size: number of processes that will train.
        stored: ``derived`` of the checkpoint that is resumed; its values are taken over,
            whatever the data set is now.
        data: sizes of the data set; by default its source is built and counted.
        memory_gib: memory of a GPU; by default of this process's own.

    Returns:
        One line for each derivation.

    Raises:
        ConfigError: an 'auto' that no rule settles, or a source that cannot be built.
    """
    places = auto_places(cfg)
    if not places:
        return []
    if "backbone" not in cfg.model:
        raise ConfigError(
            f"{places[0]}: nothing is derived for a {cfg.model['type']}, whose students differ; "
            "give a number"
        )
    stored_values = dict((stored or {}).get("values", {}))
    every = next((stored_values[path] for path in SPLITS if path in stored_values), None)
    data = data or data_facts(cfg.train_dataloader["source"], every)
    scaler = _Scaler(cfg, stored_values)
    if stored_values:
        scaler.lines.append("hyper-parameters: as derived when the resumed run began")
        if stored["num_images"] != data.num_images:
            scaler.lines.append(
                f"the data set has {data.num_images} images, it had {stored['num_images']} when "
                "the run began: hyper-parameters stay as they were, the order of the images changes"
            )
    _settle_all(scaler, cfg, data, world_size, memory_gib or gpu_gib())
    left = auto_places(cfg)
    if left:
        raise ConfigError(
            "\n".join(f"{path}: no rule derives this value; give a number" for path in left)
        )
    record = dict(cfg.get(RECORD) or {}, num_images=data.num_images, values=scaler.values)
    cfg[RECORD] = ConfigDict(record)
    return scaler.lines


def _settle_all(
    scaler: "_Scaler",
    cfg: Config,
    data: DataFacts,
    world_size: int,
    memory_gib: float | None,
) -> None:
    """Apply the rules in the order in which they need each other's values."""
    if data.every is not None:
        scaler.settle(SPLITS, lambda: held_out_every(data.num_images))
    batch = scaler.settle([BATCH], lambda: _batch(scaler, data, world_size, memory_gib))
    iters = scaler.settle([ITERATIONS], lambda: iterations(data.num_train, batch))
    scaler.settle(HEADS, lambda: prototypes(data.num_train, batch))
    _refuse_double_scaling(scaler, cfg)
    scaler.settle(LR, lambda: learning_rate(_width(cfg.model["backbone"]), batch))
    freeze = scaler.settle([FREEZE], lambda: head_start(iters)) or 0
    scaler.settle([f"{_SCHEDULE}.lr.warmup_iters"], lambda: warmup(freeze))
    scaler.settle([f"{_SCHEDULE}.backbone_warmup_iters"], lambda: backbone_warmup(freeze))
    scaler.settle(MOMENTUM, lambda: teacher_momentum(batch, iters))
    hooks = [f"custom_hooks.{name}.interval" for name in EVALUATIONS]
    scaler.settle(hooks, lambda: interval("evaluation", iters, 10))
    scaler.settle(
        ["default_hooks.checkpoint.interval"],
        lambda: interval("checkpoint", iters, 10, 1000),
    )
    scaler.settle(
        ["custom_hooks.DiagnosisHook.interval"],
        lambda: interval("diagnosis", iters, 50, 200),
    )


def _batch(
    scaler: "_Scaler", data: DataFacts, world_size: int, memory_gib: float | None
) -> Derived:
    """The largest batch of a power of two images for each process whose step is predicted to fit
    the GPU, the least where none is.
    """
    accumulate = scaler.get("train_cfg.accumulate") or 1
    batch_of = partial(
        global_batch,
        world_size=world_size,
        accumulate=accumulate,
        num_images=data.num_train,
    )
    if memory_gib is None:
        return batch_of(IMAGES_PER_CPU_PROCESS)
    for images in IMAGES_PER_PROCESS:
        batch = batch_of(images)
        tried = _Scaler(copy.deepcopy(scaler.cfg), scaler.stored)
        tried.settle([BATCH], partial(batch_of, images))
        # Logits are part of the memory.
        tried.settle(HEADS, partial(prototypes, data.num_train, batch.value))
        gib = _predicted_peak(tried.cfg, world_size, data.num_images) / 2**30
        if gib <= USABLE_MEMORY * memory_gib:
            return batch
    needed = f"{gib:.1f} GiB are predicted, of {memory_gib:g} GiB"
    return Derived(batch.value, f"{batch.text}; {needed}: tools/plan.py names what saves memory")


def _predicted_peak(cfg: Config, world_size: int, num_images: int) -> int:
    """Bytes of the fullest step: from the plan, and from a dry run where it knows no formula."""
    # The plan and the dry run complete configs, so they import this module.
    from dinov3_mm.engine.plan import UnknownStepError, own_peaks

    try:
        return max(own_peaks(cfg, world_size))
    except UnknownStepError:
        # In a process of its own: this one may belong to a process group and have a GPU.
        with multiprocessing.get_context("spawn").Pool(1) as pool:
            try:
                return pool.apply(_measured_peak, (cfg, world_size, num_images))
            except (RuntimeError, ValueError) as error:
                raise ConfigError(
                    f"{BATCH}='auto' follows from the memory of a step, and a dry run of this one "
                    f"failed ({error}); give a number"
                ) from error


def _measured_peak(cfg: Config, world_size: int, num_images: int) -> int:
    import dinov3_mm.engine  # noqa: F401  (registers what configs name)
    from dinov3_mm.engine.dry_run import dry_run

    if "custom_imports" in cfg:
        import_modules_from_strings(**cfg.custom_imports)
    steps = dry_run(cfg, world_size, num_images=num_images).steps
    return max(step.peak.total for step in steps)


def _width(backbone_cfg: Mapping) -> int:
    """Channels of a token of the backbone, which is built without storage."""
    cfg = {key: value for key, value in backbone_cfg.items() if key != "init_cfg"}
    with torch.device("meta"):
        return MODELS.build(cfg).embed_dims


def data_facts(source_cfg: Mapping, every: int | None = None) -> DataFacts:
    """Count the images of a training source.

    Args:
        source_cfg: config of ``train_dataloader.source``.
        every: share of a ``HeldOutSplit`` that says 'auto'; None derives it.

    Raises:
        ConfigError: the source says no folder, or cannot be built.
    """
    is_split = source_cfg["type"] in ("HeldOutSplit", HeldOutSplit)
    inner_cfg = source_cfg["source"] if is_split else source_cfg
    try:
        inner = DATASETS.build(copy.deepcopy(dict(inner_cfg)))
    except (OSError, ValueError, TypeError) as error:
        raise ConfigError(f"train_dataloader.source: {error}") from error
    if not is_split:
        return DataFacts(len(inner), len(inner), None)
    if source_cfg["every"] != "auto":
        every = source_cfg["every"]
    elif every is None:
        every = held_out_every(len(inner)).value
    return DataFacts(len(inner), len(HeldOutSplit(inner, "train", every)), every)


def gpu_gib() -> float | None:
    """Memory of this process's GPU; None without one."""
    if not torch.cuda.is_available():
        return None
    return torch.cuda.get_device_properties(torch.cuda.current_device()).total_memory / 2**30


def auto_places(cfg: Mapping) -> list[str]:
    """Paths of the values 'auto'; arguments of the backbone have 'auto' of their own."""
    places = []
    for key in SECTIONS:
        places += _auto_below(cfg.get(key), key)
    for head in ("dino_head", "ibot_head"):
        places += _auto_below(cfg["model"].get(head), f"model.{head}")
    return places


def _auto_below(value: object, path: str) -> list[str]:
    if isinstance(value, Mapping):
        children = value.items()
    elif isinstance(value, (list, tuple)):
        children = enumerate(value)
    else:
        return [path] if isinstance(value, str) and value == "auto" else []
    return [place for key, item in children for place in _auto_below(item, f"{path}.{key}")]


def _refuse_double_scaling(scaler: "_Scaler", cfg: Config) -> None:
    rule = scaler.get(f"{_SCHEDULE}.scaling_rule")
    if rule is not None and any(scaler.get(path) == "auto" for path in LR):
        raise ConfigError(
            f"{_SCHEDULE}: the learning rate 'auto' follows the batch already; remove "
            f"scaling_rule={rule!r}"
        )


class _Scaler:
    """A config whose hooks are named by their types, and what was derived in it."""

    def __init__(self, cfg: Config, stored: Mapping[str, Any]) -> None:
        self.cfg, self.stored = cfg, stored
        self.lines: list[str] = []
        self.values: dict[str, Any] = {}

    def settle(self, paths: tuple | list, derive: Callable[[], Derived]) -> Any:
        """Give all ``paths`` that say 'auto' one value; return that of the first that exists."""
        automatic = [path for path in paths if self.get(path) == "auto"]
        for path in automatic:
            if path in self.stored:
                self._set(path, self.stored[path])
        fresh = [path for path in automatic if path not in self.stored]
        if fresh:
            value, line = derive()
            self.lines.append(line)
            for path in fresh:
                self._set(path, value)
        return next((self.get(path) for path in paths if self.get(path) is not None), None)

    def get(self, path: str) -> Any:
        """The value at a path, None where there is none."""
        node: Any = self.cfg
        for key in path.split("."):
            node = self._child(node, key)
            if node is None:
                return None
        return node

    def _set(self, path: str, value: Any) -> None:
        *parents, leaf = path.split(".")
        node: Any = self.cfg
        for key in parents:
            node = self._child(node, key)
        node[leaf] = value
        self.values[path] = value

    @staticmethod
    def _child(node: Any, key: str) -> Any:
        if isinstance(node, (list, tuple)):
            return next((hook for hook in node if hook.get("type") == key), None)
        return node.get(key) if isinstance(node, (Mapping, Config)) else None
