"""Mean and std per channel: ``python tools/compute_statistics.py CONFIG_OR_FOLDER``."""

from dinov3_mm.command_line import run_tool
from dinov3_mm.commands.configs import statistics as main

if __name__ == "__main__":
    run_tool(main)
