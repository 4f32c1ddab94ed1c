"""A training checkpoint, as one file or as a folder that all ranks write."""

import os
import shutil
import warnings
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from pathlib import Path

import torch
from mmengine.dist import is_main_process
from torch import Tensor, nn
from torch import distributed as dist
from torch.distributed import checkpoint as dcp
from torch.distributed.checkpoint import metadata
from torch.optim import Optimizer

from dinov3_mm.checkpoints.containers import SafeReader, read_index
from dinov3_mm.checkpoints.io import PARTIAL_SUFFIX, atomic_write, flush_to_disk
from dinov3_mm.checkpoints.load import shard_state

from .launch import failing_together

# --- As a file: tensors and plain values only, so that reading it runs no code ---
#
# ::
#
#     {'format_version': 1,
#      'meta': {'iter', 'seed', 'cfg', 'versions', ...},
#      'state_dict': {'student.backbone...': tensor, 'teacher...': tensor, ...},
#      'optimizer': the optimizer wrapper's state, with the names of its parameters,
#      ...}                    whatever hooks add in before_save_checkpoint


FORMAT_VERSION = 1

# Within a folder of shards: what is no tensor.
STATE_FILE = "state.pth"

# Children of the algorithm that a later stage of the recipe adds (Gram anchoring).
STAGE_MODULES = ("gram_teacher",)

_PLAIN = (str, int, float, bool, type(None), Tensor)
_SHOWN_KEYS = 8


def write_training_state(path: str | Path, state: dict) -> None:
    """Write ``state`` aside and rename it when complete.

    Raises:
        TypeError: If something in it is neither a tensor nor a plain value, with its place.
    """
    _check_plain(state, "checkpoint")
    with atomic_write(path) as partial:
        torch.save({"format_version": FORMAT_VERSION, **state}, partial)


def read_training_state(path: str | Path, *, mmap: bool = False) -> dict:
    """Read a training checkpoint to the CPU without executing anything in it.

    Of a folder of shards: what is no tensor.

    Args:
        path: The file.
        mmap: Map the tensors instead of reading them.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If the file is damaged, holds objects that would have to be unpickled, or is not
            a training checkpoint of this format version.
    """
    path = Path(path)
    if path.is_dir():
        path = path / STATE_FILE
    if not path.is_file():
        raise FileNotFoundError(f"no training checkpoint at {path}")
    try:
        state = torch.load(path, map_location="cpu", weights_only=True, mmap=mmap)
    except OSError:
        raise
    except Exception as error:  # on what is no pickle the restricted unpickler fails in many ways
        reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
        raise ValueError(
            f"{path} is not a readable training checkpoint (it is damaged, or holds Python objects "
            f"that only unpickling could rebuild, which is refused): {reason}"
        ) from None
    if not isinstance(state, dict) or state.get("format_version") != FORMAT_VERSION:
        raise ValueError(
            f"{path} is not a training checkpoint of format {FORMAT_VERSION}. Backbone weights are "
            "loaded with model.backbone.init_cfg=dict(type='DINOv3Pretrained', checkpoint=...)"
        )
    return state


def load_model_state(model: nn.Module, state_dict: Mapping[str, Tensor]) -> tuple[str, ...]:
    """Load every tensor of a checkpoint; only a whole stage module may be absent from it.

    Args:
        model (nn.Module): The algorithm, unwrapped.
        state_dict (Mapping[str, Tensor]): Its tensors by name.

    Returns:
        tuple[str, ...]: Modules that the checkpoint lacks; they keep their values.

    Raises:
        ValueError: With the lists of missing, unexpected and misshapen keys.
    """
    own = model.state_dict()
    stored_modules = {key.split(".")[0] for key in state_dict}
    absent = tuple(
        name for name in STAGE_MODULES if name not in stored_modules and hasattr(model, name)
    )
    expected = {key for key in own if key.split(".")[0] not in absent}
    misshapen = [
        f"{key} (checkpoint {tuple(state_dict[key].shape)}, model {tuple(own[key].shape)})"
        for key in sorted(expected & state_dict.keys())
        if state_dict[key].shape != own[key].shape
    ]
    refuse_mismatch(expected - state_dict.keys(), state_dict.keys() - expected, misshapen)
    model.load_state_dict(shard_state(state_dict, own), strict=False)
    return absent


def refuse_mismatch(missing: set, unexpected: set, misshapen: list[str]) -> None:
    """Raise a ``ValueError`` that names the keys by which a checkpoint does not fit, if any."""
    problems = [
        f"{len(keys)} {kind}: {_some(keys)}"
        for kind, keys in (
            ("missing in the checkpoint", sorted(missing)),
            ("unknown to this config", sorted(unexpected)),
            ("of another shape", misshapen),
        )
        if keys
    ]
    if problems:
        raise ValueError("the checkpoint does not fit the model: " + "; ".join(problems))


def _some(keys: list[str]) -> str:
    rest = len(keys) - _SHOWN_KEYS
    return ", ".join(keys[:_SHOWN_KEYS]) + (f" and {rest} more" if rest > 0 else "")


def _check_plain(value: object, place: str) -> None:
    if isinstance(value, Mapping):
        for key, item in value.items():
            if not isinstance(key, (str, int)):
                raise TypeError(f"{place}: a checkpoint key must be a str or int, got {key!r}")
            _check_plain(item, f"{place}[{key!r}]")
    elif isinstance(value, (list, tuple)):
        for index, item in enumerate(value):
            _check_plain(item, f"{place}[{index}]")
    elif not isinstance(value, _PLAIN):
        raise TypeError(
            f"{place} is a {type(value).__name__}; a checkpoint holds tensors, strings, numbers, "
            "booleans and None only, so that it can be read without unpickling"
        )


# --- As a folder that all ranks write and any number of ranks reads ---
#
# ::
#
#     iter_00001000/
#         state.pth                     what is no tensor: meta data, what hooks add
#         .metadata, __<rank>_<n>.distcp     tensors, by torch.distributed.checkpoint (DCP)
#
# Tensors are ``model.<key>`` and ``optimizer.<parameter>.<moment>``. The folder gets its name when
# it is complete; its index is read without unpickling anything but DCP's own records.


def is_sharded_state(path: str | Path) -> bool:
    """Whether a path is such a folder, complete."""
    return (Path(path) / ".metadata").is_file() and (Path(path) / STATE_FILE).is_file()


def save_sharded_state(
    folder: str | Path,
    model: nn.Module,
    optimizer: Optimizer | None,
    state: dict,
    *,
    own: tuple[str, dict] | None = None,
    background_group: dist.ProcessGroup | None = None,
) -> Future | None:
    """Write a checkpoint from all ranks; all must call this.

    Args:
        folder: target; it must not exist.
        model: the algorithm, unwrapped.
        optimizer: its optimizer, with ``param_names`` in the groups; None leaves its moments out.
        state: what is no tensor.
        own: name and content of a file that this rank adds.
        background_group: ranks that write in the background, see :func:`new_background_group`:
            copy the tensors and return; :func:`finish` completes the checkpoint. None writes now.

    Returns:
        With ``background_group`` the future of the write; on the first rank of the folder's name.

    Raises:
        FileExistsError: there is a checkpoint of that name.
        RuntimeError: another rank failed.
    """
    folder = Path(folder)
    begin(folder)
    partial = partial_folder(folder)
    with failing_together():
        if is_main_process():
            write_training_state(partial / STATE_FILE, state)
        if own is not None:
            write_training_state(partial / own[0], own[1])
    tensors = _model_tensors(model)
    if optimizer is not None:
        tensors.update(optimizer_tensors(optimizer))
    if background_group is not None:
        write = dcp.async_save(tensors, checkpoint_id=str(partial), process_group=background_group)
        # The first rank's write ends when those of all ranks have: nobody need be asked.
        return _then_named(write, folder) if is_main_process() else write
    dcp.save(tensors, checkpoint_id=str(partial), no_dist=not dist.is_initialized())
    finish(folder)
    return None


def begin(folder: Path) -> None:
    """Make the folder that a checkpoint is written to; all ranks must call this.

    Raises:
        FileExistsError: there is a checkpoint of that name; on the other ranks a ``RuntimeError``.
    """
    with failing_together():
        if is_main_process():
            if folder.exists():
                raise FileExistsError(
                    f"{folder} exists already: another run writes to this work folder, or put it "
                    "there. Give each run its own --work-dir"
                )
            partial = partial_folder(folder)
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir(parents=True)


def _then_named(write: Future, folder: Path) -> Future:
    """The write, and after it the folder's name, given by the thread that wrote."""
    named: Future = Future()

    def name(write: Future) -> None:
        error = write.exception()
        try:
            if error is None:
                _give_name(folder)
        except OSError as caught:
            error = caught
        named.set_result(None) if error is None else named.set_exception(error)

    write.add_done_callback(name)
    return named


def _give_name(folder: Path) -> None:
    os.replace(partial_folder(folder), folder)
    flush_to_disk(folder.parent)


def new_background_group() -> dist.ProcessGroup | None:
    """A group of all ranks for nothing but background writes; all ranks must call this.

    The thread that writes agrees with those of other ranks while training goes on. In the default
    group its messages would mix with those of the training, and NCCL cannot send them at all. To
    give the default group a CPU backend too (``cpu:gloo,cuda:nccl``) is no way out: MMEngine then
    takes it for gloo and moves what it reduces to the CPU.

    Returns:
        None without a process group: one process has nobody to agree with.
    """
    return dist.new_group(backend="gloo") if dist.is_initialized() else None


def finish(folder: str | Path, write: Future | None = None) -> None:
    """Give the folder its name, or wait until a background write has; all ranks must call this."""
    with failing_together():
        if write is not None:
            write.result()
        elif is_main_process():
            _give_name(Path(folder))


def partial_folder(folder: Path) -> Path:
    """Where a checkpoint is written before it is complete."""
    return folder.with_name(f".{folder.name}{PARTIAL_SUFFIX}")


def load_sharded_state(
    folder: str | Path,
    model: nn.Module,
    optimizer: Optimizer | None,
    callback: Callable[[dict], None] | None = None,
) -> tuple[dict, tuple[str, ...]]:
    """Read a checkpoint into a model, sharded or whole, and into its optimizer if one is given.

    Args:
        folder: see the module.
        model: the algorithm, unwrapped.
        optimizer: its optimizer, or None to take the weights only.
        callback: called with the checkpoint's plain values.

    Returns:
        The plain values, and the stage modules that the checkpoint lacks.

    Raises:
        FileNotFoundError: If there is no complete checkpoint.
        ValueError: If it is damaged or not of this model.
    """
    folder = Path(folder)
    if not is_sharded_state(folder):
        raise FileNotFoundError(f"no complete training checkpoint in the folder {folder}")
    state = read_training_state(folder)
    stored = read_index(folder).state_dict_metadata
    absent = _check_model(model, stored)
    tensors = {
        name: tensor
        for name, tensor in _model_tensors(model).items()
        if name.split(".")[1] not in absent
    }
    if optimizer is not None:
        tensors.update(allocate_moments(optimizer, stored))
    if callback is not None:
        callback(state)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is")
        dcp.load(tensors, storage_reader=SafeReader(folder), no_dist=not dist.is_initialized())
    # In place for parameters; modules that mirror a buffer learn of it here.
    model.load_state_dict(model.state_dict())
    return state, absent


def _model_tensors(model: nn.Module) -> dict[str, Tensor]:
    return {f"model.{name}": tensor for name, tensor in model.state_dict().items()}


def _named_params(optimizer: Optimizer) -> dict[str, Tensor]:
    return {
        name: param
        for group in optimizer.param_groups
        for name, param in zip(group["param_names"], group["params"], strict=True)
    }


def optimizer_tensors(optimizer: Optimizer) -> dict[str, Tensor]:
    """The state of an optimizer by the names that it has in a checkpoint."""
    return {
        f"optimizer.{name}.{key}": value
        for name, param in _named_params(optimizer).items()
        for key, value in optimizer.state.get(param, {}).items()
    }


def allocate_moments(optimizer: Optimizer, stored: Mapping) -> dict[str, Tensor]:
    """Optimizer state for every stored moment, in the shards of its parameter."""
    moments: dict[str, list[str]] = {}
    for name in stored:
        if name.startswith("optimizer."):
            param, _, key = name.removeprefix("optimizer.").rpartition(".")
            moments.setdefault(param, []).append(key)
    params = _named_params(optimizer)
    # A sub-module that is still frozen has no moments yet.
    begun = {param.split(".")[0] for param in moments}
    missing = {name for name in params.keys() - moments.keys() if name.split(".")[0] in begun}
    if missing or moments.keys() - params.keys():
        refuse_mismatch(missing, moments.keys() - params.keys(), [])
    # As torch's own loading does: kernels that step on the device read counts there, others do not.
    on_device = {
        name
        for group in optimizer.param_groups
        for name in group["param_names"]
        if group.get("fused") or group.get("capturable")
    }
    for name, keys in moments.items():
        param = params[name]
        counts_on = param.device if name in on_device else torch.device("cpu")
        for key in keys:
            entry = stored[f"optimizer.{name}.{key}"]
            same_shape = tuple(entry.size) == tuple(param.shape)
            optimizer.state[param][key] = (
                torch.zeros_like(param, requires_grad=False)
                if same_shape
                else torch.zeros(entry.size, dtype=entry.properties.dtype, device=counts_on)
            )
    return optimizer_tensors(optimizer)


def _check_model(model: nn.Module, stored: Mapping) -> tuple[str, ...]:
    """Refuse a checkpoint of another model; return the stage modules that it lacks."""
    own = _model_tensors(model)
    shapes = {
        name: tuple(entry.size)
        for name, entry in stored.items()
        if name.startswith("model.") and isinstance(entry, metadata.TensorStorageMetadata)
    }
    modules = {name.split(".")[1] for name in shapes}
    absent = tuple(m for m in STAGE_MODULES if m not in modules and hasattr(model, m))
    expected = {name for name in own if name.split(".")[1] not in absent}
    misshapen = [
        f"{name} (checkpoint {shapes[name]}, model {tuple(own[name].shape)})"
        for name in sorted(expected & shapes.keys())
        if shapes[name] != tuple(own[name].shape)
    ]
    refuse_mismatch(expected - shapes.keys(), shapes.keys() - expected, misshapen)
    return absent
