"""What a pretraining config need not say."""

from collections.abc import Mapping

from mmengine.config import Config, ConfigDict
from mmengine.dist import is_distributed

DEFAULT_PATCH_SIZE = 16

# A ConvNeXt has no patch size that says how far apart its tokens are.
TOKEN_STRIDES = {"DINOv3ConvNeXt": 32}

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

    With several processes a ``PretrainStrategy`` becomes a ``PretrainDDPStrategy``.

    Args:
        cfg (Config): A config with ``runner_type='FlexibleRunner'``.
    """
    hooks = cfg.get("default_hooks") or {}
    cfg.default_hooks = ConfigDict({**DEFAULT_HOOKS, **hooks})
    cfg.env_cfg = cfg.get("env_cfg") or ConfigDict()
    randomness = cfg.get("randomness") or {}
    cfg.randomness = ConfigDict({**randomness, "seed": randomness.get("seed") or 0})
    strategy = cfg.get("strategy") or ConfigDict(type="PretrainStrategy")
    if is_distributed() and strategy["type"] == "PretrainStrategy":
        strategy["type"] = "PretrainDDPStrategy"
    cfg.strategy = strategy
    accumulate = (cfg.get("train_cfg") or {}).get("accumulate", 1)
    if accumulate != 1:
        cfg.optim_wrapper.setdefault("accumulative_counts", accumulate)
    masking = cfg.train_dataloader.setdefault("masking", ConfigDict())
    masking.setdefault("patch_size", token_stride_of(cfg))


def token_stride_of(cfg: Mapping) -> int:
    """Pixels between neighbouring patch tokens of the backbone that the config trains."""
    backbone = cfg["model"].get("backbone", {})
    if backbone.get("type") in TOKEN_STRIDES:
        return TOKEN_STRIDES[backbone["type"]]
    return backbone.get("patch_size") or DEFAULT_PATCH_SIZE
