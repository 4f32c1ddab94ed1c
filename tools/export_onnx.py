"""Export a backbone to ONNX, and keep the file only if ONNX Runtime computes it like PyTorch.

python tools/export_onnx.py dinov3_backbone.safetensors backbone.onnx
python tools/export_onnx.py dinov3_vits16 vits16.onnx --weights FILE.pth --dynamic
"""

from dinov3_mm.apis.deployment.command import onnx_parser, run_onnx
from dinov3_mm.command_line import run_tool

if __name__ == "__main__":
    run_tool(lambda: run_onnx(onnx_parser(__doc__).parse_args()))
