"""Reading of the reference vectors in ``tests/data/golden``, and the parity rule."""

import json
import lzma
from pathlib import Path

import torch
from safetensors.torch import load

GOLDEN_DIR = Path(__file__).parent / "data" / "golden"


def load_golden(name: str) -> tuple[dict, dict[str, torch.Tensor]]:
    """Return the JSON description and the tensors (maybe none) of one golden file."""
    description = json.loads((GOLDEN_DIR / f"{name}.json").read_text())
    tensors = GOLDEN_DIR / f"{name}.safetensors.xz"
    return description, load(lzma.decompress(tensors.read_bytes())) if tensors.exists() else {}


def max_difference(actual: torch.Tensor, expected: torch.Tensor) -> float:
    """Largest absolute difference, after a check that the shapes agree."""
    assert actual.shape == expected.shape, f"shape {tuple(actual.shape)} != {tuple(expected.shape)}"
    if expected.numel() == 0:
        return 0.0
    return (actual.detach().double() - expected.detach().double()).abs().max().item()


def assert_parity(actual: torch.Tensor, expected: torch.Tensor, tolerance: float = 1e-5) -> float:
    """Assert ``|difference| <= tolerance * max(1, max|expected|)`` and return the difference."""
    difference = max_difference(actual, expected)
    scale = max(1.0, expected.abs().max().item()) if expected.numel() else 1.0
    assert difference <= tolerance * scale, (
        f"differs by {difference:.3e}, bar {tolerance * scale:.3e}"
    )
    return difference


def assert_rounded_alike(actual: torch.Tensor, expected: torch.Tensor) -> None:
    """Assert that values rounded to bfloat16 are the recorded ones but for a rare last place.

    Where the exact value lies between two bfloat16, the last bit of the fp32 in front of the
    rounding decides, and that one differs between processors.
    """
    assert actual.dtype == expected.dtype
    assert torch.equal(actual, actual.bfloat16().to(actual.dtype)), "not rounded to bfloat16"
    difference = max_difference(actual, expected)
    unit = 2.0**-7 * expected.double().abs().clamp_min(2.0**-7)
    inside = (actual.double() - expected.double()).abs() <= unit
    assert inside.all(), f"differs by {difference:.3e}, more than one unit in the last place"
    share = (actual != expected).double().mean().item()
    assert share <= 0.01, f"differs by a rounding in {share:.0%} of the values"
