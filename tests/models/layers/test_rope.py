"""RoPE tables: cache, augmentation, errors. Values are in tests/parity."""

import copy
import math

import pytest
import torch

from dinov3_mm.models.layers import RotaryEmbedding2D
from tests.golden import assert_parity


def test_one_patch_is_not_rotated():
    sin, cos = RotaryEmbedding2D(64)(1, 1)
    assert torch.equal(sin, torch.zeros(1, 32)) and torch.equal(cos, torch.ones(1, 32))


def test_worked_example():
    sin, _ = RotaryEmbedding2D(64)(2, 3)
    periods = 100 ** (torch.arange(16) / 16)
    assert_parity(sin[4, :16], torch.sin(math.pi / periods), 1e-6)  # patch (1, 1): y = 0.5
    assert torch.equal(sin[4, 16:], torch.zeros(16))  # x = 0


def test_cache_follows_the_periods():
    rope = RotaryEmbedding2D(16)
    first = rope(2, 3)[0]
    assert rope(2, 3)[0] is first
    rope.load_state_dict({"periods": rope.periods * 2})
    loaded = rope(2, 3)[0]
    assert not torch.equal(loaded, first)
    rope.periods = rope.periods * 2
    assert not torch.equal(rope(2, 3)[0], loaded)


def test_cast_periods_keep_the_rope_dtype():
    rope = RotaryEmbedding2D(64)
    exact = rope(3, 5)[0]
    rounded = rope.to(torch.bfloat16)(3, 5)[0]
    assert rope.periods.dtype == torch.bfloat16 and rounded.dtype == torch.float32
    assert 1e-4 < (exact - rounded).abs().max() < 1e-1


def test_tables_made_in_inference_mode_serve_training():
    rope = RotaryEmbedding2D(16)
    with torch.inference_mode():
        rope(2, 2)
    x = torch.ones(4, 8, requires_grad=True)
    (x * rope(2, 2)[1]).sum().backward()
    assert torch.equal(x.grad, rope(2, 2)[1])


def test_a_module_made_in_inference_mode_follows_its_periods():
    with torch.inference_mode():
        rope = RotaryEmbedding2D(16)
        first = rope(2, 2)[0]
        rope.periods.mul_(2)
        assert not torch.equal(rope(2, 2)[0], first)


def test_copies_do_not_share_a_stale_cache():
    rope = RotaryEmbedding2D(16)
    first = rope(2, 2)[0]
    twin = copy.deepcopy(rope)
    twin.periods.mul_(2)
    assert not torch.equal(twin(2, 2)[0], first)
    assert torch.equal(rope(2, 2)[0], first)


def _coordinates(rope: RotaryEmbedding2D, augment: bool) -> torch.Tensor:
    """Coordinates (N, 2) read back from the angles of the longest period, which do not wrap."""
    sin, cos = rope(4, 4, augment=augment)
    angles = torch.atan2(sin, cos).unflatten(1, (2, -1))[..., -1]
    return angles * rope.periods[-1] / (2 * math.pi)


@pytest.mark.parametrize("kind", ["shift", "jitter", "rescale"])
def test_augmentation(kind):
    strength = {"shift": 0.1, "jitter": 1.5, "rescale": 2.0}[kind]
    rope = RotaryEmbedding2D(64, **{f"{kind}_coords": strength})
    plain = _coordinates(rope, augment=False)
    changes = []
    for _ in range(200):
        augmented = _coordinates(rope, augment=True)
        change = augmented - plain if kind == "shift" else (augmented / plain).log()
        assert_parity(change, change[:1].expand_as(change), 1e-4)  # one draw for all patches
        changes.append(change[0])
    changes = torch.stack(changes)
    bound = strength if kind == "shift" else math.log(strength)
    assert 0.9 * bound < changes.abs().max() <= bound * 1.001
    shared = (changes[:, 0] - changes[:, 1]).abs().max() < 1e-4
    assert shared == (kind == "rescale")


def test_augmentation_is_off_without_request():
    rope = RotaryEmbedding2D(64, rescale_coords=2.0)
    assert torch.equal(rope(3, 3)[0], RotaryEmbedding2D(64)(3, 3)[0])


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"head_dims": 18}, "multiple of 4"),
        ({"head_dims": 16, "min_period": 1.0}, "either rope_base"),
        ({"head_dims": 16, "min_period": 1.0, "max_period": 2.0}, "either rope_base"),
        ({"head_dims": 16, "base": None}, "either rope_base"),
        ({"head_dims": 16, "normalize_coords": "mean"}, "'separate', 'min', 'max'"),
        ({"head_dims": 16, "dtype": "fp64"}, "'fp32', 'fp16', 'bf16'"),
        ({"head_dims": 16, "rescale_coords": 0.5}, "factor >= 1"),
    ],
)
def test_errors(arguments, message):
    with pytest.raises(ValueError, match=message):
        RotaryEmbedding2D(**arguments)


def test_tables_of_few_image_sizes_are_kept():
    rope = RotaryEmbedding2D(16)
    for side in range(1, 100):
        rope(side, 2)
    assert len(rope._cache) == 32
    assert (99, 2) in rope._cache
