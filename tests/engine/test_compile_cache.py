"""Blocks compiled for one instruction set are not loaded under another."""

import os
import subprocess
import sys

import pytest

SCRIPT = """
import torch
from torch import nn
from torch._dynamo.utils import counters

from dinov3_mm.engine.strategies.ddp import compile_units
from dinov3_mm.models.layers import LayerNorm

blocks = nn.Sequential(LayerNorm(100))
model = nn.Module()
model.student = nn.ModuleDict(dict(backbone=nn.ModuleDict(dict(blocks=blocks))))
assert compile_units(model) == 1
blocks[0](torch.ones(1, 100))
hits = counters["inductor"]["fxgraph_cache_hit"] + counters["aot_autograd"]["autograd_cache_hit"]
print(torch.backends.cpu.get_cpu_capability(), hits)
"""


def compile_block(folder, **environment: str) -> tuple[str, int]:
    """Instruction set of a new process, and how much of its compilation was in the cache."""
    environment = {**os.environ, **environment, "TORCHINDUCTOR_CACHE_DIR": str(folder)}
    command = [sys.executable, "-c", SCRIPT]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    capability, hits = done.stdout.split()[-2:]
    return capability, int(hits)


@pytest.mark.slow
def test_each_instruction_set_has_its_own_entries(tmp_path):
    capability, hits = compile_block(tmp_path)
    assert hits == 0
    assert compile_block(tmp_path)[1] > 0
    other, hits = compile_block(tmp_path, ATEN_CPU_CAPABILITY="default")
    if other != capability:
        assert hits == 0
