"""Convert weights: ``python tools/convert_checkpoint.py SRC DST --to hf``; see --help."""

from dinov3_mm.command_line import run_tool
from dinov3_mm.commands.weights import convert as main

if __name__ == "__main__":
    run_tool(main)
