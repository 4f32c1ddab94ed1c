"""``--cfg-options key.path=value``: parsed, checked against the config, then set."""

import ast
from collections.abc import Mapping, Sequence

from mmengine.config import Config, DictAction

from dinov3_mm.engine.config.check import ConfigError, accepted_at, runner_keys, untyped_keys
from dinov3_mm.suggest import hint


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
