"""Multipliers per parameter and fused groups against the reference's lists, exactly."""

import pytest
import torch
from torch import nn

from dinov3_mm.engine.optim import build_param_groups
from tests.golden import load_golden

GOLDEN = {k: v for k, v in load_golden("ssl_param_groups")[0].items() if isinstance(v, dict)}


def module_with(names: list[str]) -> nn.Module:
    """A module whose ``named_parameters`` are ``names``, in that order."""
    root = nn.Module()
    for name in names:
        module = root
        *path, leaf = name.split(".")
        for part in path:
            if part not in module._modules:
                module.add_module(part, nn.ModuleList() if part == "blocks" else nn.Module())
            module = module._modules[part]
        module.register_parameter(leaf, nn.Parameter(torch.zeros(1)))
    return root


@pytest.mark.parametrize("case", GOLDEN)
def test_groups_match_the_reference(case):
    expected = GOLDEN[case]
    names = [param["name"] for param in expected["params"]]
    settings = {
        key: expected["settings"][key] for key in ("layerwise_decay", "patch_embed_lr_mult")
    }
    groups = build_param_groups(module_with(names), "part", **settings)

    keys = ("lr_multiplier", "wd_multiplier", "is_last_layer")
    found = {
        name.removeprefix("part."): {key: group[key] for key in keys}
        for group in groups
        for name, _ in group["params"]
    }
    assert found == {
        param["name"]: {key: param[key] for key in keys} for param in expected["params"]
    }
    assert [
        {**{key: group[key] for key in keys}, "n_params": len(group["params"])} for group in groups
    ] == expected["fused_groups"]
    assert len(groups) == expected["n_fused_groups"]
