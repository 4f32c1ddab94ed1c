"""Export a backbone: ``python tools/export_torch.py FILE OUT.pt2``; see --help."""

from dinov3_mm.command_line import run_tool
from dinov3_mm.commands.weights import torch_export as main

if __name__ == "__main__":
    run_tool(main)
