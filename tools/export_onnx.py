"""Export a backbone to ONNX: ``python tools/export_onnx.py FILE OUT.onnx``; see --help."""

from dinov3_mm.command_line import run_tool
from dinov3_mm.commands.weights import onnx as main

if __name__ == "__main__":
    run_tool(main)
