"""What importing the package does, and does not do."""

import subprocess
import sys

HOSTS = ("mmpretrain", "mmseg", "mmdet", "mmcv", "timm", "xformers")

CHECK = f"""
import sys
import dinov3_mm
loaded = [name for name in {HOSTS!r} if name in sys.modules]
assert not loaded, f"import dinov3_mm imports {{loaded}}"
from mmengine.registry import DATASETS, HOOKS, LOOPS, MODELS, STRATEGIES, TRANSFORMS
for registry, name in ((MODELS, "DINOv3ViT"), (MODELS, "DINOv3"), (DATASETS, "SyntheticScenes"),
                       (HOOKS, "GramAnchorHook"), (LOOPS, "PretrainLoop"),
                       (STRATEGIES, "PretrainStrategy"), (TRANSFORMS, "MultiCrop")):
    assert name in registry.module_dict, f"{{name}} is not in MMEngine's root registry"
"""


def test_import_registers_ours_and_loads_no_host():
    result = subprocess.run([sys.executable, "-c", CHECK], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
