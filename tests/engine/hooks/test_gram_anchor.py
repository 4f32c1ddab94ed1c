"""Modes of the Gram teacher, its refreshes, its weight, and what is refused."""

import pytest
import torch

from dinov3_mm.engine.hooks.schedule import TeacherEMAHook
from dinov3_mm.engine.hooks.teachers import GramAnchorHook
from tests.engine.hooks.toy import ToyAlgorithm, ToyRunner, uint8_batch

FROZEN = {"teacher": "frozen", "weight": 2.0}
LIVE = {"teacher": "ema", "weight": 2.0}


def with_gram_crops(iteration):
    return uint8_batch(iteration, gram_crops=torch.zeros(4, 3, 2, 2, dtype=torch.uint8))


def run(hook, gram=FROZEN, *, max_iters=6, start=0, ready=False, batches=with_gram_crops):
    model = ToyAlgorithm(gram)
    model.gram_teacher_ready = ready
    hooks = [TeacherEMAHook(0.9, 0.07), *([] if hook is None else [hook])]
    runner = ToyRunner(model, hooks, max_iters=max_iters, start=start)
    runner.weights = []
    set_step = model.set_step

    def spy(**values):
        set_step(**values)
        if "gram_weight" in values:
            runner.weights.append(values["gram_weight"])

    model.set_step = spy
    runner.train(batches)
    return runner


def test_checkpoint_is_read_once_with_the_weight_of_the_model():
    runner = run(GramAnchorHook(checkpoint="teacher.safetensors"))
    assert runner.model.gram_sources == ["teacher.safetensors"]
    assert runner.weights == [2.0] * 6


def test_resumed_run_keeps_its_gram_teacher():
    runner = run(GramAnchorHook(checkpoint="teacher.safetensors"), start=3, ready=True)
    assert runner.model.gram_sources == []


def test_stage_that_resumes_a_run_without_gram_teacher_reads_the_file():
    runner = run(GramAnchorHook(checkpoint="teacher.safetensors"), start=3, ready=False)
    assert runner.model.gram_sources == ["teacher.safetensors"]


def test_new_stage_reads_the_file_even_if_loaded_weights_had_a_gram_teacher():
    runner = run(GramAnchorHook(checkpoint="teacher.safetensors"), start=0, ready=True)
    assert runner.model.gram_sources == ["teacher.safetensors"]


def test_a_teacher_that_the_model_came_with_is_enough():
    runner = run(GramAnchorHook(), ready=True)
    assert runner.model.gram_sources == []
    assert runner.weights == [2.0] * 6


def test_ema_teacher_is_copied_at_its_iteration_and_the_term_is_off_before():
    weight = {"type": "linear", "start": 0.0, "end": 6.0}
    runner = run(GramAnchorHook(load_ema_at=2, weight=weight))
    assert runner.model.gram_sources == ["ema"]
    assert runner.weights == [0, 0, 2, 3, 4, 5]


def test_ema_copy_is_taken_before_the_forward_of_its_iteration():
    hook = GramAnchorHook(load_ema_at=1)
    runner = ToyRunner(ToyAlgorithm(FROZEN), [TeacherEMAHook(0.5, 0.07), hook], max_iters=2)
    for each in runner.hooks:
        each.before_train(runner)
    runner.step(with_gram_crops)
    teacher = runner.model.teacher["backbone"].weight.clone()
    runner.step(with_gram_crops)
    assert torch.equal(runner.model.gram_teacher["backbone"].weight, teacher)
    assert not torch.equal(runner.model.teacher["backbone"].weight, teacher)


def test_checkpoint_may_be_replaced_by_the_ema_teacher_later():
    runner = run(GramAnchorHook(checkpoint="early.pth", load_ema_at=4))
    assert runner.model.gram_sources == ["early.pth", "ema"]
    assert runner.weights == [2.0] * 6


def updates(max_iters, **arguments):
    """Iterations (1-based) after which a run refreshes, and the hook's count at its end."""
    hook = GramAnchorHook(checkpoint="x", rep_update=True, **arguments)
    model = ToyAlgorithm(FROZEN)
    runner = ToyRunner(model, [TeacherEMAHook(0.9, 0.07), hook], max_iters=max_iters)
    for each in runner.hooks:
        each.before_train(runner)
    seen = []
    while runner.iter < max_iters:
        before = len(model.gram_sources)
        runner.step(with_gram_crops)
        if len(model.gram_sources) > before:
            seen.append(runner.iter)
    return seen


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ({"update_interval": 3}, [3, 6, 9, 12]),
        ({"update_interval": 3, "max_updates": 2}, [3, 6]),
        ({"update_interval": 3, "first_update": 6}, [6, 9, 12]),
        ({"update_interval": 3, "first_update": 7}, [9, 12]),
        ({"update_interval": 4, "first_update": 4, "max_updates": 1}, [4]),
    ],
)
def test_refreshes(arguments, expected):
    assert updates(13, **arguments) == expected


def test_refresh_takes_the_teacher_after_its_update():
    hook = GramAnchorHook(checkpoint="x", rep_update=True, update_interval=2)
    runner = ToyRunner(ToyAlgorithm(FROZEN), [hook, TeacherEMAHook(0.5, 0.07)], max_iters=2)
    runner.train(with_gram_crops)
    gram, teacher = runner.model.gram_teacher["backbone"], runner.model.teacher["backbone"]
    assert torch.equal(gram.weight, teacher.weight)


@pytest.mark.parametrize("first_update", [0, 3, 4, 6, 7])
@pytest.mark.parametrize("max_updates", [None, 2])
def test_resumed_run_refreshes_like_an_uninterrupted_one(first_update, max_updates):
    arguments = {"first_update": first_update, "update_interval": 3, "max_updates": max_updates}
    whole = updates(15, **arguments)
    for start in range(1, 15):
        hook = GramAnchorHook(checkpoint="x", rep_update=True, **arguments)
        runner = run(hook, max_iters=15, start=start, ready=True)
        assert len(runner.model.gram_sources) == len([done for done in whole if done > start])
        assert hook.num_updates == len(whole)


@pytest.mark.parametrize("start", [1_010_000, 1_010_001, 1_019_999, 1_020_000, 1_029_500])
def test_count_on_resume_equals_the_formula_of_the_official_recipe(start):
    hook = GramAnchorHook(
        checkpoint="x", rep_update=True, first_update=1_010_000, update_interval=10_000
    )
    formula = -((start + 1 - 1_010_000) // -10_000)
    assert hook._updates_before(start) == formula


def test_live_teacher_needs_nothing_but_a_weight():
    runner = run(GramAnchorHook(weight=1.5), LIVE, batches=uint8_batch)
    assert runner.model.gram_sources == []
    assert runner.weights == [1.5] * 6


@pytest.mark.parametrize(
    "arguments",
    [
        {"rep_update": True},
        {"rep_update": True, "update_interval": 0},
        {"update_interval": 5},
        {"max_updates": 5},
        {"first_update": 5},
        {"load_ema_at": -2},
    ],
)
def test_contradictions_in_the_arguments(arguments):
    with pytest.raises(ValueError, match=r"rep_update|load_ema_at"):
        GramAnchorHook(**arguments)


@pytest.mark.parametrize(
    ("arguments", "gram", "message"),
    [
        ({}, None, "needs a model with gram"),
        ({}, FROZEN, "needs weights"),
        ({"load_ema_at": 6}, FROZEN, "after the run's 6 iterations"),
        ({"checkpoint": "x"}, LIVE, "EMA teacher itself"),
        ({"load_ema_at": 0}, LIVE, "EMA teacher itself"),
        ({"rep_update": True, "update_interval": 1}, LIVE, "EMA teacher itself"),
    ],
)
def test_contradictions_with_the_model(arguments, gram, message):
    with pytest.raises(ValueError, match=message):
        run(GramAnchorHook(**arguments), gram)


def test_crops_must_be_those_that_the_teacher_needs():
    with pytest.raises(ValueError, match="set gram_size"):
        run(GramAnchorHook(checkpoint="x"), FROZEN, batches=uint8_batch)
    with pytest.raises(ValueError, match="gram_size=None"):
        run(GramAnchorHook(), LIVE, batches=with_gram_crops)


def test_resuming_past_the_copy_without_a_gram_teacher():
    with pytest.raises(ValueError, match="starts at iteration 3, after load_ema_at=2"):
        run(GramAnchorHook(load_ema_at=2), start=3)
