"""The frozen part of a model: what it is, and what passes through it."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from mmengine.config import Config
from mmengine.registry import MODELS, DefaultScope
from torch import Tensor, nn

from dinov3_mm.engine.config import ConfigError
from dinov3_mm.engine.precision import DTYPES, asked_dtype, autocast_parts, choose_dtype

# Ways into a backbone that our models take.
_ENTRIES = ("forward", "get_intermediate_layers")


class NotCacheableError(ConfigError):
    """What a model does with its backbone cannot be stored."""


@dataclass
class CachedModel:
    """A model whose backbone, or the part of it that is frozen, is computed once.

    Attributes:
        model: on its device, in evaluation mode.
        frozen: the module whose outputs are stored.
        looks_at_images: something of the backbone trains and needs the image, as an adapter does.
        asked, computed: the dtype of the config, and the one that it means here.
    """

    model: nn.Module
    frozen: nn.Module
    looks_at_images: bool
    asked: str
    computed: str

    @property
    def device(self) -> torch.device:
        return next(self.model.parameters()).device


def build_cached_model(cfg: Config) -> CachedModel:
    """Build a config's model for the computation of features.

    Raises:
        ConfigError: a backbone that trains, or a preprocessor that mixes images.
    """
    with DefaultScope.overwrite_default_scope(cfg.get("default_scope", "mmengine")):
        model = MODELS.build(cfg.model)
    model.init_weights()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = model.to(device).eval()
    frozen = frozen_part(model.backbone)
    if getattr(model.data_preprocessor, "batch_augments", None):
        raise ConfigError(
            "feature cache: the preprocessor mixes images (batch_augments); leave them out"
        )
    asked = asked_dtype(cfg) or "fp32"
    computed = choose_dtype(asked, device)
    if computed == "bf16":
        autocast_parts(model, DTYPES[computed])
    return CachedModel(model, frozen, frozen is not model.backbone, asked, computed)


def frozen_part(backbone: nn.Module) -> nn.Module:
    """The backbone if nothing of it trains, else the frozen backbone inside an adapter.

    Raises:
        ConfigError: neither is frozen.
    """
    inner = getattr(backbone, "backbone", None)
    for module in (backbone, inner):
        if module is not None and not any(p.requires_grad for p in module.parameters()):
            return module
    names = [name for name, value in (inner or backbone).named_parameters() if value.requires_grad]
    raise ConfigError(
        f"feature cache: the backbone is not frozen ({len(names)} of its tensors train, "
        f"such as {names[0]}); set frozen_stages to the number of its blocks"
    )


def detour(module: nn.Module, around: Callable[[Callable], Callable]) -> None:
    """Put a function around every way into a module; looked up at each call, so that a change of
    the module's class, as for autocast, is not undone."""
    for name in _ENTRIES:
        if hasattr(type(module), name):
            entry = lambda *a, _name=name, **k: getattr(type(module), _name)(module, *a, **k)  # noqa: E731
            setattr(module, name, around(entry))


class SeenError(Exception):
    """The backbone has been called; what comes after it is not needed."""


@contextmanager
def recorded(module: nn.Module, calls: list, *, stop: bool) -> Iterator[None]:
    """Note outputs and input sizes of a module."""
    depth = [0]

    def around(entry: Callable) -> Callable:
        def forward(inputs: Tensor, *args: Any, **options: Any) -> Any:
            depth[0] += 1
            try:
                outputs = entry(inputs, *args, **options)
            finally:
                depth[0] -= 1
            if depth[0] == 0:
                calls.append((outputs, tuple(inputs.shape[-2:])))
                if stop:
                    raise SeenError
            return outputs

        return forward

    detour(module, around)
    try:
        yield
    finally:
        for name in _ENTRIES:
            module.__dict__.pop(name, None)
