"""Mask2Former on the adapter over the frozen toy backbone beats one over a random backbone.

    python -m tests.acceptance.mask2former_quickstart --weights FILE [--out DIR] [--seeds 2]

See ``tests.acceptance.segmentation_quickstart``.
"""

from tests.acceptance.frozen_quickstart import run
from tests.acceptance.segmentation_quickstart import draw

if __name__ == "__main__":
    run("mask2former", "mIoU", draw)
