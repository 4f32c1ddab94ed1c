"""The terms of the loss, DINO, iBOT and KoLeo, and the settings of all terms."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from dinov3_mm.errors import hint
from dinov3_mm.models.losses import koleo_loss

from .several_teachers import SeveralComparison
from .student import NUM_GLOBAL_CROPS, ChunkedComparison, WholeComparison

# --- Settings ---


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


# --- Terms of crops and patches ---


class TeacherView(NamedTuple):
    """What the teacher sees in the global crops: CLS (2B, D), patches (2B, N, D), and the
    assignments of CLS and of masked patches in the form of the comparison. A distillation teacher,
    whose features have a width of their own, gives the assignments only.
    """

    cls: Tensor | None
    patches: Tensor | None
    cls_targets: Any
    patch_targets: Any


class StudentView(NamedTuple):
    """What the student sees: CLS (2B, D) and patches (2B, N, D) before the heads, and the scores
    of global and local CLS and of masked patches in the form of the comparison.
    """

    global_cls: Tensor
    patches: Tensor
    global_scores: Any
    local_scores: Any
    patch_scores: Any


def image_terms(
    teacher: TeacherView,
    student: StudentView,
    batch: Mapping[str, Tensor],
    *,
    comparison: WholeComparison | ChunkedComparison | SeveralComparison,
    num_local: int,
    local_weight: float | Tensor,
    student_temp: float,
    dino: Mapping[str, Any],
    ibot: Mapping[str, Any],
    koleo: Mapping[str, Any],
) -> tuple[Tensor, dict[str, Tensor]]:
    """Weighted sum of the terms, and each of them unweighted.

    Of several teachers the DINO and iBOT terms are the weighted sums. The two DINO terms share
    ``dino['weight']`` in proportion to their numbers of crop pairs.

    Args:
        teacher: the teacher's view of the batch.
        student: the student's view.
        batch: holds ``masks`` and ``masks_weight``.
        comparison: made the scores and assignments of the views.
        num_local: local crops per image.
        local_weight: further factor of the local DINO term.
        student_temp: temperature of the student's softmax.
        dino: settings of the DINO terms, see ``DINOv3``.
        ibot: settings of the iBOT term.
        koleo: settings of the KoLeo term.
    """
    ignore_diagonal = dino["global_ignore_diagonal"]
    local_loss = comparison.dino(
        student.local_scores, teacher.cls_targets, num_crops=num_local, student_temp=student_temp
    )
    global_loss = comparison.dino(
        student.global_scores,
        teacher.cls_targets,
        num_crops=NUM_GLOBAL_CROPS,
        student_temp=student_temp,
        ignore_diagonal=ignore_diagonal,
    )
    patch_loss = comparison.ibot(
        student.patch_scores,
        teacher.patch_targets,
        batch["masks_weight"],
        len(batch["masks"]),
        student_temp=student_temp,
    )
    compared, of_teachers = comparison.combine(
        {"dino_local_loss": local_loss, "dino_global_loss": global_loss, "ibot_loss": patch_loss}
    )
    spread_loss = _koleo_term(_per_crop(student.global_cls, NUM_GLOBAL_CROPS), koleo)

    global_pairs = NUM_GLOBAL_CROPS * (NUM_GLOBAL_CROPS - ignore_diagonal)
    local_pairs = NUM_GLOBAL_CROPS * num_local
    local_share = local_pairs / (local_pairs + global_pairs)
    total = (
        dino["weight"] * local_share * local_weight * compared["dino_local_loss"]
        + dino["weight"] * (1 - local_share) * compared["dino_global_loss"]
        + koleo["weight"] * NUM_GLOBAL_CROPS * spread_loss
        + ibot["weight"] * compared["ibot_loss"]
    )
    return total, {
        **compared,
        "koleo_loss": spread_loss,
        "dino_local_weight": as_scalar(local_weight, total),
        **of_teachers,
    }


def _koleo_term(cls: Tensor, options: Mapping[str, Any]) -> Tensor:
    """Mean KoLeo loss of the global crops (2, B, D)."""
    if options["weight"] == 0:
        return torch.zeros((), device=cls.device)
    return koleo_loss(
        cls,
        topk=options["topk"],
        distributed=options["distributed"],
        loss_group_size=options["group_size"],
    )


def _per_crop(rows: Tensor, num_crops: int) -> Tensor:
    """Crop-major rows (crops * B, ...) to (crops, B, ...)."""
    return rows.unflatten(0, (num_crops, -1))


def count_local_crops(batch: Mapping[str, Tensor]) -> int:
    """Local crops per image of a batch.

    Raises:
        ValueError: numbers of crops or masks that do not belong together.
    """
    num_global, num_local = len(batch["global_crops"]), len(batch["local_crops"])
    num_images = num_global // NUM_GLOBAL_CROPS
    whole = num_images and num_global == NUM_GLOBAL_CROPS * num_images
    if not whole or not num_local or num_local % num_images or len(batch["masks"]) != num_global:
        raise ValueError(
            f"a batch of B images has {NUM_GLOBAL_CROPS}B global crops and masks, and a positive "
            f"multiple of B local crops; got {num_global}, {len(batch['masks'])} and {num_local}"
        )
    return num_local // num_images


def as_scalar(value: float | Tensor, like: Tensor) -> Tensor:
    """``value`` as a float32 scalar on the device of ``like``, without a copy from the host."""
    if isinstance(value, Tensor):
        return value.to(like.device, torch.float32)
    return torch.full((), value, device=like.device, dtype=torch.float32)
