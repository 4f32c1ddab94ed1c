"""What a user gives a dry run or a plan, checked and completed before anything is built."""

from pathlib import Path

from mmengine.config import Config

from dinov3_mm.datasets.evaluation_images import HeldOutSplit
from dinov3_mm.engine.config import check_config, fill_defaults
from dinov3_mm.engine.config.auto import (
    DataFacts,
    auto_places,
    gpu_gib,
    held_out_every,
    resolve_auto,
)
from dinov3_mm.engine.config.read import find_config, settle_data
from dinov3_mm.errors import ConfigError, nearest

SINGLE = "PretrainStrategy"
DDP = "PretrainDDPStrategy"
FSDP2 = "FSDP2Strategy"
MULTI = "MultiDistillationStrategy"
STRATEGIES = (SINGLE, DDP, FSDP2, MULTI)


def check_file(path: str) -> None:
    """Refuse a config that is not there.

    Raises:
        ConfigError: with the nearest name in its folder, or of the package.
    """
    given = Path(find_config(path))
    if given.is_file():
        return
    if given.is_dir():
        raise ConfigError("is a folder; give one of its config files")
    if not given.parent.is_dir():
        raise ConfigError(f"no such file, nor is there a folder {given.parent}")
    meant = nearest(given.name, [file.name for file in given.parent.glob("*.py")])
    raise ConfigError("no such file" + (f"; did you mean {given.parent / meant}?" if meant else ""))


def check_numbers(
    world_size: int, *, num_images: int | None = None, memory_gib: float | None = None
) -> None:
    """Refuse numbers that nobody can have.

    Raises:
        ConfigError: no ranks, no images, no memory.
    """
    if world_size < 1:
        raise ConfigError(f"the number of processes must be at least 1, got {world_size}")
    if num_images is not None and num_images < 1:
        raise ConfigError(f"the number of images must be at least 1, got {num_images}")
    if memory_gib is not None and not memory_gib > 0:
        raise ConfigError(f"the memory of a GPU must be more than 0 GiB, got {memory_gib:g}")


def needs_process_group(cfg: Config, world_size: int) -> bool:
    """Whether a run of this config on so many ranks has a process group."""
    return world_size > 1 or strategy_name(cfg) == FSDP2


def strategy_name(cfg: Config) -> str:
    """Name of the strategy of a config.

    Raises:
        ConfigError: one that a dry run does not know.
    """
    kind = (cfg.get("strategy") or {}).get("type", SINGLE)
    name = kind if isinstance(kind, str) else kind.__name__
    if name not in STRATEGIES:
        raise ConfigError(f"strategy: a dry run knows {', '.join(STRATEGIES)}, not {name!r}")
    return name


def settle_config(
    cfg: Config,
    world_size: int,
    *,
    num_images: int | None = None,
    memory_gib: float | None = None,
) -> list[str]:
    """Complete and check a pretraining config in place, as a run on ``world_size`` ranks would.

    Must run inside of the process group of that size, if there is one.

    Args:
        cfg: a pretraining config.
        world_size: number of ranks.
        num_images: size of the data set, for values 'auto'; None counts the config's own source.
        memory_gib: memory of a GPU, for values 'auto'.

    Returns:
        How the values 'auto' were derived.

    Raises:
        ConfigError: not a pretraining config, or one that this number of ranks cannot train.
    """
    check_numbers(world_size, num_images=num_images, memory_gib=memory_gib)
    if cfg.get("runner_type") != "FlexibleRunner":
        raise ConfigError(
            "dry runs and plans are for pretraining configs (runner_type='FlexibleRunner'); "
            f"this one has runner_type={cfg.get('runner_type')!r}"
        )
    fill_defaults(cfg)
    check_config(cfg, world_size=world_size)
    lines = _derive(cfg, world_size, num_images, memory_gib)
    check_config(cfg, world_size=world_size)
    return lines


def _derive(
    cfg: Config, world_size: int, num_images: int | None, memory_gib: float | None
) -> list[str]:
    # How many images are held out changes no step.
    if all(place.endswith(".every") for place in auto_places(cfg)):
        return []
    data = None if num_images is None else DataFacts(num_images, num_images, None)
    source = cfg.train_dataloader.get("source", {})
    if num_images is not None and source.get("type") in ("HeldOutSplit", HeldOutSplit):
        every = held_out_every(num_images).value
        data = DataFacts(num_images, num_images - num_images // every, every)
    batch = cfg.train_cfg["global_batch_size"]
    if batch == "auto" and memory_gib is None and gpu_gib() is None:
        raise ConfigError(
            "train_cfg.global_batch_size='auto' follows from the memory of a GPU: give "
            "--gpu-memory GIB, or a number"
        )
    try:
        if data is None:
            settle_data(cfg)
        return resolve_auto(cfg, world_size=world_size, data=data, memory_gib=memory_gib)
    except ConfigError as error:
        if num_images is not None:
            raise
        raise ConfigError(
            "values 'auto' follow from the number of images: give --num-images N or --data DIR "
            f"({error})"
        ) from error
