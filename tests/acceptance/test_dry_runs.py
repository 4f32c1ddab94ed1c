"""The quick part of ``python -m tests.acceptance.dry_runs``."""

import pytest
from mmengine.config import Config

from tests.acceptance.dry_runs import CONFIGS, line_of, try_out, world_size_of

ALL = sorted(CONFIGS.glob("*.py"))


def test_every_config_has_a_number_of_gpus():
    assert len(ALL) > 30
    for path in ALL:
        batch = Config.fromfile(path).train_cfg
        if batch.global_batch_size != "auto" and not batch.get("surplus", False):
            assert batch.global_batch_size % world_size_of(path) == 0, path


@pytest.mark.parametrize(
    ("name", "ranks", "collectives"),
    [
        # Gradients in one bucket, eight vectors of Sinkhorn-Knopp, KoLeo there and back.
        ("continue_convnext_tiny", 8, 11),
        ("continue_gram_vits16", 8, 11),
        # The teacher's 43 units gathered, the student's 15 gathered twice and reduced once, eight
        # vectors of Sinkhorn-Knopp, three gradient norms.
        pytest.param("distill_vits16", 48, 99, marks=pytest.mark.slow),
    ],
)
def test_dry_run(name, ranks, collectives):
    (record,) = try_out(CONFIGS / f"{name}.py")
    assert record["ranks"] == ranks
    assert record["collectives"] == collectives
    assert record["parameters"] > 2e7
    assert record["peak_bytes"] > 16 * record["parameters"] / ranks
    assert name in line_of(record)
