"""Our own weights in several safetensors files with an index, for networks too large for one file.

::

    NAME/model-00001-of-00003.safetensors ...    the tensors
    NAME/model.safetensors.index.json            which file holds which, and our metadata

A sharded network is never gathered: every rank writes its shards through DCP's Hugging Face writer,
then the ranks put the files together, tensor by tensor, each another file.
"""

import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from mmengine.dist import barrier, is_main_process
from safetensors.torch import save_file
from torch import Tensor
from torch.distributed.checkpoint import HuggingFaceStorageWriter
from torch.distributed.checkpoint._consolidate_hf_safetensors import (
    consolidate_safetensors_files_on_every_rank,
)
from torch.distributed.tensor import DTensor

from .io import PARTIAL_SUFFIX, flush_to_disk
from .safetensors_file import EXPORT_KEY, INDEX_FILE

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
