"""The networks of the algorithm and the parts that are compiled and sharded one at a time."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from torch.compiler import config as compiler_config

from dinov3_mm.models.pretraining import DistillationTeachers

# Networks of the algorithm that run on their own; each holds a backbone and perhaps heads.
NETWORKS = ("student", "teacher", "gram_teacher", "distillation_teacher")


def networks_of(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Name and module of every network of the algorithm that is there.

    Those of several students and of several distillation teachers are named apart.
    """
    for student, algorithm in getattr(model, "students", {}).items():
        for name, network in networks_of(algorithm):
            yield f"students.{student}.{name}", network
    for name in NETWORKS:
        network = getattr(model, name, None)
        if isinstance(network, DistillationTeachers):
            for teacher, each in network.items():
                yield f"{name}.{teacher}", each
        elif isinstance(network, nn.Module):
            yield name, network


def backbones_of(model: nn.Module) -> list[nn.Module]:
    """The backbone of every network of the algorithm."""
    return [
        child
        for _, network in networks_of(model)
        for name, child in network.named_children()
        if name == "backbone"
    ]


def units_of(backbone: nn.Module) -> list[nn.Module]:
    """Parts of a backbone in the order of their forward pass: its blocks, for a convolutional one
    with the down-sampling before each stage.
    """
    if hasattr(backbone, "blocks"):
        return list(backbone.blocks)
    if hasattr(backbone, "downsample_layers"):
        stages = zip(backbone.downsample_layers, backbone.stages)
        return [unit for downsample, blocks in stages for unit in (downsample, *blocks)]
    return []


def compile_units(model: nn.Module, **options: Any) -> int:
    """Compile every block of every network on its own, in place; names of parameters stay.

    Blocks are alike, so one compilation serves all of them, and the loop over blocks stays plain
    Python.

    Args:
        model: the algorithm.
        **options: of ``torch.compile``.

    Returns:
        How many parts were compiled.
    """
    _keep_instruction_sets_apart()
    units = [unit for backbone in backbones_of(model) for unit in units_of(backbone)]
    for unit in units:
        unit.compile(**options)
    return len(units)


def _keep_instruction_sets_apart() -> None:
    """Cache what is compiled for the processor at hand under its instruction set.

    Inductor's cached C++ loops advance by the width of the vectors that they were written for, but
    its key names GPUs only. In a home folder that several kinds of machines share, a graph for
    AVX-512 would be loaded under AVX2 and write past the end of its tensors.
    """
    tag = f"cpu:{torch.backends.cpu.get_cpu_capability()}"
    if tag not in compiler_config.cache_key_tag:
        compiler_config.cache_key_tag += tag
