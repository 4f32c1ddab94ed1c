"""Our own weight files: safetensors that say what is in them."""

import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from mmengine.dist import barrier, is_main_process
from safetensors.torch import save_file
from torch import Tensor, nn
from torch import distributed as dist
from torch.distributed import checkpoint as dcp
from torch.distributed.checkpoint import HuggingFaceStorageWriter
from torch.distributed.checkpoint._consolidate_hf_safetensors import (
    consolidate_safetensors_files_on_every_rank,
)
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from .containers import EXPORT_KEY, FORMAT_VERSION, INDEX_FILE, read_export_header
from .io import PARTIAL_SUFFIX, atomic_write, flush_to_disk
from .load import HEADS, gather_whole

# --- Low-rank adapters (LoRA, arXiv 2106.09685) folded into the weights that they adapt ---
#
# An adapted layer is known by its parts, the names that mmpretrain's ``LoRALinear`` gives them, so
# that nothing of mmpretrain is imported: ``original_layer``, ``lora_down``, ``lora_up``,
# ``scaling``.


_PARTS = ("original_layer", "lora_down", "lora_up", "scaling")


def unwrap_lora(module: nn.Module) -> nn.Module:
    """The adapted model inside mmpretrain's ``LoRAModel``; any other module as it is."""
    inner = getattr(module, "module", None)
    return inner if isinstance(inner, nn.Module) and _adapted_layers(inner) else module


def merged_state_dict(module: nn.Module) -> dict[str, Tensor]:
    """State of a module with its adapters folded in, under the names of the plain module.

    The weight of an adapted layer becomes ``W + scaling * up @ down``, computed in at least fp32
    and returned in the dtype of ``W``. Biases, masks and all other layers stay what they are. The
    module is not changed.

    Args:
        module: a module, with or without adapters, in or outside a ``LoRAModel``.
    """
    module = unwrap_lora(module)
    state = module.state_dict()
    for name, layer in _adapted_layers(module).items():
        prefix = f"{name}." if name else ""
        for key in [key for key in state if key.startswith(prefix)]:
            tensor = state.pop(key)
            part, _, own_name = key.removeprefix(prefix).partition(".")
            if part == "original_layer":
                state[prefix + own_name] = tensor
        state[f"{prefix}weight"] = _merged_weight(layer)
    return state


def _adapted_layers(module: nn.Module) -> dict[str, nn.Module]:
    return {
        name: layer
        for name, layer in module.named_modules()
        if all(hasattr(layer, part) for part in _PARTS)
    }


@torch.no_grad()
def _merged_weight(layer: nn.Module) -> Tensor:
    weight = layer.original_layer.weight
    dtype = torch.promote_types(weight.dtype, torch.float32)
    update = layer.lora_up.weight.to(dtype) @ layer.lora_down.weight.to(dtype)
    return (weight.to(dtype) + layer.scaling * update).to(weight.dtype)


# --- Several files with an index, for networks too large for one ---
#
# ::
#
#     NAME/model-00001-of-00003.safetensors ...    the tensors
#     NAME/model.safetensors.index.json            which file holds which, and our metadata
#
# A sharded network is never gathered: every rank writes its shards through DCP's Hugging Face
# writer, then the ranks put the files together, tensor by tensor, each another file.


# What DCP's writer cannot merge: scalars and integers, which are small and whole on every rank.
_OTHERS = "model-others.safetensors"


def total_bytes(state: Mapping[str, Tensor]) -> int:
    """Bytes of all tensors, whole."""
    return sum(tensor.numel() * tensor.element_size() for tensor in state.values())


def split_by_size(state: Mapping[str, Tensor], max_file_size: int) -> dict[str, int]:
    """Number of the file, from 1, for every tensor: in order, none larger than asked for.

    A tensor that is larger has a file of its own.
    """
    files: dict[str, int] = {}
    number, filled = 1, 0
    for name, tensor in state.items():
        size = tensor.numel() * tensor.element_size()
        if filled and filled + size > max_file_size:
            number, filled = number + 1, 0
        files[name] = number
        filled += size
    return files


def write_folder(
    folder: Path, state: Mapping[str, Tensor], header: Mapping[str, Any], max_file_size: int
) -> Path:
    """Write the tensors of a network and its metadata; the folder appears when it is complete.

    Args:
        folder: target; what is there is replaced.
        state: the tensors. If some are distributed, all ranks must call this, else the first rank
            writes.
        header: JSON for the index.
        max_file_size: bytes of tensors in a file.

    Returns:
        The folder.
    """
    partial = folder.with_name(f".{folder.name}{PARTIAL_SUFFIX}")
    if is_main_process():
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
    if any(isinstance(tensor, DTensor) for tensor in state.values()):
        barrier()
        weight_map = _write_shards(partial, state, max_file_size)
    elif is_main_process():
        weight_map = _write_whole(partial, state, max_file_size)
    if is_main_process():
        entry = {"total_size": total_bytes(state), "format": "pt", EXPORT_KEY: json.dumps(header)}
        content = {"metadata": entry, "weight_map": weight_map}
        text = json.dumps(content, indent=2) + "\n"
        (partial / INDEX_FILE).write_text(text, encoding="utf-8")
        _put_in_place(partial, folder)
    return folder


def _write_whole(partial: Path, state: Mapping[str, Tensor], max_file_size: int) -> dict[str, str]:
    files = _names(split_by_size(state, max_file_size))
    for file in dict.fromkeys(files.values()):
        # Copies: safetensors refuses tensors that share or leave gaps in their storage.
        own = {
            n: t.detach().cpu().clone().contiguous() for n, t in state.items() if files[n] == file
        }
        save_file(own, partial / file, metadata={"format": "pt"})
    return files


def _write_shards(partial: Path, state: Mapping[str, Tensor], max_file_size: int) -> dict[str, str]:
    mergeable = {n: t for n, t in state.items() if t.dim() and t.is_floating_point()}
    others = {n: t.detach().cpu().clone() for n, t in state.items() if n not in mergeable}
    numbers = split_by_size(mergeable, max_file_size)
    shards = partial / "shards"
    writer = HuggingFaceStorageWriter(
        str(shards), fqn_to_index_mapping=numbers, save_distributed=True
    )
    own = _without_shared_storage(mergeable)
    dcp.save(own, storage_writer=writer, process_group=dist.group.WORLD)
    barrier()
    consolidate_safetensors_files_on_every_rank(
        str(shards), str(partial), numbers, process_group=dist.group.WORLD
    )
    barrier()
    if is_main_process():
        shutil.rmtree(shards)
        if others:
            save_file(others, partial / _OTHERS, metadata={"format": "pt"})
    return {**_names(numbers), **dict.fromkeys(others, _OTHERS)}


def _without_shared_storage(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Copies of what has a storage that came before: a module may hold a tensor under two names."""
    seen, own = set(), {}
    for name, tensor in state.items():
        local = tensor.to_local() if isinstance(tensor, DTensor) else tensor
        place = local.untyped_storage().data_ptr()
        own[name] = tensor.detach().clone() if place in seen else tensor.detach()
        seen.add(place)
    return own


def _names(numbers: Mapping[str, int]) -> dict[str, str]:
    """Names of the files, as DCP gives them."""
    count = max(numbers.values())
    return {n: f"model-{i:05d}-of-{count:05d}.safetensors" for n, i in numbers.items()}


def _put_in_place(partial: Path, folder: Path) -> None:
    """Give a complete folder its name; an older one of that name goes."""
    for entry in (*partial.iterdir(), partial):
        flush_to_disk(entry)
    old = folder.with_name(f".{folder.name}.old{PARTIAL_SUFFIX}")
    shutil.rmtree(old, ignore_errors=True)
    if folder.exists():
        os.rename(folder, old)
    os.rename(partial, folder)
    shutil.rmtree(old, ignore_errors=True)
    flush_to_disk(folder.parent)


# --- One file ---


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
    folder. See :mod:`~dinov3_mm.checkpoints.export`.

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
