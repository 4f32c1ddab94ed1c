"""The guards trigger on injected faults and stay quiet on healthy runs."""

import copy

import pytest
import torch
from mmengine.config import Config

from dinov3_mm.engine.capture import replay_capture
from dinov3_mm.engine.hooks.guards import (
    CollapseGuardHook,
    DiagnosisHook,
    NonFiniteGuardHook,
    TrainingStoppedError,
)
from dinov3_mm.engine.hooks.schedule import OptimScheduleHook, TeacherEMAHook
from tests.engine.hooks.toy import ToyAlgorithm, ToyRunner, uint8_batch

CFG = Config({"model": {"type": "ToyAlgorithm"}})


def bad_at(*micro_batches):
    """Batches of which some hold an infinite pixel."""

    def make(index):
        batch = uint8_batch(index)
        if index in micro_batches:
            batch["global_crops"] = batch["global_crops"].float()
            batch["global_crops"][0, 0, 0, 0] = float("inf")
        return batch

    return make


def non_finite_run(tmp_path, make_batch=uint8_batch, *, max_iters=6, accumulate=1, **arguments):
    hooks = [TeacherEMAHook(0.9, 0.07), NonFiniteGuardHook(**arguments)]
    runner = ToyRunner(
        ToyAlgorithm(), hooks, max_iters=max_iters, work_dir=tmp_path, accumulate=accumulate
    )
    runner.train(make_batch)
    return runner


def captures(tmp_path):
    return sorted(path.name for path in (tmp_path / "captures").glob("*"))


def test_healthy_run_writes_nothing(tmp_path, caplog):
    non_finite_run(tmp_path)
    assert not (tmp_path / "captures").exists()
    assert "non-finite" not in caplog.text


def test_bad_step_is_captured_and_the_run_goes_on(tmp_path, caplog):
    runner = non_finite_run(tmp_path, bad_at(2))
    assert captures(tmp_path) == ["iter_00000002.pt"]
    assert "iteration 2: non-finite loss on rank(s) [0]; the step was skipped (1 in a row)" in (
        caplog.text
    )
    assert all(p.isfinite().all() for p in runner.model.parameters())
    assert runner.iter == 6


def test_third_bad_step_in_a_row_stops_the_run(tmp_path):
    with pytest.raises(TrainingStoppedError, match="3 steps in a row up to iteration 4"):
        non_finite_run(tmp_path, bad_at(2, 3, 4))
    assert captures(tmp_path) == [f"iter_0000000{it}.pt" for it in (2, 3, 4)]


def test_bad_steps_apart_do_not_stop_it(tmp_path):
    non_finite_run(tmp_path, bad_at(0, 1, 3, 4), max_captures=2)
    assert captures(tmp_path) == ["iter_00000000.pt", "iter_00000001.pt"]


def test_non_finite_gradient_with_finite_loss(tmp_path, caplog):
    runner = ToyRunner(ToyAlgorithm(), [NonFiniteGuardHook()], max_iters=1, work_dir=tmp_path)
    runner.model.student["backbone"].weight.register_hook(lambda grad: grad * float("inf"))
    runner.train()
    assert "iteration 0: non-finite gradient, with finite losses" in caplog.text
    assert captures(tmp_path) == ["iter_00000000.pt"]


def test_capture_holds_the_step_and_loads_without_unpickling(tmp_path):
    hooks = [TeacherEMAHook(0.9, 0.07), NonFiniteGuardHook()]
    runner = ToyRunner(ToyAlgorithm(), hooks, max_iters=3, work_dir=tmp_path)
    for hook in runner.hooks:
        hook.before_train(runner)
    runner.step()
    before = copy.deepcopy(runner.model.state_dict())
    moments = copy.deepcopy(runner.optim_wrapper.state_dict()["state"])
    make_batch = bad_at(1)
    runner.step(make_batch)

    state = torch.load(tmp_path / "captures/iter_00000001.pt", weights_only=True)
    assert state["meta"] == {"iteration": 1, "seed": 7, "rank": 0, "world_size": 1}
    for name, value in before.items():
        assert torch.equal(state["state_dict"][name], value)
    for index, moment in moments.items():
        for name, value in moment.items():
            assert torch.equal(state["optimizer"]["state"][index][name], value)
    step = state["step"]
    assert step["step_values"] == {"teacher_temp": 0.07}
    assert len(step["batches"]) == 1
    assert torch.equal(step["batches"][0]["global_crops"], make_batch(1)["global_crops"])
    assert step["batches"][0]["iteration"] == 1
    torch.manual_seed(1001)
    assert torch.equal(step["rng"]["cpu"], torch.get_rng_state())


@pytest.mark.parametrize("accumulate", [1, 2])
def test_replay_repeats_the_step(tmp_path, accumulate):
    """Noise included: the loss of the other, finite micro batches is the same to the last bit."""
    finite = {}

    def make_batch(index):
        return bad_at(3)(index)

    class Spy(ToyAlgorithm):
        def parse_losses(self, losses):
            finite[len(finite)] = losses["loss"].item()
            return super().parse_losses(losses)

    hooks = [NonFiniteGuardHook()]
    runner = ToyRunner(Spy(), hooks, max_iters=4, work_dir=tmp_path, accumulate=accumulate)
    runner.train(make_batch)
    (name,) = captures(tmp_path)
    report = replay_capture(tmp_path / "captures" / name, CFG)
    iteration = 3 // accumulate
    assert report.iteration == iteration
    assert not report.is_finite
    assert report.first_bad_module == "data_preprocessor"
    assert report.bad_parameters == []
    losses = [each["loss"] for each in report.losses]
    expected = [finite[iteration * accumulate + i] for i in range(accumulate)]
    assert torch.equal(torch.tensor(losses).nan_to_num(), torch.tensor(expected).nan_to_num())
    assert len(losses) == accumulate
    assert any(loss == loss for loss in losses) == (accumulate == 2)


def test_replay_points_at_the_module(tmp_path):
    runner = ToyRunner(ToyAlgorithm(), [NonFiniteGuardHook()], max_iters=1, work_dir=tmp_path)
    with torch.no_grad():
        runner.model.student["dino_head"].weight[0, 0] = float("inf")
    runner.train()
    report = replay_capture(tmp_path / "captures/iter_00000000.pt", CFG)
    assert report.first_bad_module == "student.dino_head"
    assert report.bad_parameters == ["dino_head.weight"]


def test_replay_refuses_other_files(tmp_path):
    with pytest.raises(FileNotFoundError):
        replay_capture(tmp_path / "none.pt", CFG)
    torch.save({"format_version": 1, "state_dict": {}}, tmp_path / "checkpoint.pth")
    with pytest.raises(ValueError, match="not a capture"):
        replay_capture(tmp_path / "checkpoint.pth", CFG)


HEALTHY = {
    "teacher_entropy": 3.0,
    "teacher_entropy_max": 4.0,
    "feature_rank": 5.0,
    "cls_spread": 0.5,
}
UNIFORM = {**HEALTHY, "teacher_entropy": 3.9999}


def collapse_run(diagnoses, **arguments):
    """One diagnosis per iteration, the last repeated."""
    runner = ToyRunner(
        ToyAlgorithm(),
        [DiagnosisHook(interval=1), CollapseGuardHook(**{"begin": 0, **arguments})],
        max_iters=12,
    )
    for hook in runner.hooks:
        hook.before_train(runner)
    while runner.iter < runner.max_iters:
        runner.model.diagnoses = diagnoses[min(runner.iter, len(diagnoses) - 1)]
        runner.step()
    return runner


@pytest.mark.parametrize("sign", [{"feature_rank": 1.0}, {"cls_spread": 1e-6}])
def test_collapse_stops_the_run_with_advice(sign):
    with pytest.raises(TrainingStoppedError, match="Lower the learning rate") as error:
        collapse_run([UNIFORM, HEALTHY, {**UNIFORM, **sign}])
    assert "in 3 diagnoses up to iteration 4" in str(error.value)
    assert next(iter(sign)) in str(error.value)


@pytest.mark.parametrize(
    "diagnoses",
    [
        [HEALTHY],
        # Near-uniform targets of an untrained network that stays as diverse as it was.
        [UNIFORM],
        # Features poorer than at the start, but targets that discriminate.
        [HEALTHY, {**HEALTHY, "feature_rank": 1.0}],
        # Not in a row.
        [HEALTHY, *[{**UNIFORM, "feature_rank": 1.0}] * 2, HEALTHY] * 3,
        [{**UNIFORM, "feature_rank": float("nan")}],
    ],
)
def test_runs_that_have_not_collapsed_go_on(diagnoses):
    assert collapse_run(diagnoses).iter == 12


def test_lost_diversity_counts_where_the_initial_weights_had_none():
    blind = {**UNIFORM, "feature_rank": 1.0, "cls_spread": 1e-7}
    opened = {**HEALTHY, "feature_rank": 9.0, "cls_spread": 0.1}
    with pytest.raises(TrainingStoppedError, match=r"at best 0\.1"):
        collapse_run([blind, opened, {**UNIFORM, "feature_rank": 1.1, "cls_spread": 0.009}])
    # Slowly opening from nothing, with near-uniform targets all the while.
    slow = [{**blind, "feature_rank": 1 + 1e-3 * i, "cls_spread": 1e-7 * 2**i} for i in range(12)]
    assert collapse_run(slow).iter == 12


def test_warm_up_is_spared():
    collapsed = [UNIFORM, {**UNIFORM, "feature_rank": 1.0}]
    assert collapse_run(collapsed, begin=10).iter == 12
    with pytest.raises(TrainingStoppedError):
        collapse_run(collapsed, begin=9)


def test_warm_up_is_that_of_the_learning_rate():
    lr = {"type": "cosine", "base": 1e-3, "final": 0.0, "warmup_iters": 10}
    guard = CollapseGuardHook()
    hooks = [DiagnosisHook(), guard, OptimScheduleHook(lr, 0.04)]
    runner = ToyRunner(ToyAlgorithm(), hooks, max_iters=12)
    for hook in runner.hooks:
        hook.before_train(runner)
    assert guard._armed_from == 10


def test_initial_diversity_survives_a_resume():
    guard = CollapseGuardHook(begin=0)
    runner = ToyRunner(ToyAlgorithm(), [DiagnosisHook(interval=1), guard], max_iters=2)
    runner.model.diagnoses = HEALTHY
    runner.train()
    checkpoint = {}
    guard.before_save_checkpoint(runner, checkpoint)

    resumed = CollapseGuardHook(begin=0)
    resumed.after_load_checkpoint(runner, checkpoint)
    runner = ToyRunner(ToyAlgorithm(), [DiagnosisHook(interval=1), resumed], max_iters=9, start=2)
    runner.model.diagnoses = {**UNIFORM, "feature_rank": 4.9}
    with pytest.raises(TrainingStoppedError, match="up to iteration 4"):
        runner.train()


def test_collapse_guard_needs_diagnoses():
    with pytest.raises(ValueError, match="needs DiagnosisHook"):
        ToyRunner(ToyAlgorithm(), [CollapseGuardHook()], max_iters=1).train()


@pytest.mark.parametrize(
    ("hook", "arguments"),
    [
        (NonFiniteGuardHook, {"max_consecutive": 0}),
        (NonFiniteGuardHook, {"max_captures": 1.5}),
        (CollapseGuardHook, {"patience": 0}),
        (CollapseGuardHook, {"begin": -1}),
        (CollapseGuardHook, {"entropy_tolerance": -1e-3}),
    ],
)
def test_bad_arguments_are_refused(hook, arguments):
    with pytest.raises(ValueError, match=next(iter(arguments))):
        hook(**arguments)


class LateFlag:
    """Stands for a flag on its way from a GPU: it can be read, but nobody should at once."""

    is_late = True

    def __init__(self, flag):
        self.value = bool(flag)

    def read(self):
        return self.value


def test_late_flag_is_read_before_the_next_step_changes_anything(tmp_path, monkeypatch):
    monkeypatch.setattr("dinov3_mm.engine.hooks.guards._PendingFlag", LateFlag)
    hooks = [TeacherEMAHook(0.9, 0.07), NonFiniteGuardHook()]
    runner = ToyRunner(ToyAlgorithm(), hooks, max_iters=4, work_dir=tmp_path)
    for hook in runner.hooks:
        hook.before_train(runner)
    runner.step()
    before = copy.deepcopy(runner.model.state_dict())
    runner.step(bad_at(1))
    assert not (tmp_path / "captures").exists()
    runner.step()
    state = torch.load(tmp_path / "captures/iter_00000001.pt", weights_only=True)
    for name, value in before.items():
        assert torch.equal(state["state_dict"][name], value)
    assert not torch.equal(
        runner.model.student["backbone"].weight, before["student.backbone.weight"]
    )


def test_late_flag_of_the_last_step_is_read_at_the_end(tmp_path, monkeypatch):
    monkeypatch.setattr("dinov3_mm.engine.hooks.guards._PendingFlag", LateFlag)
    non_finite_run(tmp_path, bad_at(5))
    assert captures(tmp_path) == ["iter_00000005.pt"]
    with pytest.raises(TrainingStoppedError):
        non_finite_run(tmp_path, bad_at(3, 4, 5))
