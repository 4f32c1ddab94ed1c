"""Predict: ``python tools/demo_depth.py CONFIG INPUTS... --checkpoint FILE``; see --help."""

from dinov3_mm.command_line import run_tool
from dinov3_mm.commands.demo import run_demo

if __name__ == "__main__":
    run_tool(lambda: run_demo("depth"))
