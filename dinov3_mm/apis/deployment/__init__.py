"""Backbones as ONNX and torch.export files that are checked against PyTorch."""

from .check import Bounds, Difference, ExportMismatchError, print_differences
from .graph import OUTPUTS
from .onnx_file import export_onnx
from .request import ExportReport
from .torch_file import export_torch

__all__ = [
    "OUTPUTS",
    "Bounds",
    "Difference",
    "ExportMismatchError",
    "ExportReport",
    "export_onnx",
    "export_torch",
    "print_differences",
]
