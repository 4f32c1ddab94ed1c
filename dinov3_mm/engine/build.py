"""From a config to a runner that is ready to train."""

from mmengine.config import Config
from mmengine.dist import get_world_size, is_distributed
from mmengine.registry import RUNNERS

from dinov3_mm.engine.config import check_config, fill_defaults


def build_runner(cfg: Config):
    """Check a config, complete it and build its runner.

    Where a process group exists the run is distributed.

    Args:
        cfg (Config): A training config, changed in place. A pretraining config
            (``runner_type='FlexibleRunner'``) is checked and completed with this package's default
            hooks and strategy; any other goes to MMEngine's runner as it is.

    Returns:
        FlexibleRunner | Runner: ``.train()`` trains.

    Raises:
        ConfigError: If a pretraining config holds a name, type or argument that nobody reads.
    """
    # The runner would guess from the environment; the process group is there or it is not.
    cfg.launcher = "pytorch" if is_distributed() else "none"
    if cfg.get("runner_type") == "FlexibleRunner":
        fill_defaults(cfg)
        check_config(cfg, world_size=get_world_size())
    return RUNNERS.build(cfg)
