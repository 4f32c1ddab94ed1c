"""What a pretraining config need not say."""

from collections.abc import Mapping

import torch
from mmengine.config import Config, ConfigDict
from mmengine.dist import is_distributed
from mmengine.registry import MODELS

from dinov3_mm.models.pretraining.multi_distillation import merged_student

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
