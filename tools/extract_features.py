"""Extract features: ``python tools/extract_features.py IMAGES --weights FILE --out OUT``."""

from dinov3_mm.command_line import run_tool
from dinov3_mm.commands.extract import ON_INTERRUPT, main

if __name__ == "__main__":
    run_tool(main, interrupted=ON_INTERRUPT)
