"""Train a head for every combination of values: ``python tools/sweep.py CONFIG --grid ...``."""

from dinov3_mm.command_line import run_tool
from dinov3_mm.commands.heads import sweep_command as main

if __name__ == "__main__":
    run_tool(main)
