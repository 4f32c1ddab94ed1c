"""The teacher's update, its step values, and a skipped step."""

import torch

from dinov3_mm.engine.hooks.schedule import TeacherEMAHook
from tests.engine.hooks.toy import ToyAlgorithm, ToyRunner, uint8_batch


def weights(module):
    return torch.cat([p.detach().flatten() for p in module.parameters()])


def test_teacher_moves_by_the_scheduled_momentum():
    momentum = {"type": "linear", "start": 0.5, "end": 1.0}
    hook = TeacherEMAHook(momentum=momentum, teacher_temp=0.07)
    runner = ToyRunner(ToyAlgorithm(), [hook], max_iters=4)
    hook.before_train(runner)
    for m in (0.5, 0.625, 0.75, 0.875):
        before = weights(runner.model.teacher)
        runner.step()
        expected = m * before + (1 - m) * weights(runner.model.student)
        torch.testing.assert_close(weights(runner.model.teacher), expected, rtol=1e-6, atol=1e-7)
        assert (weights(runner.model.teacher) - before).abs().max() > 1e-4
        assert runner.history[-1]["momentum"] == m


def test_step_values_reach_the_model():
    hook = TeacherEMAHook(
        momentum=0.9,
        teacher_temp={"type": "linear", "start": 0.04, "end": 0.08},
        dino_local_weight={"type": "linear", "start": 1.0, "end": 0.5},
    )
    runner = ToyRunner(ToyAlgorithm(), [hook], max_iters=2)
    runner.train()
    assert runner.model.step_values == {"teacher_temp": 0.06, "dino_local_weight": 0.75}
    assert runner.history[1]["teacher_temp"] == 0.06


def test_local_weight_is_left_alone_by_default():
    runner = ToyRunner(ToyAlgorithm(), [TeacherEMAHook(0.9, 0.07)], max_iters=1)
    runner.train()
    assert runner.model.step_values == {"teacher_temp": 0.07}


def test_skipped_step_leaves_the_teacher_even_if_the_student_is_broken():
    runner = ToyRunner(ToyAlgorithm(), [TeacherEMAHook(0.5, 0.07)], max_iters=3)
    runner.hooks[0].before_train(runner)
    runner.step()
    before = weights(runner.model.teacher)
    with torch.no_grad():
        runner.model.student["backbone"].weight[0, 0] = float("nan")
    runner.step()
    assert runner.optim_wrapper.step_skipped
    torch.testing.assert_close(weights(runner.model.teacher), before, rtol=0, atol=0)


def test_skipped_step_for_a_bad_input_leaves_the_teacher():
    runner = ToyRunner(ToyAlgorithm(), [TeacherEMAHook(0.5, 0.07)], max_iters=3)
    runner.hooks[0].before_train(runner)
    runner.step()
    before = weights(runner.model.teacher)

    def bad_batch(iteration):
        batch = uint8_batch(iteration)
        return {**batch, "global_crops": batch["global_crops"].float() * float("inf")}

    runner.step(bad_batch)
    assert runner.optim_wrapper.step_skipped
    torch.testing.assert_close(weights(runner.model.teacher), before, rtol=0, atol=0)
