"""In which dtype a network computes: chosen by the device, said in one line, kept to its parts.

Weights are fp32 always. bf16 means autocast of the parts with the large products, backbone, neck
and the bodies of heads; what they give is fp32 again. Losses, matching, box and mask
post-processing and linear probes lie outside and stay fp32, and so do mmcv's operators, whose
coordinates are useless in bf16 and whose kernels do not take it.
"""

import argparse
from collections.abc import Callable, Iterator, Mapping
from dataclasses import fields, is_dataclass, replace
from functools import cache
from typing import Any

import torch
from mmengine.config import Config
from mmengine.hooks import Hook
from mmengine.registry import HOOKS
from torch import Tensor, nn

from dinov3_mm.errors import ConfigError, hint

AUTO = "auto"
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
# What the hosts call the parts of their models; below a RoI head its two heads.
PARTS = (
    "backbone",
    "neck",
    "encoder",
    "decoder",
    "decode_head",
    "auxiliary_head",
    "rpn_head",
    "bbox_head",
    "roi_head.bbox_head",
    "roi_head.mask_head",
    "head",
)
SWITCH = "compute_dtype"


def has_bf16(device: torch.device) -> bool:
    """Whether a CUDA device has bf16 units; older ones imitate them more slowly than fp32 runs."""
    return torch.version.hip is not None or torch.cuda.get_device_capability(device) >= (8, 0)


def choose_dtype(
    asked: str,
    device: str | torch.device,
    *,
    supports: Callable[[torch.device], bool] = has_bf16,
) -> str:
    """The dtype to compute in.

    Args:
        asked: 'fp32', 'bf16', or 'auto': 'bf16' on a GPU that has it, 'fp32' elsewhere.
        device: where the network is.
        supports: whether a CUDA device has bf16.

    Returns:
        'fp32' or 'bf16'.

    Raises:
        ValueError: Another dtype. fp16 is refused: activations may exceed its largest number.
    """
    if asked in ("fp16", "float16", "half"):
        raise ValueError(
            f"dtype is {asked!r}, which is refused: activations of these networks may exceed "
            "65504, the largest number of fp16, and become infinite; take 'bf16', which has the "
            "range of fp32, or 'fp32'"
        )
    if asked not in (AUTO, *DTYPES):
        raise ValueError(
            f"dtype is {asked!r}; expected 'auto', 'fp32' or 'bf16' "
            f"({hint(str(asked), (AUTO, *DTYPES))})"
        )
    if asked != AUTO:
        return asked
    device = torch.device(device)
    return "bf16" if device.type == "cuda" and supports(device) else "fp32"


def dtype_option(text: str) -> str:
    """A ``--dtype`` of a command line: what :func:`choose_dtype` takes."""
    try:
        choose_dtype(text, "cpu")
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error
    return text


def describe_choice(asked: str, dtype: str, device: str | torch.device) -> str:
    """The choice in words: ``bf16 (auto: cuda)``, ``fp32 (auto: cpu)``, ``bf16 (as asked)``."""
    device = torch.device(device)
    if asked != AUTO:
        return f"{dtype} (as asked)"
    lacks = " has no bf16" if device.type == "cuda" and dtype == "fp32" else ""
    return f"{dtype} (auto: {device.type}{lacks})"


def autocast_parts(model: nn.Module, dtype: torch.dtype) -> list[str]:
    """Let the parts of a host's model compute under autocast.

    A part is a module of :data:`PARTS` whose class does not say ``computes_in_fp32 = True``. Its
    tensors come out in fp32. Weights, names and states stay, and a copy of the model behaves alike.

    Args:
        model: an inner model, without wrappers; changed in place.
        dtype: of the products.

    Returns:
        Names of the parts, those that hold several included.
    """
    found = []
    for name, part in _parts(model):
        if getattr(part, "computes_in_fp32", False):
            continue
        for module in part.modules():
            # Our own deformable attention keeps its coordinates itself.
            if type(module).__module__.startswith("mmcv.ops"):
                module.__class__ = _in_fp32(type(module))
        autocast_module(part, dtype)
        found.append(name)
    return found


def autocast_module(module: nn.Module, dtype: torch.dtype) -> None:
    """Let one module compute under autocast and give fp32."""
    if not hasattr(module, "autocast_dtype"):
        module.__class__ = _under_autocast(type(module), dtype)


def _parts(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    for name in PARTS:
        part = model
        for attribute in name.split("."):
            part = getattr(part, attribute, None)
        if isinstance(part, nn.ModuleList):  # one head a stage
            yield from ((f"{name}.{index}", one) for index, one in enumerate(part))
        elif isinstance(part, nn.Module):
            yield name, part


# Classes in place of hooks and of a patched ``forward``: heads call ``self.forward`` directly, and
# a patched one would, in a deep copy, still run the original.
@cache
def _under_autocast(kind: type, dtype: torch.dtype) -> type:
    def forward(self, *args, **kwargs):
        with torch.autocast(_device_of(self, args).type, dtype):
            outputs = kind.forward(self, *args, **kwargs)
        return _as_fp32(outputs)

    return _named_like(kind, forward, autocast_dtype=dtype)


@cache
def _in_fp32(kind: type) -> type:
    def forward(self, *args, **kwargs):
        with torch.autocast(_device_of(self, args).type, enabled=False):
            return kind.forward(self, *_as_fp32(args), **_as_fp32(kwargs))

    # Not of the module 'mmcv.ops': a second call finds nothing to do.
    return _named_like(kind, forward, __module__=__name__)


def _named_like(kind: type, forward: Callable, **members: Any) -> type:
    named = {"__module__": kind.__module__, "__qualname__": kind.__qualname__}
    return type(kind.__name__, (kind,), {**named, "forward": forward, **members})


def _device_of(module: nn.Module, args: Any) -> torch.device:
    tensor = next(module.parameters(), None)
    tensor = next((a for a in args if isinstance(a, Tensor)), None) if tensor is None else tensor
    return torch.device("cpu") if tensor is None else tensor.device


def _as_fp32(value: Any) -> Any:
    """bf16 tensors as fp32, also in containers and dataclasses; everything else as it is."""
    if isinstance(value, Tensor):
        return value.float() if value.dtype == torch.bfloat16 else value
    if isinstance(value, (list, tuple)):
        parts = [_as_fp32(part) for part in value]
        return type(value)(*parts) if hasattr(value, "_fields") else type(value)(parts)
    if isinstance(value, Mapping):
        return {name: _as_fp32(part) for name, part in value.items()}
    if is_dataclass(value) and not isinstance(value, type):
        changed = {field.name: _as_fp32(getattr(value, field.name)) for field in fields(value)}
        return replace(value, **changed)
    return value


@HOOKS.register_module()
class ComputeDtypeHook(Hook):
    """Trains, validates and tests a downstream model in the dtype that its device suggests.

    Added by ``tools/train.py`` and ``tools/test.py`` where a config sets ``compute_dtype``, as
    those of this package do.

    Args:
        dtype: see :func:`choose_dtype`.
    """

    # Before hooks that lead around a part, such as that of the feature cache.
    priority = "VERY_HIGH"

    def __init__(self, dtype: str = AUTO) -> None:
        self.dtype = dtype

    def before_run(self, runner) -> None:
        """Choose, say so, and change the parts."""
        model = runner.model
        while isinstance(getattr(model, "module", None), nn.Module):  # DDP, augmented tests
            model = model.module
        device = next(model.parameters()).device
        dtype = choose_dtype(self.dtype, device)
        line = f"compute dtype: {describe_choice(self.dtype, dtype, device)}"
        if dtype == "bf16":
            parts = autocast_parts(model, DTYPES[dtype])
            line += (
                f"; autocast of {', '.join(parts)}; weights, losses and what is not named stay "
                f"fp32. Off: --cfg-options {SWITCH}=fp32"
            )
        runner.logger.info(line)


def asked_dtype(cfg: Config) -> str | None:
    """The ``compute_dtype`` of a downstream config, None where it has none.

    Raises:
        ConfigError: An unknown dtype.
    """
    asked = cfg.get(SWITCH)
    try:
        if asked is not None:
            choose_dtype(asked, "cpu")
    except ValueError as error:
        raise ConfigError(f"{SWITCH}: {error}") from error
    return asked


def use_compute_dtype(cfg: Config) -> list[str]:
    """Add the hook that a downstream config asks for by its ``compute_dtype``.

    Args:
        cfg: config of a host, changed in place; without the key, and with MMEngine's
            ``AmpOptimWrapper``, it stays as it is.

    Returns:
        Lines for the log.

    Raises:
        ConfigError: An unknown dtype.
    """
    asked = asked_dtype(cfg)
    if asked is None:
        return []
    wrapper = (cfg.get("optim_wrapper") or {}).get("type")
    if wrapper == "AmpOptimWrapper":
        return [f"{SWITCH}={asked!r} is not used: optim_wrapper is an AmpOptimWrapper of its own"]
    hooks = [hook for hook in cfg.get("custom_hooks") or [] if hook["type"] != "ComputeDtypeHook"]
    cfg.custom_hooks = [*hooks, dict(type="ComputeDtypeHook", dtype=asked)]
    return []
