"""Features of a converted backbone as the library that reads it computes them."""

from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import NamedTuple

import torch
from mmengine.model import BaseModule
from torch import Tensor

from .installing import install_weights
from .loading import load_weights
from .targets import Source


class Features(NamedTuple):
    """Features after the final norm.

    Attributes:
        cls: (B, D).
        patches: (B, N, D), row by row.
    """

    cls: Tensor
    patches: Tensor


class Reader(NamedTuple):
    """How a library reads what was written.

    Attributes:
        package: import name of the library; None for this project.
        features: of the model at a path on images (B, C, H, W), given what was written.
    """

    package: str | None
    features: Callable[[Path, Source, Tensor], Features]

    def version(self) -> str | None:
        """Name and version of the library, None if it is not installed."""
        if self.package is None:
            return "dinov3_mm"
        try:
            return f"{self.package} {import_module(self.package).__version__}"
        except ImportError:
            return None


def own_features(backbone: BaseModule, images: Tensor) -> Features:
    """Features of a backbone of this project."""
    tokens = backbone.forward_tokens(images)
    return Features(tokens.cls, tokens.patches)


def _ours(path: Path, source: Source, images: Tensor) -> Features:
    backbone = type(source.backbone)(arch=source.arch)
    install_weights(backbone, load_weights(path, arch=source.arch))
    return own_features(backbone.eval(), images)


def _transformers(path: Path, source: Source, images: Tensor) -> Features:
    from transformers import AutoModel

    model, loaded = AutoModel.from_pretrained(path, dtype=torch.float32, output_loading_info=True)
    problems = {kind: sorted(names) for kind, names in loaded.items() if names}
    if problems:
        raise ValueError(f"transformers does not load all of {path}: {problems}")
    tokens = model.eval()(images).last_hidden_state
    prefix = 1 + source.backbone.n_storage_tokens
    return Features(tokens[:, 0], tokens[:, prefix:])


def _timm(path: Path, source: Source, images: Tensor) -> Features:
    import timm

    model = timm.create_model(f"local-dir:{path}", pretrained=True).float().eval()
    if source.kind == "DINOv3ConvNeXt":
        featmap = model.head.norm(model.forward_features(images))
        return Features(model(images), featmap.flatten(2).transpose(1, 2))
    tokens = model.forward_features(images)
    return Features(tokens[:, 0], tokens[:, 1 + source.backbone.n_storage_tokens :])


READERS = {
    "official": Reader(None, _ours),
    "mm": Reader(None, _ours),
    "hf": Reader("transformers", _transformers),
    "timm": Reader("timm", _timm),
}
