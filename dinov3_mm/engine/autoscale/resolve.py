"""Replaces the values 'auto' of a config by what the rules derive, and tells how."""

from collections.abc import Callable, Mapping
from typing import Any

from mmengine.config import Config, ConfigDict

from dinov3_mm.engine.config import ConfigError

from . import rules
from .facts import (
    BackboneFacts,
    DataFacts,
    auto_places,
    backbone_facts,
    data_facts,
    gpu_gib,
    tokens_per_image,
)
from .rules import Derived

# Key of the config and of a checkpoint's meta data that keeps what was derived.
RECORD = "derived"

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
    backbone = backbone_facts(cfg.model["backbone"])
    _settle_all(scaler, cfg, data, backbone, world_size, memory_gib or gpu_gib())
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
    backbone: BackboneFacts,
    world_size: int,
    memory_gib: float | None,
) -> None:
    """Apply the rules in the order in which they need each other's values."""
    accumulate = cfg.train_cfg.get("accumulate", 1)
    if data.every is not None:
        scaler.settle(SPLITS, lambda: rules.held_out_every(data.num_images))
    per_process = rules.images_per_process(
        backbone.num_params,
        backbone.width,
        tokens_per_image(cfg.train_dataloader.get("transform", {}), backbone.token_stride),
        memory_gib,
        is_conv=backbone.is_conv,
    )
    batch = scaler.settle(
        [BATCH], lambda: rules.global_batch(per_process, world_size, accumulate, data.num_train)
    )
    iters = scaler.settle([ITERATIONS], lambda: rules.iterations(data.num_train, batch))
    scaler.settle(HEADS, lambda: rules.prototypes(data.num_train, batch))
    _refuse_double_scaling(scaler, cfg)
    scaler.settle(LR, lambda: rules.learning_rate(backbone.width, batch))
    freeze = scaler.settle([FREEZE], lambda: rules.head_start(iters)) or 0
    scaler.settle([f"{_SCHEDULE}.lr.warmup_iters"], lambda: rules.warmup(freeze))
    scaler.settle([f"{_SCHEDULE}.backbone_warmup_iters"], lambda: rules.backbone_warmup(freeze))
    scaler.settle(MOMENTUM, lambda: rules.teacher_momentum(batch, iters))
    hooks = [f"custom_hooks.{name}.interval" for name in EVALUATIONS]
    scaler.settle(hooks, lambda: rules.interval("evaluation", iters, 10))
    scaler.settle(
        ["default_hooks.checkpoint.interval"],
        lambda: rules.interval("checkpoint", iters, 10, 1000),
    )
    scaler.settle(
        ["custom_hooks.DiagnosisHook.interval"],
        lambda: rules.interval("diagnosis", iters, 50, 200),
    )


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
