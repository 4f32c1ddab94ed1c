"""Which checkpoint ``--resume`` means, and what cannot go on from it.

What lies in the work folder counts, wherever the folder was when the run began, and no file is
unpickled. What makes no sense is refused before anything is built, with what to do.
"""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mmengine.config import Config
from mmengine.dist import broadcast_object_list, get_rank

from dinov3_mm.checkpoints.distributed_folder import read_index
from dinov3_mm.checkpoints.run_checkpoint import read_run_checkpoint
from dinov3_mm.engine.config import ConfigError
from dinov3_mm.engine.host_config import is_host_config
from dinov3_mm.engine.runner.branches import resume_point
from dinov3_mm.engine.runner.files import find_latest_checkpoint, list_checkpoints
from dinov3_mm.engine.runner.sharded_state import is_sharded_state
from dinov3_mm.engine.runner.training_state import read_training_state
from dinov3_mm.engine.students.strategy import STUDENTS

from .comparison import compared, plain, stored_config

_HOST_FILE = re.compile(r"(?:epoch|iter)_(\d+)\.pth")


def choose_checkpoint(
    cfg: Config, given: str | Path | None = None, *, is_stage: bool = False
) -> Path | None:
    """The checkpoint that ``--resume`` means: the one given, or the newest of the work folder.

    What lies in the work folder counts, wherever the folder was when the run began. A pretraining
    run that went back goes on with its newest branch, see
    :func:`~dinov3_mm.engine.runner.branches.resume_point`.

    Args:
        cfg: a config with its ``work_dir``.
        given: path of a checkpoint.
        is_stage: a later stage, which without a checkpoint of its own starts from the one before.

    Returns:
        None where the work folder holds no checkpoint yet.

    Raises:
        ConfigError: the checkpoint cannot be read or is none; a damaged newest one is named, and
            the one before it offered.
    """
    given = None if given is None else Path(given).expanduser()
    # One answer for all processes.
    answer: list = [None, None]
    if get_rank() == 0:
        try:
            answer[0] = _chosen(cfg, given, is_stage)
        except ConfigError as error:
            answer[1] = str(error)
    broadcast_object_list(answer)
    path, error = answer
    if error is not None:
        raise ConfigError(error)
    return path


def _chosen(cfg: Config, given: Path | None, is_stage: bool) -> Path | None:
    if is_host_config(cfg):
        return _newest(cfg) if given is None else _check_given(cfg, given)
    point = resume_point(cfg.work_dir, given, may_lie_elsewhere=not is_stage)
    if point is None or (given is None and point == find_latest_checkpoint(cfg.work_dir)):
        return _newest(cfg)
    return _check_given(cfg, point)


def set_resume(
    cfg: Config, checkpoint: str | Path | None = None, *, is_stage: bool = False
) -> None:
    """Go on from a checkpoint, by default from the newest of the work folder if it has one.

    Raises:
        ConfigError: as :func:`choose_checkpoint`.
    """
    path = choose_checkpoint(cfg, checkpoint, is_stage=is_stage)
    if path is None:
        if cfg.get("resume"):
            cfg.resume = False
    elif is_host_config(cfg):
        cfg.resume, cfg.load_from = True, str(path)
    else:
        cfg.resume, cfg.load_from = str(path), None


def checkpoint_of(cfg: Mapping) -> Path | None:
    """The checkpoint that a config resumes, after :func:`set_resume`."""
    resumed = cfg.get("resume")
    path = cfg.get("load_from") if resumed is True else resumed
    return Path(path) if resumed and path else None


def saved_checkpoints(cfg: Mapping) -> tuple[list[Path], list[Path]]:
    """Complete checkpoints in the work folder of a config, oldest first, and files passed over.

    MMEngine writes the name of what it saved last to ``last_checkpoint``. Of that only the name
    counts, since the folder may be a copy; files of later iterations were left half-written by a
    killed run, or by one that went back to an earlier checkpoint.
    """
    work_dir = Path(cfg["work_dir"])
    if not is_host_config(cfg):
        files, newest = list(list_checkpoints(work_dir).values()), find_latest_checkpoint(work_dir)
        count = files.index(newest) + 1 if newest in files else 0
        return files[:count], files[count:]
    hook = (cfg.get("default_hooks") or {}).get("checkpoint") or {}
    folder = Path(hook["out_dir"]) / work_dir.name if hook.get("out_dir") else work_dir
    found = [(m, path) for path in folder.glob("*.pth") if (m := _HOST_FILE.fullmatch(path.name))]
    files = [path for _, path in sorted(found, key=lambda item: int(item[0][1]))]
    pointer = work_dir / "last_checkpoint"
    last = folder / Path(pointer.read_text().strip()).name if pointer.is_file() else None
    if last not in files:
        return files, []
    count = files.index(last) + 1
    return files[:count], files[count:]


def _newest(cfg: Config) -> Path | None:
    files, _ = saved_checkpoints(cfg)
    if not files:
        return None
    reason = _damage(cfg, files[-1])
    if reason is None:
        return files[-1]
    before = next((path for path in reversed(files[:-1]) if _damage(cfg, path) is None), None)
    advice = (
        f"go on from the one before it with --resume {before}"
        if before is not None
        else "no earlier one can be read either: without them, --resume starts from the beginning"
    )
    raise ConfigError(
        f"--resume: the newest checkpoint, {files[-1]}, cannot be read; {advice}\n  {reason}"
    )


def _damage(cfg: Mapping, path: Path) -> str | None:
    """Why a checkpoint cannot be read, None if it can; its tensors stay on disk."""
    try:
        _read(cfg, path)
    except ValueError as error:
        return str(error)
    except OSError as error:  # a file that ends too early cannot be mapped
        return f"{path} is damaged or cut off ({error})"
    return None


def _read(cfg: Mapping, path: Path) -> dict:
    """What is no tensor in a checkpoint; the content of its files is not unpickled."""
    read = read_run_checkpoint if is_host_config(cfg) else read_training_state
    state = read(path, mmap=True)
    if "iter" not in state.get("meta", {}):
        raise ValueError(
            f"{path} is no training checkpoint: it does not say at which iteration it was written"
        )
    if path.is_dir() and not is_host_config(cfg):
        _check_folder(path)
    return state


def _check_folder(path: Path) -> None:
    """Raise a ``ValueError`` for a folder whose tensors are not all there.

    They are one file for each of several students, or shards with an index.
    """
    students = list((path / STUDENTS).glob("*.pth"))
    if students:
        for student in students:
            read_training_state(student, mmap=True)
        return
    if not is_sharded_state(path):
        raise ValueError(f"{path} has no index: it is no complete training checkpoint")
    for info in (read_index(path).storage_data or {}).values():
        shard = path / info.relative_path
        if not shard.is_file() or shard.stat().st_size < info.offset + info.length:
            raise ValueError(f"{shard} is missing or cut off")


def _check_given(cfg: Config, path: Path) -> Path:
    if not path.exists():
        raise ConfigError(f"--resume: {path} does not exist")
    if path.suffix == ".safetensors" or (path.is_dir() and any(path.glob("*.safetensors"))):
        raise ConfigError(
            f"--resume: {path} is an export: weights of a backbone, without optimizer and "
            f"iteration. Start from it with --weights {path} (where the config has no init_cfg: "
            "model.backbone.init_cfg=dict(type='DINOv3Pretrained', checkpoint=...)); --resume goes "
            "on from a training checkpoint"
        )
    inside = {**cfg, "work_dir": str(path), "default_hooks": {}}
    if path.is_dir() and not is_sharded_state(path) and saved_checkpoints(inside)[0]:
        raise ConfigError(
            f"--resume: {path} is a work folder; go on in it with --work-dir {path} --resume, or "
            f"give one of its checkpoints, such as {saved_checkpoints(inside)[0][-1]}"
        )
    reason = _damage(cfg, path)
    if reason is not None:
        raise ConfigError(f"--resume: {reason}")
    return path


def read_resumed(cfg: Config) -> dict | None:
    """Settle which checkpoint a config resumes, and read its meta data.

    Returns:
        None where the config does not resume.

    Raises:
        ConfigError: as :func:`choose_checkpoint`.
    """
    if cfg.get("resume") is True:
        # MMEngine would follow the path in ``last_checkpoint``, which may be of another folder.
        set_resume(cfg, cfg.get("load_from"))
    path = checkpoint_of(cfg)
    return None if path is None else _read(cfg, path)["meta"]


def refuse_resumed(cfg: Config, meta: Mapping[str, Any]) -> None:
    """Refuse to resume what cannot go on with a config.

    Args:
        cfg: a completed config.
        meta: of the checkpoint.

    Raises:
        ConfigError: another seed, optimizer or way of counting, or fewer iterations than are done.
    """
    path = checkpoint_of(cfg)
    seed, stored_seed = (cfg.get("randomness") or {}).get("seed"), meta.get("seed")
    if seed is not None and stored_seed is not None and seed != stored_seed:
        raise ConfigError(
            f"--resume: {path} was trained with seed {stored_seed}, this run has seed {seed}: "
            f"resume with --seed {stored_seed}, or start a new run from its weights with load_from"
        )
    anew = f"start a new run from its weights with --cfg-options load_from={path} and no --resume"
    old, new = stored_config(meta) or {}, plain(compared(cfg))
    if old and _optimizer_type(old) != _optimizer_type(new):
        raise ConfigError(
            f"--resume: {path} holds the moments of {_optimizer_type(old)}, this config trains with"
            f" {_optimizer_type(new)}: keep the optimizer, or {anew}"
        )
    if old and _counts_epochs(old) != _counts_epochs(new):
        units = {True: "epochs", False: "iterations"}
        raise ConfigError(
            f"--resume: {path} counts {units[_counts_epochs(old)]}, this config counts "
            f"{units[_counts_epochs(new)]}: keep train_cfg, or {anew}"
        )
    done, total, key = progress(cfg, meta)
    if done > total:
        raise ConfigError(
            f"--resume: {path} has done {done} {unit_of(key)}, and {key} is {total}: raise it, "
            f"give an earlier checkpoint with --resume PATH, or {anew}"
        )


def progress(cfg: Mapping, meta: Mapping[str, Any]) -> tuple[int, int, str]:
    """What is done, what there is to do, and the key of the config that says it."""
    key = "max_epochs" if _counts_epochs(cfg) else "max_iters"
    done = meta["epoch" if key == "max_epochs" else "iter"]
    return done, cfg["train_cfg"][key], f"train_cfg.{key}"


def unit_of(key: str) -> str:
    """What a length in the config counts."""
    return "epochs" if key.endswith("epochs") else "iterations"


def _counts_epochs(cfg: Mapping) -> bool:
    return "max_epochs" in cfg["train_cfg"]


def _optimizer_type(config: Mapping) -> Any:
    return ((config.get("optim_wrapper") or {}).get("optimizer") or {}).get("type")
