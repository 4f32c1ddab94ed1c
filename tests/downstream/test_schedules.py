"""Schedules of every shipped downstream config follow the length of the run."""

import copy
import re

import pytest
from mmengine.config import Config

from dinov3_mm.engine.hooks.data_checks import compare_lengths
from tests.downstream.schedules import (
    EPOCH,
    build_schedulers,
    downstream_configs,
    length_of,
    rates,
)
from tests.hosts.lane import require_hosts

require_hosts()


def lines(cfg: Config) -> list[str]:
    schedulers, _, total = build_schedulers(cfg)
    return list(compare_lengths(schedulers, EPOCH, total))


@pytest.mark.parametrize("factor", [0.5, 1, 2])
def test_shipped_schedules_end_with_the_run(factor):
    configs = downstream_configs()
    assert len(configs) > 10
    for cfg in map(copy.deepcopy, configs.values()):
        key, length = length_of(cfg)
        cfg.train_cfg[key] = max(round(length * factor), 1)
        course = rates(cfg)
        name = cfg.filename
        assert lines(cfg) == [], name
        assert max(course) > 0.7, name  # the official warm-up of depth is below its peak
        # A detector's last step is a tenth of its rate, all others anneal to zero.
        floor = 0.11 if "MultiStepShareLR" in repr(cfg.param_scheduler) else 0.02
        assert course[-1] < floor * max(course), (name, course[-1])
        assert course.index(max(course)) < len(course) / 2, name


def config(schedule: dict, **train_cfg) -> Config:
    return Config({"param_scheduler": [schedule], "train_cfg": train_cfg})


COSINE = {"type": "CosineAnnealingLR", "by_epoch": True, "convert_to_iter_based": True}
POLY = {"type": "PolyLR", "by_epoch": False, "power": 0.9}
STEPS = {"type": "MultiStepLR", "by_epoch": True, "gamma": 0.1}


@pytest.mark.parametrize(
    ("cfg", "message"),
    [
        (config({**COSINE, "T_max": 20}, max_epochs=40), "iteration 6000 of 12000.*climbs back"),
        (config({**POLY, "end": 40000}, max_iters=80000), "iteration 40000 of 80000.*stands still"),
        (config({**POLY, "end": 40000}, max_iters=5000), "40000, the run at 5000.*before the rate"),
        (config({**STEPS, "milestones": [9, 11]}, max_epochs=36), "falls last at iteration 3300"),
        (config({**STEPS, "milestones": [9, 11]}, max_epochs=8), "the run ends at 2400"),
        (
            config({"type": "LinearLR", "by_epoch": False, "end": 500}, max_iters=600),
            "warm-up takes 500 iterations, the run has 600",
        ),
    ],
)
def test_schedules_of_another_length_are_named(cfg, message):
    (line,) = lines(cfg)
    assert re.search(message, line)


def test_a_cosine_of_twenty_epochs_climbs_back():
    """What the line warns of, in numbers."""
    course = rates(config({**COSINE, "T_max": 20}, max_epochs=40))
    assert course[19 * EPOCH] < 0.02 and course[-1] > 0.99


def test_steps_at_shares_of_the_run():
    schedule = {"type": "MultiStepShareLR", "by_epoch": True, "shares": [0.75, 0.9], "gamma": 0.1}
    course = rates(config(schedule, max_epochs=20))
    assert [course[EPOCH * epoch] for epoch in (14, 15, 17, 18)] == pytest.approx(
        [1, 0.1, 0.1, 0.01]
    )
