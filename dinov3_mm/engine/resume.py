"""``--resume``: which checkpoint a run goes on from, and what is different from then on."""

import hashlib
import json
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from mmengine.config import Config
from mmengine.dist import broadcast_object_list, get_rank, get_world_size

from dinov3_mm.checkpoints.containers import read_index
from dinov3_mm.checkpoints.run_checkpoint import read_run_checkpoint
from dinov3_mm.engine.config.check import is_host_config
from dinov3_mm.engine.optim.schedules import SCHEDULES, build_schedule, scale_lr_schedule
from dinov3_mm.engine.strategies.students import STUDENTS
from dinov3_mm.errors import ConfigError

from .run_files import find_latest_checkpoint, list_checkpoints, resume_point
from .training_state import is_sharded_state, read_training_state

# --- What is different in a resumed run, and what that means ---
#
# One rule, for pretraining and for downstream jobs: **the checkpoint gives the weights, the
# moments of the optimizer and the iteration; the config gives everything else**: rates, loss
# weights, lengths, data. Schedules are functions of the config and the iteration, so a resumed run
# whose config and data are the same does what it would have done. Where they are not, every
# difference is named, and so is what ends that exactness; what makes no sense is refused.
#
# To be compared, config and data must be in the checkpoint: :func:`record_run` says what is kept
# under ``meta['run']``, as text and numbers.


# Entry of a checkpoint's meta data: with what the run trained.
RUN = "run"

# Parts of a config on which the weights may depend; helper variables are not among them.
_COMPARED = (
    "auto_scale_lr",
    "custom_hooks",
    "model",
    "optim_wrapper",
    "param_scheduler",
    "strategy",
    "sync_bn",
    "train_cfg",
    "train_dataloader",
)
# Where weights come from when a run begins; a resumed run has them in its checkpoint.
_STARTING_POINT = ("checkpoint", "init_cfg", "load_optimizer", "start_from")
_WITHOUT_EFFECT = (
    "num_workers",
    "persistent_workers",
    "pin_memory",
    "prefetch_factor",
    "val_begin",
    "val_interval",
)
# Hooks that only watch, told by a word in their names: a change of their settings is no other run.
_WATCHING = re.compile(
    r"custom_hooks\.(PerStudentHook\()?"
    r"\w*(Check|Diagnosis|Eval|Export|Guard|Probe|Summary|Visualization)\w*Hook"
)
_ROUNDING = re.compile(r"strategy\b|.*\b(with_cp|compile_blocks|fused|foreach)$")
_ABSENT = object()
# Iterations at which two schedules are compared.
_SAMPLES = 64


def record_run(cfg: Config, samples: Mapping[str, Any]) -> dict[str, Any]:
    """What a checkpoint keeps of its run, in plain values.

    Args:
        cfg: the completed config.
        samples: of :func:`identify_samples`.
    """
    return {
        "config": json.dumps(plain(compared(cfg))),
        "world_size": get_world_size(),
        "torch": str(torch.__version__),
        **samples,
    }


def identify_samples(dataset: Any) -> dict[str, Any]:
    """Number of samples, and a hash of their names and labels in order.

    Files are not opened: an image that was overwritten keeps its name. Names are relative to the
    root of the data set, which may move. The hash is None where samples have no names.
    """
    digest = hashlib.blake2b(digest_size=16)
    known = _feed(digest, dataset)
    return {"num_samples": len(dataset), "samples": digest.hexdigest() if known else None}


def _feed(digest: Any, part: Any) -> bool:
    """Feed the names of a data set or of those inside it; whether it has any."""
    for name in ("source", "dataset"):
        if hasattr(part, name):
            return _feed(digest, getattr(part, name))
    for name in ("parts", "datasets"):
        if hasattr(part, name):
            named = [_feed(digest, inner) for inner in getattr(part, name)]
            return all(named)
    if hasattr(part, "feed_names"):
        part.feed_names(digest)
    elif hasattr(part, "get_data_info"):
        root = str(getattr(part, "data_root", None) or "")
        for index in range(len(part)):
            info = part.get_data_info(index)
            name = str(info.get("img_path", info.get("img_id", index)))
            labels = info.get("gt_label"), len(info.get("instances") or ())
            digest.update(f"{name.removeprefix(root).lstrip('/')}\0{labels}\n".encode())
    elif hasattr(part, "path"):
        for index in range(len(part)):
            digest.update(f"{part.path(index)}\n".encode())
    else:
        return False
    return True


def compared(cfg: Mapping) -> dict:
    return {key: cfg[key] for key in _COMPARED if cfg.get(key) is not None}


def stored_config(meta: Mapping[str, Any]) -> dict | None:
    return json.loads(meta[RUN]["config"]) if RUN in meta else None


def plain(value: Any) -> Any:
    """A config's value in JSON's types."""
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    if value is None or isinstance(value, (str, int, float, bool)):
        return value
    return getattr(value, "__qualname__", None) or str(value)


class Difference(NamedTuple):
    """A value of the config that is not what it was.

    Attributes:
        path: its place; parts of a list go by their type.
        old, new: in words.
        effect: 'exactness', 'rounding', 'none' or 'place', of files whose names are compared.
    """

    path: str
    old: str
    new: str
    effect: str


def compare_configs(cfg: Config, meta: Mapping[str, Any]) -> list[Difference] | None:
    """The differences between a config and that of a checkpoint; None if it keeps none."""
    old = stored_config(meta)
    if old is None:
        return None
    new = plain(compared(cfg))
    found = _differences(old, new, "")
    return [
        Difference(path, _words(before), _words(now), _effect(path, before, now))
        for path, before, now in found
        if path.rpartition(".")[2] not in _STARTING_POINT
    ]


def _differences(old: Any, new: Any, path: str) -> Iterator[tuple[str, Any, Any]]:
    if _is_parts(old) and _is_parts(new):
        old, new = _by_type(old), _by_type(new)
        common = [name for name in old if name in new], [name for name in new if name in old]
        if common[0] != common[1]:
            yield f"{path} (order)", ", ".join(common[0]), ", ".join(common[1])
    is_same_kind = isinstance(old, dict) and isinstance(new, dict)
    if is_same_kind and old.get("type") == new.get("type"):
        for key in dict.fromkeys((*old, *new)):
            place = f"{path}.{key}" if path else key
            yield from _differences(old.get(key, _ABSENT), new.get(key, _ABSENT), place)
    elif old != new and not (_is_nothing(old) and _is_nothing(new)):
        yield path, old, new


def _is_nothing(value: Any) -> bool:
    return value is None or value is _ABSENT


def _is_parts(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(v, dict) and "type" in v for v in value)


def _by_type(parts: list[dict]) -> dict[str, dict]:
    named: dict[str, dict] = {}
    for part in parts:
        kind = part["type"]
        if isinstance(part.get("hook"), dict):  # PerStudentHook
            kind = f"{kind}({part['hook']['type']})"
        name, count = kind, 2
        while name in named:
            name, count = f"{kind}#{count}", count + 1
        named[name] = part
    return named


def _words(value: Any) -> str:
    if _is_nothing(value):
        return "not set"
    if isinstance(value, dict):
        value = value.get("type", value)
    text = json.dumps(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def _effect(path: str, old: Any, new: Any) -> str:
    if path.rpartition(".")[2] in _WITHOUT_EFFECT or _WATCHING.match(path):
        return "none"
    is_place = isinstance(old, str) and isinstance(new, str) and "/" in old + new
    if is_place and path.startswith("train_dataloader."):
        return "place"
    return "rounding" if _ROUNDING.match(path) else "exactness"


def compare_schedules(
    cfg: Config, meta: Mapping[str, Any], iteration: int
) -> tuple[dict[str, tuple[float, float]], bool]:
    """Compare the schedules of a pretraining config with those of a checkpoint.

    Returns:
        The values at ``iteration`` that would have been others, as pairs by their place; and
        whether any value of the iterations that both runs have left is another one.
    """
    old, new = (_schedules(each) for each in (stored_config(meta), plain(compared(cfg))))
    last = min(each["train_cfg"]["max_iters"] for each in (stored_config(meta), cfg)) - 1
    span = max(last - iteration, 0)
    samples = {iteration + span * k // _SAMPLES for k in range(_SAMPLES + 1)}
    common = old.keys() & new.keys()
    jumps = {
        path: (old[path](iteration), new[path](iteration))
        for path in sorted(common)
        if old[path](iteration) != new[path](iteration)
    }
    same = all(old[path](it) == new[path](it) for path in common for it in samples)
    return jumps, not same


def _schedules(config: Mapping) -> dict[str, Callable[[int], float]]:
    """Every schedule of a config's hooks, by its place."""
    total, batch = (config["train_cfg"].get(k) for k in ("max_iters", "global_batch_size"))
    found = {}

    def visit(part: Any, path: str) -> None:
        if _is_parts(part):
            part = _by_type(part)
        if not isinstance(part, dict):
            return
        for key, value in part.items():
            is_rate = key == "lr" and "scaling_rule" in part
            is_schedule = isinstance(value, dict) and value.get("type") in SCHEDULES
            if not is_schedule and not (key == "lr" and isinstance(value, (int, float))):
                visit(value, f"{path}.{key}")
                continue
            try:
                scaled = scale_lr_schedule(value, part["scaling_rule"], batch) if is_rate else value
                found[f"{path}.{key}"] = build_schedule(scaled, total)
            except (ValueError, TypeError):
                continue  # refused by the hook that reads it, in words of its own

    visit(config.get("custom_hooks") or [], "custom_hooks")
    return found


def is_length(path: str) -> bool:
    """Whether a place in the config holds the length of the run."""
    return path in ("train_cfg.max_iters", "train_cfg.max_epochs")


# --- Which checkpoint ``--resume`` means, and what cannot go on from it ---
#
# What lies in the work folder counts, wherever the folder was when the run began, and no file is
# unpickled. What makes no sense is refused before anything is built, with what to do.


_HOST_FILE = re.compile(r"(?:epoch|iter)_(\d+)\.pth")


def choose_checkpoint(
    cfg: Config, given: str | Path | None = None, *, is_stage: bool = False
) -> Path | None:
    """The checkpoint that ``--resume`` means: the one given, or the newest of the work folder.

    What lies in the work folder counts, wherever the folder was when the run began. A pretraining
    run that went back goes on with its newest branch, see
    :func:`~dinov3_mm.engine.run_files.resume_point`.

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
