"""A stage of the recipe starts from the work folder of the one before it: ``--from-stage``.

A config says what it is in ``stage``, which nothing but this module reads::

    stage = dict(
        kind='gram_anchor',   # goes on training: weights, heads and moments of the optimizer
        iterations='own',     # counted from 0; 'absolute': as in the stage before, which it resumes
        gram_iter=None,       # whose teacher anchors: the newest, or that of an iteration
    )
    stage = dict(kind='high_res')   # starts from the EMA teacher, with a fresh optimizer
"""

from collections.abc import Mapping
from pathlib import Path

import torch
from mmengine.config import Config, ConfigDict
from mmengine.dist import broadcast_object_list
from mmengine.registry import MODELS

from dinov3_mm.checkpoints.containers import read_index
from dinov3_mm.engine.run_files import find_latest_checkpoint, list_checkpoints, list_exports
from dinov3_mm.engine.training_state import STAGE_MODULES, read_training_state, refuse_mismatch
from dinov3_mm.errors import ConfigError, hint

from .check import STAGE_KEYS

KINDS = ("gram_anchor", "high_res")
COUNTS = ("own", "absolute")
HEADS = ("dino_head", "ibot_head")


def start_from_stage(cfg: Config, folder: str | Path, *, gram_iter: int | None = None) -> list[str]:
    """Let a run start from the newest complete checkpoint of the stage before it.

    Args:
        cfg: config of the later stage with its ``work_dir``, changed in place.
        folder: work folder of the earlier stage.
        gram_iter: iteration of that stage whose teacher becomes the Gram teacher; by default what
            the config says.

    Returns:
        Lines for the log: what was chosen and why.

    Raises:
        ConfigError: a config that is no later stage or says already where it starts; a folder
            without a complete checkpoint, of another architecture, or without the asked teacher.
    """
    stage = _stage_of(cfg)
    _refuse_two_starts(cfg)
    folder = Path(folder).expanduser()
    checkpoint = _newest(folder, cfg.get("work_dir"))
    shapes = stored_shapes(checkpoint)
    adopt_heads(cfg, shapes)
    _refuse_other_model(cfg, shapes, checkpoint)
    if stage["kind"] == "high_res":
        cfg.model["start_from"] = str(checkpoint)
        lines = [
            f"stage high_res: student, EMA teacher and heads start from the EMA teacher of "
            f"{checkpoint}; the optimizer is fresh, iterations count from 0"
        ]
    elif stage["iterations"] == "absolute":
        lines = [_resume(cfg, checkpoint)]
    else:
        lines = [_go_on(cfg, checkpoint)]
    return lines + _anchor(cfg, folder, gram_iter or stage["gram_iter"], checkpoint)


def resume_stage(cfg: Config) -> None:
    """Give a stage that is resumed from its own checkpoint the heads that it had.

    Raises:
        ConfigError: a bad ``stage``.
    """
    if "stage" in cfg:
        _stage_of(cfg)
        adopt_heads(cfg, stored_shapes(Path(cfg.resume)))


def refuse_orphan(cfg: Config) -> None:
    """Refuse a later stage that would start from nothing.

    Raises:
        ConfigError: the config is a later stage and says nowhere where it starts.
    """
    if "stage" not in cfg or cfg.get("resume") or cfg.get("load_from"):
        return
    stage = _stage_of(cfg)
    if not cfg.model.get("start_from"):
        raise ConfigError(
            f"this is the {stage['kind']} stage, which goes on from an earlier one: give its work "
            "folder with --from-stage WORK_DIR"
        )


def stored_shapes(checkpoint: Path) -> dict[str, tuple[int, ...]]:
    """Shape of every tensor of the model in a training checkpoint; none is read."""
    if checkpoint.is_dir():
        stored = read_index(checkpoint).state_dict_metadata
        return {
            name.removeprefix("model."): tuple(entry.size)
            for name, entry in stored.items()
            if name.startswith("model.") and hasattr(entry, "size")
        }
    state = read_training_state(checkpoint, mmap=True)["state_dict"]
    return {name: tuple(tensor.shape) for name, tensor in state.items()}


def adopt_heads(cfg: Config, shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Set ``num_prototypes='auto'`` to what the heads of a checkpoint have."""
    for name in HEADS:
        prototypes = shapes.get(f"teacher.{name}.last_layer.weight")
        if prototypes is not None and cfg.model[name].get("num_prototypes") == "auto":
            cfg.model[name]["num_prototypes"] = prototypes[0]


def _stage_of(cfg: Config) -> dict:
    """The config's ``stage``, completed and checked."""
    stage = cfg.get("stage")
    if stage is None:
        raise ConfigError(
            "--from-stage: this config is no later stage. Those are configs/dinov3/*_gram_anchor.py"
            " and *_high_res.py; a config of your own says stage=dict(kind='gram_anchor') or "
            "stage=dict(kind='high_res')"
        )
    for key in stage:
        if key not in STAGE_KEYS:
            raise ConfigError(f"stage: nobody reads {key!r}; {hint(key, STAGE_KEYS)}")
    stage = {"kind": None, "iterations": "own", "gram_iter": None, **stage}
    for key, known in (("kind", KINDS), ("iterations", COUNTS)):
        if stage[key] not in known:
            raise ConfigError(f"stage.{key}={stage[key]!r}; {hint(str(stage[key]), known)}")
    if stage["kind"] == "high_res" and stage["iterations"] == "absolute":
        raise ConfigError(
            "stage: high_res starts with a fresh optimizer, so its iterations are its own"
        )
    return stage


def _refuse_two_starts(cfg: Config) -> None:
    given = {
        "load_from": cfg.get("load_from"),
        "model.start_from": cfg.model.get("start_from"),
        "resume": cfg.get("resume"),
    }
    for key, value in given.items():
        if value:
            raise ConfigError(
                f"--from-stage says where the run starts, and so does {key}={str(value)!r}: remove "
                "one of them"
            )


def _newest(folder: Path, work_dir: str | None) -> Path:
    if not folder.is_dir():
        what = "is not a folder" if folder.exists() else "does not exist"
        raise ConfigError(
            f"--from-stage: {folder} {what}; give the work folder of the earlier stage"
        )
    if work_dir is not None and folder.resolve() == Path(work_dir).expanduser().resolve():
        raise ConfigError(
            f"--from-stage: {folder} is the work folder of this run too; give this stage another "
            "one with --work-dir"
        )
    # One answer for all processes: the earlier stage may still be saving.
    answer = [find_latest_checkpoint(folder)]
    broadcast_object_list(answer)
    (checkpoint,) = answer
    if checkpoint is None:
        raise ConfigError(
            f"--from-stage: no complete checkpoint in {folder / 'checkpoints'}; give the work "
            "folder of a stage that has saved one (default_hooks.checkpoint.interval)"
        )
    return checkpoint


def _refuse_other_model(cfg: Config, shapes: Mapping[str, tuple], checkpoint: Path) -> None:
    """Compare the EMA teacher of a checkpoint with the one that the config builds."""
    with torch.device("meta"):
        try:
            model = MODELS.build({**cfg.model, "init_cfg": None, "start_from": None})
        except (ValueError, TypeError) as error:
            raise ConfigError(f"model: {error}") from error
    # What a stage may add, heads that are still to be settled.
    ours = {name: tuple(value.shape) for name, value in model.state_dict().items()}
    ours, theirs = (
        {name: shape for name, shape in each.items() if name.split(".")[0] not in STAGE_MODULES}
        for each in (ours, shapes)
    )
    other = [
        f"{name} (there {theirs[name]}, here {ours[name]})"
        for name in sorted(ours.keys() & theirs.keys())
        if ours[name] != theirs[name]
    ]
    try:
        refuse_mismatch(ours.keys() - theirs.keys(), theirs.keys() - ours.keys(), other)
    except ValueError as error:
        raise ConfigError(
            f"--from-stage: {checkpoint} is of another architecture than this config: {error}. "
            "Both stages need the same model.backbone, model.dino_head and model.ibot_head"
        ) from None


def _resume(cfg: Config, checkpoint: Path) -> str:
    iteration = _iteration(checkpoint)
    total = cfg.train_cfg["max_iters"]
    if iteration >= total:
        raise ConfigError(
            f"--from-stage: {checkpoint} is of iteration {iteration}, and this stage ends at "
            f"{total}: its iterations are those of the stage before (stage.iterations='absolute')"
        )
    cfg.resume, cfg.load_from = str(checkpoint), None
    return (
        f"stage gram_anchor: resumes {checkpoint}, optimizer included; iterations go on from "
        f"{iteration} to {total}, for which the schedules are written"
    )


def _go_on(cfg: Config, checkpoint: Path) -> str:
    cfg.load_from = str(checkpoint)
    strategy = cfg.get("strategy") or {"type": "PretrainStrategy"}
    cfg.strategy = ConfigDict({**strategy, "load_optimizer": True})
    return (
        f"stage gram_anchor: weights, heads and optimizer moments of {checkpoint}; iterations "
        "count from 0"
    )


def _anchor(cfg: Config, folder: Path, gram_iter: int | None, checkpoint: Path) -> list[str]:
    """Name the Gram teacher to the hook that loads it; nothing without one."""
    hook = next((h for h in cfg.get("custom_hooks", []) if h["type"] == "GramAnchorHook"), None)
    is_frozen = (cfg.model.get("gram") or {}).get("teacher", "frozen") == "frozen"
    if hook is None or not is_frozen:
        if gram_iter is not None:
            raise ConfigError(
                f"--gram-iter {gram_iter}: this config has no Gram teacher of its own "
                "(model.gram=dict(...) and a GramAnchorHook)"
            )
        return []
    iteration = _iteration(checkpoint) if gram_iter is None else gram_iter
    # An export holds the teacher backbone alone; a checkpoint holds it among much else.
    kept = {**list_checkpoints(folder), **list_exports(folder)}
    if iteration not in kept:
        raise ConfigError(
            f"--gram-iter: {folder} keeps no teacher of iteration {iteration}; it has "
            f"{', '.join(map(str, sorted(kept)))} (default_hooks.checkpoint.keep_every keeps more)"
        )
    hook["checkpoint"] = str(kept[iteration])
    why = "the newest" if gram_iter is None else "as asked for"
    return [f"Gram teacher: {kept[iteration]} (iteration {iteration}, {why})"]


def _iteration(checkpoint: Path) -> int:
    return int(checkpoint.stem.removeprefix("iter_"))
