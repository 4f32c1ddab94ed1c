"""Predict: ``python tools/demo_detect.py CONFIG INPUTS... --checkpoint FILE``; see --help."""

import dinov3_mm  # noqa: F401  (registers what configs name)
from dinov3_mm.apis.prediction.jobs import run_demo
from dinov3_mm.command_line import run_tool

if __name__ == "__main__":
    run_tool(lambda: run_demo("detection"))
