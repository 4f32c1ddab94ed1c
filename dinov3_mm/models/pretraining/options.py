"""Settings of the loss terms: defaults, unknown keys, contradictions."""

from collections.abc import Mapping
from typing import Any

from dinov3_mm.suggest import hint

COMPUTE_DTYPES = ("fp32", "bf16")
DINO_DEFAULTS = dict(weight=1.0, global_ignore_diagonal=True)
IBOT_DEFAULTS = dict(weight=1.0)
KOLEO_DEFAULTS = dict(weight=0.1, distributed=False, topk=1, group_size=None)
GRAM_DEFAULTS = dict(
    weight=1.0,
    normalized=True,
    img_level=True,
    remove_neg=False,
    remove_only_teacher_neg=False,
    tokens_used="all",
    compute_stats=False,
    teacher="frozen",
    resize_method="bicubic",
    resize_antialias=False,
)


def resolve_options(
    term: str, given: Mapping[str, Any] | None, defaults: Mapping[str, Any]
) -> dict[str, Any]:
    """Return ``defaults`` updated by ``given``.

    Args:
        term: name of the loss term, for messages.
        given: settings from the config.
        defaults: all settings of the term.

    Raises:
        TypeError: ``given`` is no mapping.
        ValueError: an unknown setting, or a negative weight.
    """
    if given is not None and not isinstance(given, Mapping):
        raise TypeError(f"{term} must be a dict of settings or None, got {given!r}")
    given = given or {}
    for key in given:
        if key not in defaults:
            raise ValueError(f"{term} has no setting {key!r}; {hint(key, defaults)}")
    options = {**defaults, **given}
    if options["weight"] < 0:
        raise ValueError(f"{term}: weight must not be negative, got {options['weight']}")
    return options


def resolve_koleo(given: Mapping[str, Any] | None) -> dict[str, Any]:
    """Settings of the KoLeo term; the neighbour search of several images needs all ranks."""
    options = resolve_options("koleo", given, KOLEO_DEFAULTS)
    if options["topk"] < 1:
        raise ValueError(f"koleo: topk must be at least 1, got {options['topk']}")
    if not options["distributed"] and (options["topk"] > 1 or options["group_size"] is not None):
        raise ValueError(
            f"koleo: topk={options['topk']} and group_size={options['group_size']} need "
            "distributed=True"
        )
    return options


def resolve_gram(given: Mapping[str, Any] | None) -> dict[str, Any] | None:
    """Settings of the Gram term, or None when there is none."""
    if given is None:
        return None
    options = resolve_options("gram", given, GRAM_DEFAULTS)
    choices = dict(
        teacher=("frozen", "ema"),
        tokens_used=("all", "masked", "unmasked"),
        resize_method=("bicubic", "bilinear"),
    )
    for key, allowed in choices.items():
        if options[key] not in allowed:
            raise ValueError(f"gram: {key} must be one of {allowed}, got {options[key]!r}")
    if options["remove_neg"] and options["remove_only_teacher_neg"]:
        raise ValueError("gram: give either remove_neg or remove_only_teacher_neg, not both")
    if options["tokens_used"] != "all" and options["img_level"]:
        raise ValueError(
            f"gram: tokens_used={options['tokens_used']!r} needs img_level=False, because images "
            "have different numbers of masked patches"
        )
    return options


def check_compute_dtype(name: str) -> str:
    """Return ``name``, or raise a ``ValueError`` if it is none of ``COMPUTE_DTYPES``."""
    if name not in COMPUTE_DTYPES:
        raise ValueError(
            f"compute_dtype must be one of {COMPUTE_DTYPES}, got {name!r}. float16 is not "
            "supported: it overflows without loss scaling; use 'bf16'"
        )
    return name
