"""Rendered scenes with complete ground truth, the data that comes along."""

from dinov3_mm.datasets.synthetic_scenes.render import Rendering
from dinov3_mm.datasets.synthetic_scenes.scene import Camera, Scene, SceneObject

from .render import SyntheticScenes

__all__ = ["Camera", "Rendering", "Scene", "SceneObject", "SyntheticScenes"]
