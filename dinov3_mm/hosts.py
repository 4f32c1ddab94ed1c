"""The OpenMMLab packages that heads and downstream configs stand on, and what they need to import.

Importing this module prepares the installed hosts for the other installed packages. Head packages
import hosts through :func:`require_host`; a config that uses a backbone in an otherwise stock model
lists ``dinov3_mm.hosts`` in ``custom_imports`` beside ``dinov3_mm``. A host's tool that imports its
models before it reads the config (mmdet's test.py) is run by
``python -m dinov3_mm.hosts TOOL.py ARGS``.
"""

import importlib
import runpy
import sys
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from types import ModuleType

from .errors import hint

# The extra of this project that installs a host.
EXTRAS = {"mmcv": "ops", "mmcv.ops": "ops", "mmpretrain": "ops", "mmseg": "seg", "mmdet": "det"}
_NOTES = ("Could not import OneDL", "Loads checkpoint by ")
_NEED_OPS = ("mmcv.ops", "mmdet")


def require_host(name: str) -> ModuleType:
    """Import a host package.

    Args:
        name: 'mmcv', 'mmcv.ops', 'mmpretrain', 'mmseg' or 'mmdet'.

    Raises:
        ImportError: If the host is not installed, or needs the compiled operators of mmcv and mmcv
            was installed without them; the message says how to install what is missing.
        ValueError: If the name is none of these.
    """
    if name not in EXTRAS:
        raise ValueError(f"{name!r} is no host package; {hint(name, EXTRAS)}")
    for package in ("mmcv", name.partition(".")[0]):
        if find_spec(package) is None:
            raise ImportError(
                f"{package} is not installed; in a checkout run 'bash tools/setup_env.sh ops', "
                f"elsewhere install the extra 'dinov3_mm[{EXTRAS[name]}]' (docs/hosts.md)",
                name=package,
            )
    if name in _NEED_OPS and find_spec("mmcv._ext") is None:
        raise ImportError(
            f"{name} needs the compiled operators of mmcv, and this mmcv was installed without "
            "them; in a checkout run 'bash tools/setup_env.sh ops', elsewhere see docs/hosts.md",
            name="mmcv._ext",
        )
    return importlib.import_module(name)


def _leave_out_multimodal_models() -> None:
    """Keep mmpretrain from importing its multimodal models where they fail.

    They are written for transformers 4, and with transformers 5 an import of ``mmpretrain.models``
    ends in a TypeError, and so do those of mmdet and mmseg, which import mmpretrain if it is there.
    """
    if _major_version("transformers") < 5 or None in map(find_spec, ("mmcv", "mmpretrain")):
        return
    dependency = importlib.import_module("mmpretrain.utils.dependency")
    dependency.WITH_MULTIMODAL = False


def _major_version(distribution: str) -> int:
    try:
        return int(version(distribution).partition(".")[0])
    except PackageNotFoundError:
        return 0


def _leave_out_notes() -> None:
    """Keep MMEngine from printing what the hosts note in passing, once per process.

    ``print_log`` without a logger prints whatever the level, so that each import of a host begins
    with an optional package of which nobody has heard.
    """

    def show(text: object, *args, **kwargs) -> None:
        if not str(text).startswith(_NOTES):
            print(text, *args, **kwargs)

    # A name of the module hides the built-in one from its functions.
    vars(importlib.import_module("mmengine.logging.logger"))["print"] = show


_leave_out_multimodal_models()
_leave_out_notes()

if __name__ == "__main__":
    from dinov3_mm.command_line import TRACEBACK, USAGE, run_tool

    wants_all = sys.argv[1:2] == [TRACEBACK]
    sys.argv = sys.argv[1 + wants_all :]
    if not sys.argv or sys.argv[0].startswith("-"):
        print("usage: python -m dinov3_mm.hosts [--traceback] TOOL.py [ARGS]", file=sys.stderr)
        sys.exit(USAGE)

    def run() -> None:
        """The host's tool; it knows nothing of our options."""
        runpy.run_path(sys.argv[0], run_name="__main__")

    run_tool(run, wants_all=wants_all)
