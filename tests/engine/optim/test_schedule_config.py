"""Schedule configs: strict keys, defaults from the run, batch-size rules."""

import math

import pytest

from dinov3_mm.engine.optim import build_schedule, lr_scale, scale_lr_schedule


def test_number_is_a_constant():
    schedule = build_schedule(0.3, total_iters=10)
    assert [schedule(it) for it in (0, 5, 100)] == [0.3, 0.3, 0.3]


def test_linear_reaches_its_end_after_the_last_iteration():
    schedule = build_schedule({"type": "linear", "start": 1.0, "end": 3.0}, total_iters=4)
    assert [schedule(it) for it in range(6)] == [1.0, 1.5, 2.0, 2.5, 3.0, 3.0]


def test_total_iters_comes_from_the_run_unless_given():
    run_length = build_schedule({"type": "linear", "start": 0, "end": 1}, total_iters=10)
    own_length = build_schedule(
        {"type": "linear", "start": 0, "end": 1, "total_iters": 5}, total_iters=10
    )
    assert run_length(5) == 0.5
    assert own_length(5) == 1


@pytest.mark.parametrize(
    ("cfg", "message"),
    [
        ({"type": "cosin", "base": 1, "final": 0}, "did you mean 'cosine'"),
        ({"base": 1, "final": 0}, "unknown schedule type None"),
        (
            {"type": "cosine", "base": 1, "final": 0, "warmup_iter": 3},
            "did you mean 'warmup_iters'",
        ),
        ({"type": "warmup_cosine", "start": 0, "peak": 1}, r"needs \['end'\]"),
        ({"type": "cosine", "base": "1e-4", "final": 0}, "base must be a number, given '1e-4'"),
        ({"type": "cosine", "base": 1, "final": 0, "warmup_iters": 11}, "more than total_iters=10"),
        (
            {"type": "cosine", "base": 1, "final": 0, "warmup_iters": 6, "freeze_iters": 5},
            "more than total_iters",
        ),
        (
            {
                "type": "warmup_cosine",
                "start": 0,
                "peak": 1,
                "end": 0,
                "warmup_iters": 6,
                "cosine_iters": 5,
            },
            "more than",
        ),
        (
            {"type": "cosine", "base": 1, "final": 0, "trunc_extra": -0.1},
            "trunc_extra must not be negative",
        ),
    ],
)
def test_bad_configs_are_refused(cfg, message):
    with pytest.raises(ValueError, match=message):
        build_schedule(cfg, total_iters=10)


def test_a_list_is_not_a_schedule():
    with pytest.raises(TypeError, match="a number or a dict"):
        build_schedule([1, 2], total_iters=10)


def test_scaling_rules():
    assert lr_scale(None, 7) == 1
    assert lr_scale("linear_wrt_256", 64) == 0.25
    assert lr_scale("sqrt_wrt_1024", 4096) == 8
    assert lr_scale("sqrt_wrt_1024", 64) == 1
    with pytest.raises(ValueError, match="did you mean 'sqrt_wrt_1024'"):
        lr_scale("sqrt_wrt_1025", 64)


def test_scaling_touches_the_values_the_recipes_scale():
    rule = ("sqrt_wrt_1024", 2048)
    scale = 4 * math.sqrt(2)
    cosine = scale_lr_schedule(
        {"type": "cosine", "base": 1e-3, "final": 1e-6, "start": 1e-7}, *rule
    )
    assert cosine == {"type": "cosine", "base": 1e-3 * scale, "final": 1e-6, "start": 1e-7}
    warmup = scale_lr_schedule(
        {"type": "warmup_cosine", "start": 1e-6, "peak": 2.0, "end": 1.0}, *rule
    )
    assert warmup == {"type": "warmup_cosine", "start": 1e-6, "peak": 2 * scale, "end": scale}
    assert scale_lr_schedule(2.0, *rule) == 2 * scale
    assert scale_lr_schedule({"type": "constant", "value": 2.0}, *rule)["value"] == 2 * scale
