"""DINOv3 as an OpenMMLab plug-in: importing it registers every core module in MMEngine's root registries."""

__version__ = "0.1.0"
