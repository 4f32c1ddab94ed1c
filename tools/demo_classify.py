"""Predict: ``python tools/demo_classify.py CONFIG INPUTS... --checkpoint FILE``; see --help."""

import dinov3_mm  # noqa: F401  (registers what configs name)
from dinov3_mm.apis.prediction.command import run_demo

if __name__ == "__main__":
    run_demo("classification")
