"""From a config to a runner that is ready to train."""

from mmengine.config import Config
from mmengine.dist import get_world_size
from mmengine.registry import RUNNERS

from dinov3_mm.engine.config import check_config, fill_defaults


def build_runner(cfg: Config):
    """Check a config, complete it and build its runner.

    Args:
        cfg (Config): A training config. A pretraining config (``runner_type='FlexibleRunner'``) is
            completed in place with this package's default hooks and strategy; any other goes to
            MMEngine's runner as it is. Where a process group exists the run is distributed.

    Returns:
        FlexibleRunner | Runner: ``.train()`` trains.

    Raises:
        ConfigError: If the config holds a name, type or argument that nobody reads.
    """
    if cfg.get("runner_type") == "FlexibleRunner":
        fill_defaults(cfg)
    check_config(cfg, world_size=get_world_size())
    return RUNNERS.get(cfg.get("runner_type", "Runner")).from_cfg(cfg)
