"""Maps that are refused, or cannot be looked at, end every rank; none waits for another."""

import logging
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch.distributed as dist
import torch.multiprocessing as mp

from dinov3_mm.datasets.label_audit import Report
from dinov3_mm.engine.config import ConfigError
from dinov3_mm.engine.hooks.data_checks import MapCheckHook

WORLD = 2


class Refusing(MapCheckHook):
    """Finds an error."""

    def look(self, runner, splits):
        assert dist.get_rank() == 0, "only the first rank reads the maps"
        yield Report(errors=["training: every pixel is ignored"])


class Failing(MapCheckHook):
    """Cannot look."""

    def look(self, runner, splits):
        raise MemoryError("no memory for a map")


def rank_main(rank: int, folder: str) -> None:
    store = f"file://{folder}/store"
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=WORLD)
    runner = SimpleNamespace(val_loop=None, logger=logging.getLogger("ranks"))
    lines = []
    for hook in (Refusing(), Failing()):
        try:
            hook.before_train(runner)
        except (ConfigError, RuntimeError, MemoryError) as error:
            lines.append(f"{type(error).__name__}: {error}")
    Path(folder, f"{rank}.txt").write_text("\n".join(lines))
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def endings(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ranks")
    mp.spawn(rank_main, (str(folder),), WORLD)
    return [(folder / f"{rank}.txt").read_text().splitlines() for rank in range(WORLD)]


def test_a_refusal_is_that_of_every_rank(endings):
    assert {lines[0] for lines in endings} == {"ConfigError: training: every pixel is ignored"}


def test_a_check_that_fails_ends_the_others(endings):
    assert endings[0][1] == "MemoryError: no memory for a map"
    assert endings[1][1] == (
        "RuntimeError: the check of the maps on the first process failed: MemoryError: no memory "
        "for a map"
    )
