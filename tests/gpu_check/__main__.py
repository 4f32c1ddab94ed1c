"""One item of the GPU check in this process.

    python -m tests.gpu_check ITEM --device cuda --out FILE

The file is whole at every moment, so what an item measured before it failed or ran out of time is
kept. ``tools/gpu_check.py`` starts a process of this for each item.
"""

import argparse
import importlib
import logging
import sys
import traceback
from pathlib import Path

from mmengine.logging import MMLogger

from tests.gpu_check.check import Check, Skip, last_line
from tests.gpu_check.items import ITEMS


def run_item(name: str, device: str, out: Path) -> str:
    """Run an item and leave its record in ``out``; the status."""
    check = Check(device, out)
    check.save("running")
    item = ITEMS[name]
    try:
        module = importlib.import_module(f"tests.gpu_check.{item.module}")
        getattr(module, name.replace("-", "_"))(check)
    except Skip as skip:
        check.save("skipped", str(skip))
        return "skipped"
    except (Exception, SystemExit) as error:
        traceback.print_exc()
        check.save("failed", last_line(error))
        return "failed"
    broken = [f"{f['name']}: {f['value']}" for f in check.figures if f["holds"] is False]
    check.save("failed" if broken else "passed", "; ".join(broken))
    return "failed" if broken else "passed"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("item", choices=ITEMS)
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    MMLogger.get_current_instance().setLevel(logging.WARNING)
    sys.exit(run_item(args.item, args.device, args.out) == "failed")


if __name__ == "__main__":
    main()
