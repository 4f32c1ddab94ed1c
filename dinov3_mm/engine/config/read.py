"""What a command line says of a config: its file, options, images and weights."""

import ast
import os
import traceback
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import mmengine
from mmengine.config import Config, ConfigDict, DictAction
from mmengine.config.utils import ConfigParsingError

from dinov3_mm.checkpoints.locate import Statistics, find_statistics, located
from dinov3_mm.errors import ConfigError, hint, nearest
from dinov3_mm.models.pretraining.distillation import RANDOM

from .auto import RECORD
from .check import accepted_at, runner_keys, untyped_keys

# --- Config files ---


_SCOPE = "dinov3_mm"
# What running a config can raise.
_OF_PYTHON = (
    *(ArithmeticError, AttributeError, LookupError, NameError, SyntaxError, TypeError),
    ConfigParsingError,
)
# Configs, tools and the index that come along, where MMEngine and mim look for those of a package.
SHIPPED = Path(__file__).resolve().parents[2] / ".mim"


def config_names() -> list[str]:
    """Names of the configs that come along, such as ``dinov3/continue_vits16``."""
    folder = SHIPPED / "configs"
    paths = (path.relative_to(folder) for path in folder.glob("*/**/*.py"))
    names = (path.with_suffix("").as_posix() for path in paths if path.parts[0] != "_base_")
    return sorted(names)


def find_config(given: str | os.PathLike) -> str:
    """Path of a config file, of one of the package by its name.

    Args:
        given: a file; or a name of :func:`config_names`, also with ``.py``, and with ``configs/``
            or ``dinov3_mm::`` before it. A file of that name goes first.

    Returns:
        The path of the file; what was given, where it is a path to which there is no file.

    Raises:
        ConfigError: a name that no config has; the message says the nearest.
    """
    path = Path(given)
    if path.exists():
        return str(given)
    name = str(given).removeprefix("dinov3_mm::").removeprefix("configs/").removesuffix(".py")
    names = config_names()
    if name in names:
        return str((SHIPPED / "configs" / f"{name}.py").resolve())
    named = [each for each in names if each.endswith(f"/{path.name}")]
    meant = named[0] if named else nearest(name, names, cutoff=0.75)
    # A path is refused by who opens it, unless it can only be a misspelt name.
    if path.suffix and (meant is None or path.is_absolute() or path.parent.is_dir()):
        return str(given)
    raise ConfigError(
        f"there is no config file {str(given)!r}, nor a config of that name in the package; "
        + (f"did you mean {meant!r}?" if meant else "dinov3-mm configs lists them")
    )


def read_config(path: str | os.PathLike) -> Config:
    """Read a config: a file, or one of this package by its name; see :func:`find_config`.

    MMEngine marks what comes from ``_base_ = 'dinov3_mm::...'`` with the scope 'dinov3_mm', where
    it would then look for the modules of mmpretrain, mmseg or mmdet too. The mark is removed: names
    are looked up in the config's ``default_scope``, as without the detour.

    Raises:
        ConfigError: the config imports a package whose host is not installed; the message is that
            of the package, which MMEngine would hide. Or it is no valid Python, or a name that no
            config has.
        FileNotFoundError: there is no such file.
    """
    try:
        cfg = Config.fromfile(find_config(path))
    except ImportError as error:
        raise ConfigError(f"{_first(error)}") from error
    except _OF_PYTHON as error:
        raise ConfigError(f"the config cannot be read: {_in_words(error)}") from error
    _unmark(cfg._cfg_dict)
    return cfg


def _in_words(error: Exception) -> str:
    """What is wrong in a config, and where, in it or in one that it inherits from."""
    text = f"{type(error).__name__}: {error.args[0] if error.args else error}"
    if isinstance(error, SyntaxError):
        return f"line {error.lineno}: {text}"
    steps = traceback.extract_tb(error.__traceback__)
    mmengine_from = next(i for i, step in enumerate(steps) if _is_of_mmengine(step.filename))
    inside = [step for step in steps[mmengine_from:] if step.name == "<module>"]
    return f"{inside[-1].filename}, line {inside[-1].lineno}: {text}" if inside else text


def _is_of_mmengine(path: str) -> bool:
    return Path(mmengine.__file__).parent in Path(path).parents


def _first(error: BaseException) -> BaseException:
    """The error with which it all began."""
    while (earlier := error.__cause__ or error.__context__) is not None:
        error = earlier
    return error


def _unmark(part: object) -> None:
    if isinstance(part, dict):
        if part.get("_scope_") == _SCOPE:
            del part["_scope_"]
        part = list(part.values())
    if isinstance(part, (list, tuple)):
        for value in part:
            _unmark(value)


# --- ``--cfg-options key.path=value``: parsed, checked against the config, then set ---


def parse_options(options: Sequence[str]) -> dict[str, object]:
    """Split ``KEY=VALUE`` words.

    A value is a Python literal (``1e-4``, ``[1, 2]``, ``None``), ``true`` or ``false``, MMEngine's
    ``a,b`` or ``[a,b]`` list of bare words, or else the text itself, spaces included.

    Raises:
        ConfigError: If a word has no ``=``.
    """
    parsed = {}
    for option in options:
        key, separator, text = option.partition("=")
        if not separator or not key:
            raise ConfigError(f"--cfg-options: expected KEY=VALUE, got {option!r}")
        parsed[key] = _parse_value(text)
    return parsed


def apply_options(cfg: Config, options: Mapping[str, object]) -> None:
    """Set the values of ``options`` in ``cfg``.

    A path must lead to a value that the config has, or be an argument of the ``type`` that the
    config has there, or be a top-level Runner key.

    Args:
        cfg (Config): The config.
        options (Mapping[str, object]): Dotted paths and values; a list element is named by its
            index, ``custom_hooks.0.interval``.

    Raises:
        ConfigError: With one line per path that does not exist and the nearest name.
    """
    findings = [finding for path in options if (finding := _check_path(cfg, path)) is not None]
    if findings:
        raise ConfigError("\n".join(findings))
    for path, value in options.items():
        *parents, leaf = path.split(".")
        node: object = cfg
        for key in parents:
            node = node[int(key) if isinstance(node, list) else key]
        node[int(leaf) if isinstance(node, list) else leaf] = value


def _parse_value(text: str) -> object:
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        pass
    if " " in text and not text.startswith(("[", "(")):
        return text
    return DictAction._parse_iterable(text)


def _check_path(cfg: Config, path: str) -> str | None:
    """A finding if ``path`` leads nowhere in the config."""
    node: object = cfg
    *parents, leaf = path.split(".")
    first = path.split(".")[0]
    if first in cfg and first not in runner_keys(cfg):
        return (
            f"--cfg-options {path}: {first!r} is a helper variable, which nobody reads once the "
            "file has been evaluated; set the value where it is used"
        )
    owner_key = None
    for depth, key in enumerate([*parents, leaf]):
        place = ".".join(parents[:depth])
        known = _children(cfg, node, owner_key, place, is_leaf=depth == len(parents))
        if known is not None and key not in known:
            owner = place or "the config"
            return f"--cfg-options {path}: {owner} has no {key!r}; {hint(key, known)}"
        if depth < len(parents):
            node = node[int(key) if isinstance(node, list) else key]
            owner_key = owner_key if key.isdigit() else key
    return None


def _children(
    cfg: Config, node: object, owner_key: str | None, place: str, *, is_leaf: bool
) -> set[str] | None:
    """Names that may follow at ``node``, which is at ``place``; None when any may."""
    if isinstance(node, list):
        return {str(index) for index in range(len(node))}
    if not isinstance(node, (Mapping, Config)):
        return set()
    names = set(node)
    if not is_leaf:
        return names
    if node is cfg:
        return names | runner_keys(cfg)
    if "type" not in node:
        return names | untyped_keys(cfg).get(place, frozenset())
    accepted = accepted_at(node, owner_key)
    return None if accepted is None else names | accepted


# --- The images and weights of a command line ---


FOLDER = "ImageFolder"
INITIALIZER = "DINOv3Pretrained"


def set_data(cfg: Config, folder: str) -> None:
    """Make ``folder`` the root of every ``ImageFolder`` that is trained on or evaluated.

    Raises:
        ConfigError: the config does not read a folder, or there is none.
    """
    source = cfg.get("train_dataloader", {}).get("source", {})
    if not list(_folders(source)):
        raise ConfigError(
            f"--data: this config trains on {source.get('type')!r}; --data needs one whose "
            f"train_dataloader.source is dict(type={FOLDER!r}, root=...)"
        )
    path = Path(folder).expanduser()
    if not path.is_dir():
        what = "is not a folder" if path.exists() else "does not exist"
        raise ConfigError(f"--data: {path} {what}; give the folder that holds the images")
    for part in (source, *(hook for hook in cfg.get("custom_hooks", []))):
        for place in _folders(part):
            place["root"] = str(path)


def set_weights(cfg: Config, weights: str) -> None:
    """Let the student start from ``weights``, and the Gram teacher where it reads a file.

    Args:
        cfg: a config whose backbone has ``init_cfg=dict(type='DINOv3Pretrained', ...)``.
        weights: file, folder, URL or hub repository, or the name of a released checkpoint whose
            file lies in torch hub's cache.

    Raises:
        ConfigError: the config does not take weights, or they are not there.
    """
    init_cfg = _initializer(cfg)
    if init_cfg is None:
        raise ConfigError(
            "--weights: this config starts from random weights; --weights needs one with "
            f"model.backbone.init_cfg=dict(type={INITIALIZER!r}, checkpoint=...), such as those of "
            "configs/dinov3/continue_*.py"
        )
    init_cfg["checkpoint"] = _locate(weights)
    for hook in cfg.get("custom_hooks", []):
        if hook["type"] == "GramAnchorHook" and "checkpoint" in hook:
            hook["checkpoint"] = init_cfg["checkpoint"]


def settle_weights(cfg: Config, stored: Mapping | None = None) -> list[str]:
    """Refuse a run that would silently start from random weights; adopt the weights' statistics.

    A run that goes on from a training checkpoint has its weights there; the file that it once
    started from is not read again. The input statistics of the weights become those of the
    preprocessor, unless the config has its own.

    Args:
        cfg: a pretraining config, changed in place.
        stored: what the resumed run derived, see :func:`resolve_auto`.

    Returns:
        Lines for the log.

    Raises:
        ConfigError: an initializer without a checkpoint.
    """
    init_cfg = _initializer(cfg)
    if init_cfg is None:
        return []
    if cfg.get("resume") or cfg.get("load_from"):
        cfg.model["backbone"]["init_cfg"] = None
        if stored and "statistics" in stored:
            return [_set_statistics(cfg, Statistics(*stored["statistics"]))]
        return []
    if init_cfg.get("checkpoint") is None:
        raise ConfigError(
            "no weights to continue from: this config would start from random ones. Give them with "
            "--weights FILE (an official .pth, a Hugging Face or timm file or folder, an export), "
            "or set model.backbone.init_cfg=None to train from scratch"
        )
    return [_set_statistics(cfg, _statistics_of(init_cfg["checkpoint"]))]


def set_teacher(cfg: Config, given: str | Sequence[str]) -> None:
    """Distil from the teacher in a file, or from several.

    Args:
        cfg: a distillation config, changed in place.
        given: the file; for ``model.distillation.teachers`` one ``NAME=FILE`` for each.

    Raises:
        ConfigError: the config has no distillation teacher or another number of them, an unknown
            or missing name, or there is no such file.
    """
    hook = _teacher_hook(cfg)
    if hook is None:
        raise ConfigError(
            "--teacher: this config distils from nobody; --teacher needs one with "
            "dict(type='DistillationHook', ...) in custom_hooks, such as those of "
            "configs/dinov3/distill_*.py"
        )
    given = [given] if isinstance(given, str) else list(given)
    names = _teacher_names(cfg)
    if names:
        hook["checkpoint"] = {name: _teacher_file(file) for name, file in _named(given, names)}
        return
    if len(given) > 1:
        raise ConfigError(
            f"--teacher: {len(given)} files, but this config has one teacher; several are described"
            " in model.distillation.teachers"
        )
    hook["checkpoint"] = _teacher_file(given[0])


def _teacher_names(cfg: Config) -> tuple[str, ...]:
    """Names of several teachers; nothing for a single one."""
    return tuple((cfg.get("model", {}).get("distillation") or {}).get("teachers") or ())


def _named(given: Sequence[str], names: Sequence[str]) -> list[tuple[str, str]]:
    """``NAME=FILE`` as pairs, one for each name."""
    pairs = [item.partition("=")[::2] for item in given]
    wanted = " ".join(f"--teacher {name}=FILE" for name in names)
    for (name, file), item in zip(pairs, given):
        if not file:
            raise ConfigError(f"--teacher {item}: this config has several teachers; give {wanted}")
        if name not in names:
            raise ConfigError(
                f"--teacher {item}: no teacher is called {name!r}; {hint(name, names)}"
            )
    found = [name for name, _ in pairs]
    if sorted(found) != sorted(names):
        raise ConfigError(f"--teacher: {', '.join(found)} given; each teacher needs one: {wanted}")
    return pairs


def _teacher_file(file: str) -> str:
    path = Path(file).expanduser()
    if not path.exists():
        raise ConfigError(f"--teacher: {path} does not exist")
    return str(path)


def settle_teacher(cfg: Config) -> list[str]:
    """Refuse a distillation without a teacher's file; adopt the file's input statistics.

    Returns:
        Lines for the log.

    Raises:
        ConfigError: no file, or files that state different statistics.
    """
    hook = _teacher_hook(cfg)
    if hook is None:
        return []
    checkpoint, names = hook.get("checkpoint"), _teacher_names(cfg)
    if checkpoint is None:
        how = " ".join(f"--teacher {name}=FILE" for name in names) or "--teacher FILE"
        raise ConfigError(
            f"no teacher to distil from: give its file with {how}, a training checkpoint "
            "or teacher export with backbone and both heads"
        )
    files = checkpoint if isinstance(checkpoint, Mapping) else {"": checkpoint}
    known = {
        name: statistics
        for name, file in files.items()
        if file != RANDOM and (statistics := _statistics_of(file)) is not None
    }
    first = next(iter(known.values()), None)
    if any(list(map(list, each[:2])) != list(map(list, first[:2])) for each in known.values()):
        stated = {name: (each.mean, each.std) for name, each in known.items()}
        raise ConfigError(
            f"the teachers take inputs of different statistics (mean and std): {stated}. All see "
            "the same normalised crops: choose teachers that were trained alike"
        )
    return [] if first is None else [_set_statistics(cfg, first)]


def settle_data(cfg: Config) -> None:
    """Refuse a run whose images nobody has named.

    Raises:
        ConfigError: an ``ImageFolder`` without root.
    """
    source = cfg.get("train_dataloader", {}).get("source", {})
    if any(place.get("root") is None for place in _folders(source)):
        raise ConfigError("no images to train on: give their folder with --data DIR")


def _teacher_hook(cfg: Config) -> dict | None:
    hooks = cfg.get("custom_hooks") or []
    return next((hook for hook in hooks if hook.get("type") == "DistillationHook"), None)


def _initializer(cfg: Config) -> dict | None:
    init_cfg = (cfg.get("model", {}).get("backbone") or {}).get("init_cfg")
    is_ours = isinstance(init_cfg, Mapping) and init_cfg.get("type") == INITIALIZER
    return init_cfg if is_ours else None


def _folders(part: object) -> Iterator[dict]:
    """Configs of type ImageFolder in ``part``."""
    if isinstance(part, Mapping):
        if part.get("type") == FOLDER:
            yield part
        for value in part.values():
            yield from _folders(value)


def _locate(weights: str) -> str:
    """Path of the file that a released checkpoint's name stands for; anything else as it is."""
    path = Path(weights).expanduser()
    if path.exists():
        return str(path)
    try:
        found = located(weights)
    except (FileNotFoundError, ValueError) as error:
        raise ConfigError(f"--weights: {error}") from error
    if found != weights:
        return str(found)
    if path.suffix or path.is_absolute():
        raise ConfigError(f"--weights: {path} does not exist")
    return weights


def _statistics_of(weights: str) -> Statistics | None:
    path = Path(weights).expanduser()
    return find_statistics(path) if path.exists() else None


def _set_statistics(cfg: Config, statistics: Statistics | None) -> str:
    """Normalise inputs as the weights expect them, and say so."""
    preprocessor = cfg.model.get("data_preprocessor") or {"type": "MultiCropPreprocessor"}
    if "mean" in preprocessor:
        return f"input statistics: mean {preprocessor['mean']}, std {preprocessor['std']} (config)"
    if statistics is None:
        return (
            "input statistics: ImageNet's, as the weights do not state any; set "
            "model.data_preprocessor.mean and .std if they were trained with others"
        )
    mean, std = list(statistics.mean), list(statistics.std)
    cfg.model["data_preprocessor"] = ConfigDict({**preprocessor, "mean": mean, "std": std})
    cfg[RECORD] = ConfigDict(
        {**(cfg.get(RECORD) or {}), "statistics": [mean, std, statistics.name]}
    )
    return f"input statistics: mean {mean}, std {std} ({statistics.name})"
