"""Which strategy fits: ``python tools/plan.py CONFIG --gpus 8 64 256 --gpu-memory 80``."""

from dinov3_mm.command_line import run_tool
from dinov3_mm.commands.configs import plan as main

if __name__ == "__main__":
    run_tool(main)
