"""Train a config: ``python tools/train.py CONFIG``; ``dinov3-mm train`` of the package."""

from dinov3_mm.command_line import run_tool
from dinov3_mm.commands.train import main

if __name__ == "__main__":
    run_tool(main)
