"""The networks of the algorithm and the parts that are compiled and sharded one at a time."""

import os
import shutil
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from torch.compiler import config as compiler_config
from torch.utils._triton import has_triton_package

from dinov3_mm.models.pretraining import DistillationTeachers

# Kinds of inputs, and widths of a ConvNeXt, for which one block may be compiled; torch's own limit
# of 8 would leave a network uncompiled halfway.
_MAX_KINDS = 64

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
    dynamo = torch._dynamo.config
    dynamo.recompile_limit = max(dynamo.recompile_limit, _MAX_KINDS)
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


def decide_compile(setting: bool | str, device: torch.device) -> tuple[bool, str | None]:
    """Whether blocks and losses are compiled, and why not if that was wished for or left open.

    Args:
        setting: ``compile_blocks`` of a strategy: 'auto' compiles on a GPU that has what it takes.
        device: where the model trains.

    Raises:
        ValueError: another setting.
        RuntimeError: True on a machine that cannot compile.
    """
    if setting not in (True, False, "auto"):
        raise ValueError(f"compile_blocks is {setting!r}; expected True, False or 'auto'")
    if not setting:
        return False, None
    if setting == "auto" and device.type != "cuda":
        return False, f"off on {device.type} (compile_blocks='auto' compiles on a GPU)"
    obstacle = compile_obstacle(device)
    if obstacle is None:
        return True, None
    if setting == "auto":
        return False, f"off, the run is slower than it could be: {obstacle}"
    raise RuntimeError(
        f"strategy.compile_blocks=True: {obstacle}. Or train without: "
        "--cfg-options strategy.compile_blocks=False"
    )


def compile_obstacle(device: torch.device) -> str | None:
    """What torch.compile lacks on this machine for ``device``; None if nothing."""
    kind, variable, names = ("C++", "CXX", ("g++", "clang++"))
    if device.type == "cuda":
        # Triton compiles a small launcher for every kernel.
        kind, variable, names = ("C", "CC", ("gcc", "clang"))
        if not has_triton_package():
            return "torch.compile needs triton, which is not installed; install it"
        if torch.cuda.device_count():
            major, minor = torch.cuda.get_device_capability(device)
            if major < 7:
                found = f"{device} has {major}.{minor}"
                return f"torch.compile needs compute capability 7.0, and {found}"
    wanted = os.environ.get(variable)
    if not any(shutil.which(name) for name in ((wanted,) if wanted else names)):
        sought = f"{variable}={wanted}" if wanted else " or ".join(names)
        return (
            f"torch.compile needs a {kind} compiler, and there is no {sought}; install one or name "
            f"it by the variable {variable}"
        )
    return None
