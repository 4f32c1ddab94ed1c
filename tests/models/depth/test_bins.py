"""Bins, decoding to metres and input sizes: recorded values, closed forms, errors.

``heads_linear_depth`` and ``heads_patch_adapters`` are trimmed: the first lacks a resized copy of
its logits, the second two of three channels.
"""

import pytest
import torch

from tests.golden import assert_parity, load_golden
from tests.hosts.lane import require_hosts

require_hosts()

from dinov3_mm.models.depth.bins import (  # noqa: E402
    bin_centers,
    expected_depth,
    regressed_depth,
)
from dinov3_mm.models.depth.estimator import keep, pad_to_center, stretch  # noqa: E402

LOW, HIGH = 0.001, 10.0


@pytest.mark.parametrize("strategy, high", [("linear", HIGH), ("log", HIGH), ("mixlog", 96.0)])
def test_released_bins(strategy, high):
    _, golden = load_golden("heads_linear_depth")
    assert_parity(bin_centers(strategy, 256, LOW, high), golden[f"out.bins_{strategy}_256"])


@pytest.mark.parametrize("strategy", ["linear", "log"])
@pytest.mark.parametrize("norm", ["linear", "softmax", "sigmoid"])
def test_released_decoding(strategy, norm):
    _, golden = load_golden("heads_linear_depth")
    depth = expected_depth(golden["out.bn_logits"], bin_centers(strategy, 16, LOW, HIGH), norm)
    assert_parity(depth, golden[f"out.depth_{strategy}_{norm}"])


def test_released_decoding_of_canopy_height_and_regression():
    _, golden = load_golden("heads_linear_depth")
    logits = golden["out.bn_logits"]
    depth = expected_depth(logits, bin_centers("mixlog", 16, LOW, 96.0), "mixlog")
    assert_parity(depth, golden["out.depth_mixlog"])
    assert_parity(regressed_depth(logits[:, :1], LOW), golden["out.depth_regression"])


@pytest.mark.parametrize("norm", ["linear", "softmax", "sigmoid"])
def test_logits_that_are_all_the_same_give_the_mean_bin(norm):
    bins = bin_centers("linear", 8, 1.0, 5.0)
    depth = expected_depth(torch.full((1, 8, 2, 2), 0.7), bins, norm)
    torch.testing.assert_close(depth, torch.full((1, 1, 2, 2), 3.0))


def test_mixlog_of_dead_logits_is_finite():
    bins = bin_centers("mixlog", 16, LOW, 96.0)
    depth = expected_depth(torch.full((1, 16, 2, 2), -3.0), bins, "mixlog")
    torch.testing.assert_close(depth, 8 * bins.mean().expand(1, 1, 2, 2))


def test_decoding_is_in_fp32_under_autocast():
    bins = bin_centers("linear", 64, LOW, HIGH)
    logits = torch.randn(1, 64, 4, 4)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        depth = expected_depth(logits, bins, "linear")
    assert depth.dtype == torch.float32
    assert torch.equal(depth, expected_depth(logits, bins, "linear"))


@pytest.mark.parametrize(
    "arguments, message",
    [
        (("linaer", 16, LOW, HIGH), "did you mean 'linear'"),
        (("linear", 1, LOW, HIGH), "num_bins is 1"),
        (("linear", 16, 5.0, 5.0), "no range"),
        (("log", 16, 0.0, 5.0), "no range"),
    ],
)
def test_bins_that_are_none(arguments, message):
    with pytest.raises(ValueError, match=message):
        bin_centers(*arguments)


def test_norm_that_is_none():
    with pytest.raises(ValueError, match="did you mean 'softmax'"):
        expected_depth(torch.zeros(1, 4, 1, 1), torch.ones(4), "softmx")


def test_released_padding_and_stretching():
    _, golden = load_golden("heads_patch_adapters")
    assert_parity(pad_to_center(golden["in.x"], 16), golden["out.center_pad16"])
    assert_parity(stretch(golden["in.x"], 16), golden["out.stretch16"])


@pytest.mark.parametrize("change", [pad_to_center, stretch, keep])
def test_multiples_stay_as_they_are(change):
    images = torch.randn(1, 3, 32, 48)
    assert torch.equal(change(images, 16), images)
