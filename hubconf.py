"""Official names for ``torch.hub.load(FOLDER, 'dinov3_vits16', source='local', weights=FILE)``."""

from dinov3_mm.apis.hub import hub_entry_points as _hub_entry_points
from dinov3_mm.apis.hub_heads import head_entry_points as _head_entry_points

dependencies = [
    "torch",
    "torchvision",
    "mmengine",
    "numpy",
    "PIL",
    "cv2",
    "safetensors",
    "rich",
    "matplotlib",
    "psutil",
]

globals().update(_hub_entry_points())
globals().update(_head_entry_points())
