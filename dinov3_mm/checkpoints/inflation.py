"""The patch embedding of loaded weights for another number of image channels.

With K kernels ``W_k`` in the file (3: red, green, blue) and C channels in the backbone, a rule
gives the kernels ``V_c``; the bias stays. Statements about inputs are about normalised inputs:
channels that are equal as pixels differ after normalisation with a mean and std of their own.

- ``'mean'``: ``V_c = (1 / C) * sum_k W_k``, the mean of the kernels times K / C. An image whose
  channels are all equal gives the embedding of the K-channel model; for C = 1 this is the sum of
  the kernels.
- ``'repeat'``: with ``n = max(C, K)``, ``V_c = sum of W_(i mod K) / m_(i mod K)`` over the
  ``i < n`` with ``i mod C = c``, where ``m_k`` counts the ``i < n`` with ``i mod K = k``. For
  C >= K the kernels are repeated cyclically, each divided by the number of its copies (times K / C
  where K divides C); for C < K they are folded cyclically, for C = 1 into their sum. An image whose
  channels are all equal gives the embedding of the K-channel model.
- ``'zero'``: ``V_c = W_c`` for c < K, else 0. The first K channels give the embedding of the
  K-channel model whatever the others hold. Needs C >= K.
- ``'append_mean'``: ``V_c = W_c`` for c < K, else ``(1 / K) * sum_k W_k``, without rescaling: how
  the DINOv3 paper adapts its satellite backbone to a fourth, infrared channel. Needs C >= K.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from ..suggest import hint

RULES = ("mean", "repeat", "zero", "append_mean")
# The first layer of a ViT and of a ConvNeXt, (D, C, p, p).
FIRST_LAYERS = ("patch_embed.proj.weight", "downsample_layers.0.0.weight")


def check_rule(rule: str | None) -> None:
    """Raise ValueError unless ``rule`` is a rule or None."""
    if rule is not None and rule not in RULES:
        raise ValueError(f"inflate is {rule!r}; expected one of {RULES}; {hint(str(rule), RULES)}")


def inflate_kernels(weight: Tensor, channels: int, rule: str) -> Tensor:
    """Kernels (D, K, p, p) for K channels as kernels (D, ``channels``, p, p), in the same dtype.

    Raises:
        ValueError: If the rule is unknown, or cannot reduce the number of channels.
    """
    check_rule(rule)
    stored = weight.shape[1]
    if rule in ("zero", "append_mean") and channels < stored:
        raise ValueError(
            f"inflate={rule!r} keeps the {stored} kernels of the file, but the backbone has only "
            f"{channels} channels; use 'mean' or 'repeat'"
        )
    mixing = _mixing_matrix(stored, channels, rule).to(weight.device)
    return torch.einsum("ck,dkhw->dchw", mixing, weight.double()).to(weight.dtype).contiguous()


def inflate_first_layer(
    state_dict: Mapping[str, Tensor], target: Mapping[str, Tensor], rule: str | None
) -> tuple[dict[str, Tensor], list[str]]:
    """State dict whose first layer has the channels of ``target``, and notes about the change.

    Nothing changes without a rule, or where the channels agree.
    """
    state_dict, notes = dict(state_dict), []
    name = _differing_layer(state_dict, target)
    if rule is not None and name is not None:
        stored, channels = state_dict[name].shape[1], target[name].shape[1]
        state_dict[name] = inflate_kernels(state_dict[name], channels, rule)
        notes = [
            f"{name} inflated from {stored} to {channels} channels ({rule}), for which the "
            "statistics of the file do not hold"
        ]
    return state_dict, notes


def inflation_hint(state_dict: Mapping[str, Tensor], target: Mapping[str, Tensor]) -> str | None:
    """What to do about a first layer with other channels; None where it has the same."""
    name = _differing_layer(state_dict, target)
    if name is None:
        return None
    return (
        f"the file is for {state_dict[name].shape[1]} image channels, the backbone for "
        f"{target[name].shape[1]} (in_channels): give inflate='mean' (or another of "
        f"{', '.join(RULES)}) to adapt the first layer"
    )


def _differing_layer(state_dict: Mapping[str, Tensor], target: Mapping[str, Tensor]) -> str | None:
    """Name of the first layer if its kernels differ in their input channels alone."""
    for name in FIRST_LAYERS:
        if name in state_dict and name in target:
            stored, wanted = state_dict[name].shape, target[name].shape
            same_kernels = (stored[0], *stored[2:]) == (wanted[0], *wanted[2:])
            if len(stored) == 4 and same_kernels and stored[1] != wanted[1]:
                return name
    return None


def _mixing_matrix(stored: int, channels: int, rule: str) -> Tensor:
    """Shares (channels, stored) of the stored kernels in the new ones, float64."""
    if rule == "mean":
        return torch.full((channels, stored), 1 / channels, dtype=torch.float64)
    if rule == "repeat":
        steps = torch.arange(max(channels, stored))
        matrix = torch.zeros(channels, stored, dtype=torch.float64)
        matrix[steps % channels, steps % stored] = 1
        return matrix / matrix.sum(0)
    matrix = torch.eye(channels, stored, dtype=torch.float64)
    if rule == "append_mean":
        matrix[stored:] = 1 / stored
    return matrix
