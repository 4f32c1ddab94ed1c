"""From an architecture name or dict and explicit arguments to every value of an architecture."""

from collections.abc import Mapping
from typing import Any

from dinov3_mm.suggest import hint


def resolve_arch(
    arch: str | Mapping[str, Any],
    table: Mapping[str, Mapping[str, Any]],
    *,
    sizes: tuple[str, ...],
    defaults: Mapping[str, Any],
    overrides: Mapping[str, Any],
    exclusive: tuple[tuple[str, ...], tuple[str, ...]] = ((), ()),
) -> dict[str, Any]:
    """Return every value of an architecture: of a row of ``table``, or of a dict over defaults.

    Args:
        arch: name in ``table``, or a dict that states all ``sizes`` and any key of ``defaults``.
        table: architectures by name, each complete.
        sizes: keys without a default.
        defaults: values of the keys that a dict may leave out.
        overrides: explicit arguments by key; None means "as in ``arch``".
        exclusive: two groups of keys of which one is None; stating one withdraws the other.

    Raises:
        ValueError: for an unknown name or key, or a missing size.
    """
    if isinstance(arch, str):
        if arch not in table:
            raise ValueError(
                f"arch is {arch!r}; expected a dict or one of {', '.join(table)}; "
                f"{hint(arch, table)}"
            )
        settings = dict(table[arch])
    else:
        _check_keys(arch, sizes, defaults)
        settings = {size: arch[size] for size in sizes} | dict(defaults)
        _update(settings, arch, exclusive)
    explicit = {key: value for key, value in overrides.items() if value is not None}
    _update(settings, explicit, exclusive)
    return settings


def settle_transformer(settings: dict[str, Any], ffn_layers: tuple[str, ...]) -> dict[str, Any]:
    """The settings of a ViT after the checks that all families have in common.

    Args:
        settings: result of :func:`resolve_arch`.
        ffn_layers: feed-forwards that the family knows.

    Raises:
        ValueError: for another feed-forward, or heads that do not divide the width.
    """
    settings["layer_scale_init_value"] = float(settings["layer_scale_init_value"] or 0)
    if settings["ffn_layer"] not in ffn_layers:
        raise ValueError(f"ffn_layer is {settings['ffn_layer']!r}; expected one of {ffn_layers}")
    if settings["embed_dims"] % settings["num_heads"]:
        raise ValueError(
            f"embed_dims {settings['embed_dims']} is not a multiple of "
            f"num_heads {settings['num_heads']}"
        )
    return settings


def _check_keys(
    arch: Mapping[str, Any], sizes: tuple[str, ...], defaults: Mapping[str, Any]
) -> None:
    known = (*sizes, *defaults)
    for key in arch:
        if key not in known:
            raise ValueError(
                f"unknown key {key!r} in the arch dict; known keys are {', '.join(known)}; "
                f"{hint(key, known)}"
            )
    missing = [key for key in sizes if key not in arch]
    if missing:
        raise ValueError(f"the arch dict lacks {', '.join(missing)}; it has {', '.join(arch)}")


def _update(
    settings: dict[str, Any],
    changes: Mapping[str, Any],
    exclusive: tuple[tuple[str, ...], tuple[str, ...]],
) -> None:
    """Apply changes; a change that states one exclusive group alone withdraws the other."""
    stated = [any(changes.get(key) is not None for key in group) for group in exclusive]
    for group, is_stated, other in zip(exclusive, stated, reversed(stated), strict=True):
        if other and not is_stated:
            settings.update(dict.fromkeys(group))
    settings.update(changes)
