"""Check of a whole config before anything is built from it.

MMEngine ignores a misspelt top-level key, and reports a misspelt argument only when the part that
has it is built, which may be after minutes. Here every ``type=`` in the config is resolved and its
arguments are compared with the signature.
"""

import inspect
from collections.abc import Callable, Iterator, Mapping

import torch
from mmengine import registry as registries
from mmengine._strategy import BaseStrategy
from mmengine.config import Config, ConfigDict
from mmengine.dist import is_distributed
from mmengine.registry import MODELS, RUNNERS, Registry

from dinov3_mm.datasets.loader import LOADER_KEYS, MASKING_KEYS
from dinov3_mm.datasets.order import BatchLayout
from dinov3_mm.errors import ConfigError, accepted_keywords, hint, nearest
from dinov3_mm.models.pretraining.multi_distillation import merged_student


def is_host_config(cfg: Mapping) -> bool:
    """Whether a config belongs to MMEngine's plain Runner, as those of the hosts do."""
    return cfg.get("runner_type") != "FlexibleRunner"


# --- What a pretraining config need not say ---


DEFAULT_PATCH_SIZE = 16

# A ConvNeXt has no patch size that says how far apart its tokens are.
TOKEN_STRIDES = {"DINOv3ConvNeXt": 32}
# Networks of other libraries are asked.
MEASURED = ("TimmBackbone", "FeatureMapBackbone")

MULTI_DISTILLATION = "MultiDistillation"

# MMEngine's default hooks read every metric to the host in each iteration, count epochs and shuffle
# by epoch; ours take their slots. The slots are the names that FlexibleRunner knows.
DEFAULT_HOOKS: dict[str, dict | None] = {
    "runtime_info": None,
    "timer": None,
    "sampler_seed": None,
    "param_scheduler": None,
    "logger": {"type": "ProgressHook"},
    "checkpoint": {"type": "PretrainCheckpointHook"},
}


def fill_defaults(cfg: Config) -> None:
    """Complete a pretraining config in place: seed, default hooks, strategy, environment.

    With several processes a ``PretrainStrategy`` becomes a ``PretrainDDPStrategy``; several
    students have a ``MultiDistillationStrategy``.

    Args:
        cfg (Config): A config with ``runner_type='FlexibleRunner'``.
    """
    hooks = cfg.get("default_hooks") or {}
    cfg.default_hooks = ConfigDict({**DEFAULT_HOOKS, **hooks})
    cfg.env_cfg = cfg.get("env_cfg") or ConfigDict()
    randomness = cfg.get("randomness") or {}
    cfg.randomness = ConfigDict({**randomness, "seed": randomness.get("seed") or 0})
    is_multi = cfg.model["type"] == MULTI_DISTILLATION
    usual = f"{MULTI_DISTILLATION}Strategy" if is_multi else "PretrainStrategy"
    strategy = cfg.get("strategy") or ConfigDict(type=usual)
    if is_distributed() and strategy["type"] == "PretrainStrategy":
        strategy["type"] = "PretrainDDPStrategy"
    cfg.strategy = strategy
    accumulate = (cfg.get("train_cfg") or {}).get("accumulate", 1)
    if accumulate != 1:
        cfg.optim_wrapper.setdefault("accumulative_counts", accumulate)
    masking = cfg.train_dataloader.setdefault("masking", ConfigDict())
    masking.setdefault("patch_size", token_stride_of(cfg))


def token_stride_of(cfg: Mapping) -> int | list[int]:
    """Pixels between neighbouring patch tokens of the backbone that the config trains.

    Of several students all that occur, if they differ.
    """
    model = cfg["model"]
    if model.get("type") != MULTI_DISTILLATION:
        return _stride(model.get("backbone", {}))
    shared = model.get("student") or {}
    students = (merged_student(shared, changes) for changes in model["students"].values())
    strides = sorted({_stride(student.get("backbone", {})) for student in students})
    return strides[0] if len(strides) == 1 else strides


def _stride(backbone: Mapping) -> int:
    if backbone.get("type") in TOKEN_STRIDES:
        return TOKEN_STRIDES[backbone["type"]]
    if backbone.get("type") not in MEASURED:
        return backbone.get("patch_size") or DEFAULT_PATCH_SIZE
    with torch.device("meta"):
        built = MODELS.build({key: v for key, v in backbone.items() if key != "init_cfg"})
    return built.token_stride


# --- The check ---


# Top-level keys that MMEngine reads beside the runner's own arguments.
CONFIG_KEYS = frozenset(
    {"runner_type", "custom_imports", "launcher", "env_cfg", "default_scope", "stage"}
)
# What ``stage`` may hold; see :mod:`dinov3_mm.engine.config.from_stage`.
STAGE_KEYS = ("kind", "iterations", "gram_iter")

# A typo is nearer to its Runner key than this; a helper variable is not (train_data, model_dim).
_TYPO_CUTOFF = 0.85

# Hooks that look at one student, its optimizer or its metrics.
HOOKS_OF_A_STUDENT = frozenset(
    {
        "CollapseGuardHook",
        "DenseProbeHook",
        "DiagnosisHook",
        "FolderEvalHook",
        "KNNEvalHook",
        "NonFiniteGuardHook",
        "OptimScheduleHook",
        "RetrievalEvalHook",
        "SummaryHook",
        "TeacherEMAHook",
    }
)

# Keys that always hold a part of one registry. Other parts are looked for in all registries.
_REGISTRY_OF_KEY: dict[str, Registry] = {
    "backbone": registries.MODELS,
    "custom_hooks": registries.HOOKS,
    "data_preprocessor": registries.MODELS,
    "default_hooks": registries.HOOKS,
    "hook": registries.HOOKS,
    "init_cfg": registries.WEIGHT_INITIALIZERS,
    "model": registries.MODELS,
    "optim_wrapper": registries.OPTIM_WRAPPERS,
    "optimizer": registries.OPTIMIZERS,
    "source": registries.DATASETS,
    "strategy": registries.STRATEGIES,
    "train_cfg": registries.LOOPS,
    "transform": registries.TRANSFORMS,
    "vis_backends": registries.VISBACKENDS,
    "visualizer": registries.VISUALIZERS,
}

# Arguments that the builder of a registry reads before the part is called.
_BUILDER_KEYS: dict[str, frozenset[str]] = {
    registries.HOOKS.name: frozenset({"priority"}),
    registries.OPTIM_WRAPPERS.name: frozenset({"constructor", "paramwise_cfg", "optimizer"}),
    registries.WEIGHT_INITIALIZERS.name: frozenset({"override", "name"}),
}


def check_config(cfg: Mapping, *, world_size: int = 1) -> None:
    """Check keys, types and arguments of a pretraining config.

    Args:
        cfg (Mapping): The config; ``custom_imports`` must already be imported.
        world_size (int): Number of processes that will train.

    Raises:
        ConfigError: With one line per finding: a top-level key that is nearly a Runner key, a
            ``type`` that is in no registry, an argument that its ``type`` does not take, a global
            batch that the processes and micro batches do not divide, two places that disagree.
    """
    findings = [*_check_top_level(cfg), *_check_untyped(cfg), *_check_students(cfg)]
    if "global_batch_size" in (cfg.get("train_cfg") or {}):
        findings += [*_check_batch(cfg, world_size), *_check_patch_size(cfg)]
    for key, value in cfg.items():
        findings += _check_value(value, key, _REGISTRY_OF_KEY.get(key))
    if findings:
        raise ConfigError("\n".join(findings))


def runner_keys(cfg: Mapping) -> frozenset[str]:
    """Top-level keys that the config's runner or MMEngine reads."""
    runner = RUNNERS.get(cfg.get("runner_type", "Runner"))
    if runner is None:
        known = RUNNERS.module_dict
        raise ConfigError(
            f"runner_type: unknown runner {cfg['runner_type']!r}; {hint(cfg['runner_type'], known)}"
        )
    return frozenset(inspect.signature(runner).parameters) - {"cfg"} | CONFIG_KEYS


def untyped_keys(cfg: Mapping) -> dict[str, frozenset[str]]:
    """Names that may stand in the dicts without ``type`` that a pretraining run reads, by path."""
    if cfg.get("runner_type") != "FlexibleRunner":
        return {}
    environment = accepted_keywords(BaseStrategy._setup_env) - {"self", "launcher", "randomness"}
    return {
        "env_cfg": environment,
        "randomness": accepted_keywords(BaseStrategy._set_randomness) - {"self"},
        "stage": frozenset(STAGE_KEYS),
        "train_dataloader": frozenset(LOADER_KEYS),
        "train_dataloader.masking": frozenset(MASKING_KEYS),
    }


def accepted_at(owner: Mapping, key: str | None) -> frozenset[str] | None:
    """Arguments that may stand in the dict ``owner``, the value of ``key`` in its parent.

    Returns:
        frozenset[str] | None: The names; None when ``owner`` has no ``type`` or takes anything.
    """
    if "type" not in owner:
        return None
    found = _resolve(owner["type"], _REGISTRY_OF_KEY.get(key))
    return None if found is None else _accepted(*found)


def _check_top_level(cfg: Mapping) -> Iterator[str]:
    known = runner_keys(cfg)
    for key in cfg:
        meant = None if key in known else nearest(key, known, cutoff=_TYPO_CUTOFF)
        if meant is not None:
            yield f"{key}: not a Runner key, did you mean {meant!r}? (a helper needs another name)"
    for slot in cfg.get("default_hooks") or {}:
        meant = None if slot in DEFAULT_HOOKS else nearest(slot, DEFAULT_HOOKS, cutoff=_TYPO_CUTOFF)
        if meant is not None:
            yield f"default_hooks.{slot}: not a slot, did you mean {meant!r}?"


def _check_untyped(cfg: Mapping) -> Iterator[str]:
    for path, known in untyped_keys(cfg).items():
        node: Mapping | None = cfg
        for key in path.split("."):
            node = (node or {}).get(key)
        for key in (node or {}).keys() - known:
            yield f"{path}: nobody reads {key!r}; {hint(key, known)}"


def _check_students(cfg: Mapping) -> Iterator[str]:
    """Hooks of one student stand inside a PerStudentHook, in configs of several and only there."""
    is_multi = (cfg.get("model") or {}).get("type") == MULTI_DISTILLATION
    for index, hook in enumerate(cfg.get("custom_hooks") or ()):
        kind = hook.get("type")
        if is_multi and kind in HOOKS_OF_A_STUDENT:
            yield (
                f"custom_hooks.{index}: {kind} is a student's; write dict(type='PerStudentHook', "
                f"hook=dict(type={kind!r}, ...))"
            )
        elif not is_multi and kind == "PerStudentHook":
            yield (
                f"custom_hooks.{index}: PerStudentHook needs a model of type {MULTI_DISTILLATION}; "
                "give its hook itself"
            )


def _check_batch(cfg: Mapping, world_size: int) -> Iterator[str]:
    train_cfg = cfg["train_cfg"]
    accumulate = train_cfg.get("accumulate", 1)
    try:
        if train_cfg["global_batch_size"] != "auto":
            surplus = train_cfg.get("surplus", False)
            BatchLayout(train_cfg["global_batch_size"], world_size, accumulate, surplus=surplus)
    except ValueError as error:
        yield f"train_cfg: {error}"
    counts = cfg["optim_wrapper"].get("accumulative_counts", 1)
    if counts != accumulate:
        yield (
            f"optim_wrapper.accumulative_counts={counts}, but train_cfg.accumulate={accumulate}; "
            "set the latter only"
        )


def _check_patch_size(cfg: Mapping) -> Iterator[str]:
    masks = cfg["train_dataloader"].get("masking", {}).get("patch_size", DEFAULT_PATCH_SIZE)
    stride = token_stride_of(cfg)
    if masks != stride:
        yield (
            f"train_dataloader.masking.patch_size={masks}, but the backbone's patch size is "
            f"{stride}; set the latter only"
        )


def _check_value(value: object, path: str, registry: Registry | None) -> Iterator[str]:
    """Findings in ``value`` and everything inside it; ``registry`` is where its type should be."""
    if isinstance(value, (list, tuple)):
        for index, item in enumerate(value):
            yield from _check_value(item, f"{path}.{index}", registry)
    elif isinstance(value, Mapping):
        if "type" in value:
            yield from _check_part(value, path, registry)
            registry = None
        for key, item in value.items():
            # A dict without type groups parts of one kind: default_hooks, val_evaluator ...
            yield from _check_value(item, f"{path}.{key}", _REGISTRY_OF_KEY.get(key, registry))


def _check_part(part: Mapping, path: str, registry: Registry | None) -> Iterator[str]:
    found = _resolve(part["type"], registry)
    if found is None:
        known = set(_known_names(registry))
        kind = "part" if registry is None else registry.name
        yield f"{path}: no {kind} is called {part['type']!r}; {hint(str(part['type']), known)}"
        return
    accepted = _accepted(*found)
    if accepted is not None:
        for key in part.keys() - accepted:
            names = accepted - {"_scope_"}
            yield f"{path}: {_name(found[0])} takes no argument {key!r}; {hint(key, names)}"
    if "constructor" in part and found[1] is registries.OPTIM_WRAPPERS:
        constructors = registries.OPTIM_WRAPPER_CONSTRUCTORS
        yield from _check_part({"type": part["constructor"]}, f"{path}.constructor", constructors)


def _resolve(name: object, registry: Registry | None) -> tuple[Callable, Registry | None] | None:
    """The class or function behind a ``type`` and the registry it was found in."""
    if not isinstance(name, str):
        return (name, registry) if callable(name) else None
    for candidate in _ALL_REGISTRIES if registry is None else (registry,):
        target = candidate.get(name)
        if target is not None:
            return target, candidate
    return None


def _accepted(target: Callable, registry: Registry | None) -> frozenset[str] | None:
    accepted = accepted_keywords(target)
    if accepted is None:
        return None
    extra = _BUILDER_KEYS.get(registry.name, frozenset()) if registry is not None else frozenset()
    return accepted | extra | {"type", "_scope_"}


def _known_names(registry: Registry | None) -> Iterator[str]:
    for candidate in _ALL_REGISTRIES if registry is None else (registry,):
        yield from candidate.module_dict


def _name(target: Callable) -> str:
    return getattr(target, "__name__", str(target))


_ALL_REGISTRIES = tuple(value for value in vars(registries).values() if isinstance(value, Registry))
