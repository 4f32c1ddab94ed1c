"""The Gram teacher and the Gram term (arXiv 2508.10104 section 4)."""

import copy
import os
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from dinov3_mm.checkpoints import load_backbone_weights
from dinov3_mm.checkpoints.load import shard_state

from ..losses import gram_loss, resize_tokens


class GramTeacher(nn.Module):
    """A backbone that is never trained, and whether it has been given weights yet.

    Its state dict holds ``backbone.*`` and ``ready``, so a resumed run knows.

    Args:
        backbone: module whose architecture is copied.
    """

    def __init__(self, backbone: nn.Module) -> None:
        super().__init__()
        self.backbone = copy.deepcopy(backbone).requires_grad_(False).eval()
        self.register_buffer("ready", torch.zeros((), dtype=torch.uint8))
        # The buffer is what is saved; steps read this mirror, which costs no device access.
        self.is_ready = False
        self.register_load_state_dict_post_hook(_mirror_ready)

    def load(self, source: str | os.PathLike | Mapping[str, Tensor]) -> str:
        """Take weights from a file of any known format, or from a backbone's state dict.

        Returns:
            One line about what was loaded.

        Raises:
            FileNotFoundError: no such file.
            ValueError: weights that do not fit.
        """
        if isinstance(source, Mapping):
            try:
                self.backbone.load_state_dict(
                    shard_state(source, self.backbone.state_dict()), strict=True
                )
            except RuntimeError as error:
                raise ValueError(f"the weights do not fit the Gram teacher: {error}") from None
            report = f"loaded {len(source)} tensors"
        else:
            report = str(load_backbone_weights(self.backbone, source))
        self._set_ready()
        return report

    def copy_from(self, backbone: nn.Module) -> None:
        """Copy parameters and buffers of ``backbone``."""
        self.backbone.load_state_dict(backbone.state_dict())
        self._set_ready()

    def _set_ready(self) -> None:
        self.ready.fill_(1)
        self.is_ready = True


def check_gram_crops(crops: Tensor | None, teacher: str) -> None:
    """Raise a ``ValueError`` unless a frozen Gram teacher has crops, and the EMA teacher none."""
    if (crops is not None) != (teacher == "frozen"):
        raise ValueError(
            f"gram teacher={teacher!r} and a batch {'without' if crops is None else 'with'} "
            "gram_crops: a frozen Gram teacher needs its own crops (gram_size of the multi-crop "
            "transform), the EMA teacher has none"
        )


def _mirror_ready(module: GramTeacher, _incompatible_keys: object) -> None:
    module.is_ready = bool(module.ready)


def gram_term(
    student: Tensor,
    teacher: Tensor,
    batch: Mapping[str, Tensor],
    options: Mapping[str, Any],
) -> tuple[Tensor, dict[str, Tensor]]:
    """Gram loss of the global crops, and its statistics if they are asked for.

    Args:
        student: (2B, N, D) normed patch tokens of the student.
        teacher: (2B, N, D) patch tokens of the Gram teacher on the student's grid.
        batch: holds ``masks`` and ``mask_indices``.
        options: settings of the term, see ``DINOv3``.

    Returns:
        The loss, and a dict that is empty or holds ``gram_loss_masked`` and
        ``gram_loss_unmasked``: the loss over all masked, and over all visible patches of the batch.
    """
    settings = {
        key: options[key] for key in ("normalized", "remove_neg", "remove_only_teacher_neg")
    }

    def loss_of(tokens: str) -> Tensor:
        rows = _rows(tokens, batch)
        return gram_loss(
            student.flatten(0, 1).index_select(0, rows),
            teacher.flatten(0, 1).index_select(0, rows),
            img_level=False,
            **settings,
        )

    if options["tokens_used"] == "all":
        loss = gram_loss(student, teacher, img_level=options["img_level"], **settings)
    else:
        loss = loss_of(options["tokens_used"])
    if not options["compute_stats"]:
        return loss, {}
    with torch.no_grad():
        return loss, {f"gram_loss_{tokens}": loss_of(tokens) for tokens in ("masked", "unmasked")}


def _rows(tokens: str, batch: Mapping[str, Tensor]) -> Tensor:
    """Indices of the masked or of the visible patches; their number is known without a read."""
    masks, masked = batch["masks"], batch["mask_indices"]
    if tokens == "masked":
        return masked
    return masks.flatten().argsort(stable=True)[: masks.numel() - len(masked)]


def resize_to_student(
    tokens: Tensor,
    teacher_images: Tensor,
    student_images: Tensor,
    token_stride: int,
    options: Mapping[str, Any],
) -> Tensor:
    """Bring the teacher's tokens of ``teacher_images`` onto the grid of ``student_images``."""
    source, target = (
        (images.shape[-2] // token_stride, images.shape[-1] // token_stride)
        for images in (teacher_images, student_images)
    )
    return resize_tokens(
        tokens.float(),
        source,
        target,
        method=options["resize_method"],
        antialias=options["resize_antialias"],
    )
