"""Learning rates and decays in the groups, iteration by iteration."""

import pytest

from dinov3_mm.engine.hooks.schedule import OptimScheduleHook
from tests.engine.hooks.toy import ToyAlgorithm, ToyRunner


class Spy:
    """Records the groups as the step sees them."""

    priority = "NORMAL"

    def __init__(self):
        self.groups = []

    def __getattr__(self, name):
        return lambda *args, **kwargs: None

    def before_train_iter(self, runner, **_):
        self.groups.append([dict(group) for group in runner.optim_wrapper.optimizer.param_groups])


def run(hook, **kwargs):
    spy = Spy()
    runner = ToyRunner(ToyAlgorithm(), [hook, spy], max_iters=4, **kwargs)
    for index, group in enumerate(runner.optim_wrapper.optimizer.param_groups):
        group["lr_multiplier"] = 0.5**index
        group["is_last_layer"] = index == 1
    runner.train()
    return runner, spy.groups


def test_groups_follow_the_schedules():
    hook = OptimScheduleHook(
        lr={"type": "linear", "start": 0.0, "end": 4e-3},
        weight_decay={"type": "linear", "start": 0.4, "end": 0.0},
        freeze_last_layer_iters=2,
    )
    runner, seen = run(hook)
    for it, groups in enumerate(seen):
        for index, group in enumerate(groups):
            frozen = index == 1 and it < 2
            assert group["lr"] == pytest.approx(0 if frozen else it * 1e-3 * 0.5**index, abs=1e-15)
            expected = (0.4 - 0.1 * it) * group["wd_multiplier"]
            assert group["weight_decay"] == pytest.approx(expected)
    last = runner.history[3]
    assert last["lr"] == pytest.approx(3e-3)
    assert last["last_layer_lr"] == pytest.approx(3e-3)
    assert runner.history[1]["last_layer_lr"] == 0
    assert last["weight_decay"] == pytest.approx(0.1)
    assert last["grad_norm/backbone"] > 0
    assert last["step_skipped"] == 0


def test_resumed_run_starts_in_the_middle():
    hook = OptimScheduleHook(lr={"type": "linear", "start": 0.0, "end": 4e-3}, weight_decay=0.04)
    _runner, seen = run(hook, start=3)
    assert seen[0][0]["lr"] == pytest.approx(3e-3)
    assert len(seen) == 1


def test_scaling_rule_uses_the_global_batch(caplog):
    hook = OptimScheduleHook(lr=1e-3, weight_decay=0.04, scaling_rule="linear_wrt_256")
    with caplog.at_level("INFO", logger="toy"):
        _, seen = run(hook, accumulate=2)
    assert seen[0][0]["lr"] == pytest.approx(1e-3 * 8 / 256)
    assert "global batch of 8 is a factor 0.03125" in caplog.text


@pytest.mark.parametrize(
    "arguments",
    [
        {"lr": 1e-3, "weight_decay": 0, "freeze_last_layer_iters": -1},
        {"lr": 1e-3, "weight_decay": 0, "scaling_rule": "sqrt"},
    ],
)
def test_bad_arguments_are_refused(arguments):
    with pytest.raises(ValueError, match=r"freeze_last_layer_iters|scaling_rule"):
        OptimScheduleHook(**arguments)


def test_the_backbone_is_frozen_then_warms_up(caplog):
    hook = OptimScheduleHook(
        lr=1e-2, weight_decay=0.04, backbone_freeze_iters=1, backbone_warmup_iters=2
    )
    with caplog.at_level("INFO", logger="toy"):
        runner, seen = run(hook)
    rates = [
        next(group["lr"] for group in groups if group["submodule"] == "backbone") for groups in seen
    ]
    assert rates == pytest.approx([0, 1e-2 / 3, 2e-2 / 3, 1e-2])
    assert [step["backbone_lr"] for step in runner.history] == pytest.approx(rates)
    assert all(step["lr"] == 1e-2 for step in runner.history)
    assert "stays frozen until iteration 1" in caplog.text
    assert caplog.text.count("iteration 1: the backbone thaws") == 1
    param = next(runner.model.student["backbone"].parameters())
    assert runner.optim_wrapper.optimizer.state[param]["step"].item() == 3


def test_a_freeze_of_the_whole_run_is_refused():
    hook = OptimScheduleHook(lr=1e-2, weight_decay=0.04, backbone_freeze_iters=4)
    with pytest.raises(ValueError, match="leaves nothing of the run's 4 iterations"):
        run(hook)
