"""The rules at the recipes they come from, at the extremes, and in what they say."""

import math

import pytest

from dinov3_mm.engine.config import auto as rules

IMAGES = (100, 5_000, 50_000, 1_000_000, 10_000_000)
BATCHES = (8, 64, 512, 2048)


def test_the_recipes_that_the_numbers_come_from():
    # ImageNet recipe: 65,536 prototypes at 1.28 M images and batch 2048 (a power of two below).
    assert rules.prototypes(1_311_000, 2048).value == 65536
    # High-resolution stage of the 7B: 7.07e-5 at batch 2048.
    assert rules.learning_rate(4096, 2048).value == pytest.approx(7.07e-5, rel=1e-3)
    # Distillation: 0.994 at batch 1920, in a run that is long enough.
    assert rules.teacher_momentum(1920, 25_000).value == pytest.approx(0.994, abs=1e-6)


def test_momentum_is_the_released_one_to_the_power_of_the_batch_ratio():
    for batch in (64, 256, 1024):
        value = rules.teacher_momentum(batch, 10**9).value
        assert value == pytest.approx(0.994 ** (batch / 1920), abs=2e-5)


def test_learning_rate_follows_the_square_root_of_the_batch():
    assert rules.learning_rate(768, 64).value == pytest.approx(1e-4 * math.sqrt(64 / 1024))
    assert "2.5e-05 = 0.0001 (width 768) x sqrt(64 / 1024)" in rules.learning_rate(768, 64).text
    for width in (384, 768, 1024, 1280, 1536):
        rates = [rules.learning_rate(width, batch).value for batch in BATCHES]
        assert rates == sorted(rates)
        assert rates[3] / rates[2] == pytest.approx(2, rel=5e-3)


@pytest.mark.parametrize("num_images", IMAGES)
@pytest.mark.parametrize("batch", BATCHES)
def test_extremes_stay_within_reason(num_images, batch):
    iters = rules.iterations(num_images, batch)
    assert 500 <= iters.value <= 25_000
    heads = rules.prototypes(num_images, batch).value
    assert 256 <= heads <= 65536 and math.log2(heads).is_integer()
    assert heads <= max(256, 64 * batch) and heads <= max(256, num_images / 20)
    freeze = rules.head_start(iters.value).value
    assert 100 <= freeze <= 1000 and freeze <= iters.value / 4
    assert 0.9 < rules.teacher_momentum(batch, iters.value).value < 1
    assert 1e-6 < rules.learning_rate(768, batch).value < 1e-3
    every = rules.held_out_every(num_images).value
    assert 5 <= every <= 1000 and num_images / every >= 20
    assert rules.interval("evaluation", iters.value, 10).value == iters.value // 10


def test_iterations_say_what_limits_them():
    free = rules.iterations(9600, 64)
    assert free == (3000, "iterations 3000 = 20 epochs x 9600 images / batch 64")
    assert rules.iterations(100, 64).text.endswith("at least 500")
    assert rules.iterations(10**7, 1024).text.endswith("at most 25000")


def test_a_batch_is_at_most_half_of_the_images_and_divides():
    assert rules.global_batch(64, 2, 1, 10**6).value == 128
    assert rules.global_batch(64, 8, 2, 10**6).value == 1024
    small = rules.global_batch(64, 3, 1, 100)
    assert small.value == 48 and "cut to 48" in small.text
    assert rules.global_batch(64, 8, 1, 5).value == 8
