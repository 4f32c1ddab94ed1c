"""Table of the backbones: ``python tools/list_backbones.py [PATTERN] [--weights-only]``."""

from dinov3_mm.command_line import run_tool
from dinov3_mm.commands.weights import backbones as main

if __name__ == "__main__":
    run_tool(main)
