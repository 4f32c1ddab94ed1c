"""What is different in a resumed run, and what that means.

One rule, for pretraining and for downstream jobs: **the checkpoint gives the weights, the moments
of the optimizer and the iteration; the config gives everything else**: rates, loss weights,
lengths, data. Schedules are functions of the config and the iteration, so a resumed run whose
config and data are the same does what it would have done. Where they are not, every difference is
named, and so is what ends that exactness; what makes no sense is refused.

To be compared, config and data must be in the checkpoint: :func:`record_run` says what is kept
under ``meta['run']``, as text and numbers.
"""

import hashlib
import json
import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import torch
from mmengine.config import Config
from mmengine.dist import get_world_size

from dinov3_mm.engine.optim.schedule_config import SCHEDULES, build_schedule, scale_lr_schedule

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
# Hooks that only watch.
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
