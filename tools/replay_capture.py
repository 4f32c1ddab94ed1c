"""Run a captured training step again: ``python tools/replay_capture.py CONFIG CAPTURE``."""

from dinov3_mm.command_line import run_tool
from dinov3_mm.commands.train import replay as main

if __name__ == "__main__":
    run_tool(main)
