"""Our own weight files: safetensors that say what is in them."""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mmengine.dist import is_main_process
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule

from .export_folder import total_bytes, write_folder
from .io import atomic_write
from .lora import merged_state_dict, unwrap_lora
from .safetensors_file import EXPORT_KEY, FORMAT_VERSION, read_export_header
from .selecting import HEADS
from .sharding import gather_whole

_STATED_BY_CALLER = ("statistics", "provenance")

# Bytes of tensors in one file of an export.
MAX_FILE_SIZE = 10 * 1000**3


def export_backbone(
    backbone: nn.Module,
    path: str | os.PathLike,
    metadata: Mapping[str, Any] | None = None,
    *,
    heads: Mapping[str, nn.Module] | None = None,
    max_file_size: int = MAX_FILE_SIZE,
) -> Path:
    """Write a backbone to a ``.safetensors`` file that :func:`build_backbone` can rebuild from.

    The header holds JSON with ``format_version``, ``backbone`` (class name), ``arch``,
    ``patch_size``, ``num_registers``, ``statistics`` and ``provenance``; a copy for people lies
    beside the file with the suffix ``.json``. Tensors keep their dtype. Both files appear complete
    or not at all.

    Larger networks become a folder of the same name without suffix, with several files and
    ``model.safetensors.index.json``, which also holds that JSON: :func:`build_backbone` takes the
    folder. See :mod:`~dinov3_mm.checkpoints.export_folder`.

    Args:
        backbone: backbone of this project. If it is sharded, all ranks must call this. For one file
            they gather one tensor at a time and the first rank writes; the files of a folder are
            written from the shards, and nothing is gathered. The adapters of a backbone inside
            mmpretrain's ``LoRAModel`` are folded into the weights of the file.
        path: target, ending in ``.safetensors``.
        metadata: ``statistics`` (``mean`` and ``std`` of images in [0, 1]) and ``provenance`` (any
            JSON, e.g. the iteration and the data); both may be left out.
        heads: projection heads to store beside the backbone, by name: ``dino_head``, ``ibot_head``.
        max_file_size: bytes of tensors in one file; a network with more becomes a folder.

    Returns:
        The file, or the folder.

    Raises:
        ValueError: If the suffix, a key of ``metadata``, the statistics, a head's name or the size
            are wrong.
    """
    path = Path(path)
    if path.suffix != ".safetensors":
        raise ValueError(f"exports are safetensors; name the file *.safetensors instead of {path}")
    if not isinstance(max_file_size, int) or max_file_size < 1:
        raise ValueError(f"max_file_size is a number of bytes >= 1, got {max_file_size!r}")
    unknown_heads = sorted(set(heads or {}) - set(HEADS))
    if unknown_heads:
        raise ValueError(f"unknown heads {unknown_heads}; expected {' and '.join(HEADS)}")
    header = _header(unwrap_lora(backbone), metadata or {})
    prefix = "backbone." if heads else ""
    # A network of another library is stored under that library's names.
    stored = getattr(backbone, "foreign_module", backbone)
    parts = {prefix: stored, **{f"{name}.": head for name, head in (heads or {}).items()}}
    state = {
        start + name: tensor
        for start, module in parts.items()
        for name, tensor in merged_state_dict(module).items()
    }
    described = path.with_suffix(".json")
    if total_bytes(state) > max_file_size:
        path = write_folder(path.with_suffix(""), state, header, max_file_size)
    else:
        _write_file(path, state, header)
    if is_main_process():
        with atomic_write(described) as partial:
            partial.write_text(json.dumps(header, indent=2) + "\n", encoding="utf-8")
    return path


def _write_file(path: Path, state: Mapping[str, Tensor], header: Mapping[str, Any]) -> None:
    tensors = {}
    for name, tensor in state.items():
        whole = gather_whole(tensor)
        if is_main_process():
            tensors[name] = _storable(whole)
    if is_main_process():
        with atomic_write(path) as partial:
            save_file(tensors, partial, metadata={"format": "pt", EXPORT_KEY: json.dumps(header)})


def read_metadata(path: str | os.PathLike) -> dict[str, Any]:
    """Header JSON of a file or folder that :func:`export_backbone` wrote; no tensor is read.

    Raises:
        FileNotFoundError: If nothing is there.
        ValueError: If it is another file.
    """
    path = Path(path).expanduser()
    if not path.exists():
        raise FileNotFoundError(f"no exported backbone at {path}")
    header = read_export_header(path)
    if not header:
        raise ValueError(f"{path} is no export of dinov3_mm: its header holds no {EXPORT_KEY!r}")
    return header


def _header(backbone: nn.Module, metadata: Mapping[str, Any]) -> dict[str, Any]:
    unknown = sorted(set(metadata) - set(_STATED_BY_CALLER))
    if unknown:
        raise ValueError(f"unknown metadata {unknown}; expected {' and '.join(_STATED_BY_CALLER)}")
    statistics = metadata.get("statistics")
    channels = backbone.arch_settings["in_channels"]
    if statistics is not None:
        statistics = {key: [float(value) for value in statistics[key]] for key in ("mean", "std")}
        if any(len(values) != channels for values in statistics.values()):
            raise ValueError(f"statistics {statistics} do not fit {channels} image channels")
    return {
        "format_version": FORMAT_VERSION,
        "backbone": _class_name(backbone),
        "arch": backbone.arch_settings,
        "patch_size": backbone.patch_size,
        "num_registers": backbone.num_registers,
        "statistics": statistics,
        "provenance": metadata.get("provenance", {}),
    }


def _class_name(module: nn.Module) -> str:
    """Name of a module's class, without the one that ``fully_shard`` puts before it."""
    return next(cls for cls in type(module).mro() if not issubclass(cls, FSDPModule)).__name__


def _storable(tensor: Tensor) -> Tensor:
    # A copy: safetensors refuses tensors that share or leave gaps in their storage.
    return tensor.clone().contiguous()
