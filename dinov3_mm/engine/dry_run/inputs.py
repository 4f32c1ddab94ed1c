"""What a user gives a dry run or a plan, checked before anything is built."""

from pathlib import Path

from dinov3_mm.engine.config import ConfigError
from dinov3_mm.suggest import nearest


def check_file(path: str) -> None:
    """Refuse a config file that is not there.

    Raises:
        ConfigError: with the nearest name in its folder.
    """
    given = Path(path)
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
