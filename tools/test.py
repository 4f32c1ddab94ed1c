"""Test a model: ``python tools/test.py CONFIG [CHECKPOINT]``; see --help."""

from dinov3_mm.command_line import run_tool
from dinov3_mm.commands.heads import test_command as main

if __name__ == "__main__":
    run_tool(main)
