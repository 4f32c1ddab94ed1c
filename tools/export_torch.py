"""Export a backbone with torch.export, and keep the file only if it computes like the model.

python tools/export_torch.py dinov3_backbone.safetensors backbone.pt2 --dynamic
"""

from dinov3_mm.apis.deployment.command import export_parser, run_torch
from dinov3_mm.command_line import run_tool

if __name__ == "__main__":
    run_tool(lambda: run_torch(export_parser(__doc__).parse_args()))
