"""The frozen teacher of a distillation (arXiv 2508.10104 section 5.2)."""

import math
import os
from collections.abc import Mapping
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dinov3_mm.checkpoints.load import gather_whole
from dinov3_mm.errors import hint

from ..backbones import TokenOutput
from .student import HEADS, Comparison, build_student, load_network

RANDOM = "random"
WHO = "the distillation teacher"
SETTINGS = ("backbone", "dino_head", "ibot_head", "resolution_scale")


class DistillationTeacher(nn.ModuleDict):
    """``backbone``, ``dino_head`` and ``ibot_head`` that are never trained.

    Its tensors are no part of a state dict: a training checkpoint does not repeat the teacher's
    file, which is read again when the run is resumed.

    Args:
        backbone: config of the teacher's backbone, or the module.
        dino_head: config of its head on CLS tokens.
        ibot_head: config of its head on patches.
    """

    def __init__(
        self, backbone: Mapping[str, Any] | nn.Module, dino_head: Mapping, ibot_head: Mapping
    ) -> None:
        network = build_student(backbone, dino_head, ibot_head)
        super().__init__(dict(network.items()))
        self.requires_grad_(False).eval()
        self.is_ready = False
        self.register_state_dict_post_hook(_leave_out)
        self.register_load_state_dict_post_hook(_not_missing)

    def train(self, mode: bool = True) -> "DistillationTeacher":
        """Stay in eval mode."""
        return super().train(False)

    def init_weights(self, offset: int = 1) -> None:
        """Draw random weights without touching the generator that the student draws from.

        Args:
            offset: other ones for each value.
        """
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(torch.initial_seed() + offset)
            for module in self.values():
                module.init_weights()

    def load(self, path: str | os.PathLike) -> str:
        """Take backbone and both heads of a training checkpoint or teacher export, strictly.

        Args:
            path: the file; 'random' accepts the initial weights as they are, for tests.

        Returns:
            One line about what was loaded.

        Raises:
            FileNotFoundError: no such file.
            ValueError: weights that lack a head or do not fit.
        """
        is_random = path == RANDOM
        report = "random weights" if is_random else load_network(self, path, what=WHO)
        self.is_ready = True
        return report

    def targets(
        self,
        batch: Mapping[str, Tensor],
        scale: float,
        comparison: Comparison,
        temp: float | Tensor,
        autocast: AbstractContextManager,
    ) -> tuple[Any, Any]:
        """Assignments of CLS and of the masked patches of a batch.

        Args:
            batch: holds ``global_crops``, ``masks`` and ``mask_indices``.
            scale: by which the teacher's crops are smaller.
            comparison: how student and teacher are compared.
            temp: temperature of the teacher.
            autocast: entered for the forward pass.
        """
        self.require_ready()
        with autocast:
            scores = self._scores(batch, scale, comparison)
        return tuple(comparison.assignments(each, temp) for each in scores)

    def _scores(
        self, batch: Mapping[str, Tensor], scale: float, comparison: Comparison
    ) -> tuple[Any, Any]:
        tokens = self.see(batch["global_crops"], scale, batch["masks"].shape[1])
        masked = tokens.patches.flatten(0, 1).index_select(0, batch["mask_indices"])
        patch_scores = comparison.scores(self["ibot_head"], masked)
        return comparison.scores(self["dino_head"], tokens.cls), patch_scores

    def project(
        self, crops: Tensor, scale: float, num_patches: int, masks: Mapping[str, Tensor] | None
    ) -> tuple[Tensor, Tensor]:
        """Bottleneck features, in the dtype in which heads compute.

        Args:
            crops: normalised global crops (2B, C, S, S).
            scale: by which the teacher's crops are smaller.
            num_patches: of a crop.
            masks: holds ``mask_indices``; None projects all patches.

        Returns:
            CLS (2B, b), and patches: masked ones (M, b'), or all (2B, N, b').
        """
        tokens = self.see(crops, scale, num_patches)
        patches = tokens.patches
        if masks is not None:
            patches = patches.flatten(0, 1).index_select(0, masks["mask_indices"])
        kind = crops.device.type
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else crops.dtype
        cls = self["dino_head"].project(tokens.cls).to(dtype)
        return cls, self["ibot_head"].project(patches).to(dtype)

    def see(self, crops: Tensor, scale: float, num_patches: int) -> TokenOutput:
        """Tokens of down-sampled crops; there must be ``num_patches`` of each crop.

        Raises:
            ValueError: another number of patches.
        """
        tokens = self["backbone"].forward_tokens(downsample(crops, scale))
        if tokens.patches.shape[1] != num_patches:
            raise ValueError(
                f"the distillation teacher gives {tokens.patches.shape[1]} patch tokens per global "
                f"crop, the masks have {num_patches}: student and teacher must see the same grid"
            )
        return tokens

    def head_config(self, head: Mapping[str, Any], name: str) -> dict[str, Any]:
        """A student's head config, with the teacher's number of prototypes if it gives none."""
        return with_prototypes(head, self[name])

    def require_ready(self) -> None:
        """Raise a ``RuntimeError`` while the teacher has no weights."""
        if not self.is_ready:
            raise RuntimeError(
                "the distillation teacher has no weights: add dict(type='DistillationHook', "
                "checkpoint=FILE) to custom_hooks, or call "
                "model.distillation_teacher.load(FILE)"
            )

    @torch.no_grad()
    def fingerprint(self) -> dict[str, float]:
        """Mean absolute value of each network's parameters, by which a resumed run knows them."""
        prints = {}
        for name, module in self.items():
            sums = [gather_whole(p.abs().sum(dtype=torch.float64)) for p in module.parameters()]
            count = sum(p.numel() for p in module.parameters())
            prints[name] = float(torch.stack(sums).sum()) / count
        return prints


class TeacherFeatures:
    """What is left of a teacher after its forward pass: features that wait for the prototypes.

    It stands in for the teacher in a student's step. Assignments are kept, so that students that
    are compared in the same way share them.

    Args:
        cls: bottleneck features of CLS (2B, b).
        patches: of the masked patches (M, b').
        teacher: holds the prototypes.
    """

    def __init__(self, cls: Tensor, patches: Tensor, teacher: DistillationTeacher) -> None:
        self.cls, self.patches, self.teacher = cls, patches, teacher
        self._kept: dict[tuple, tuple[Any, Any]] = {}

    def targets(
        self,
        batch: Mapping[str, Tensor],
        scale: float,
        comparison: Comparison,
        temp: float | Tensor,
        autocast: AbstractContextManager,
    ) -> tuple[Any, Any]:
        """As :meth:`DistillationTeacher.targets`; the batch was seen already."""
        key = (comparison.chunk_size, temp)
        if isinstance(temp, Tensor) or key not in self._kept:
            with autocast:
                scores = (
                    comparison.projected_scores(self.teacher["dino_head"], self.cls),
                    comparison.projected_scores(self.teacher["ibot_head"], self.patches),
                )
            self._kept[key] = tuple(comparison.assignments(each, temp) for each in scores)
        return self._kept[key]


def build_teacher(given: Mapping[str, Any]) -> tuple[DistillationTeacher, float | None]:
    """A teacher and its ``resolution_scale``.

    Raises:
        ValueError: an unknown or missing setting.
    """
    for key in given:
        if key not in SETTINGS:
            known = (*SETTINGS, "teachers")
            raise ValueError(f"distillation has no setting {key!r}; {hint(key, known)}")
    missing = [key for key in SETTINGS[:3] if given.get(key) is None]
    if missing:
        raise ValueError(f"distillation needs the teacher's {' and '.join(missing)}")
    parts = {key: value for key, value in given.items() if key != "resolution_scale"}
    return DistillationTeacher(**parts), given.get("resolution_scale")


def check_student(
    student: nn.ModuleDict, teacher: DistillationTeacher, scale: float | None
) -> float:
    """Compare the prototypes and token grids of both networks.

    Args:
        student: ``backbone``, ``dino_head``, ``ibot_head``.
        teacher: the frozen network.
        scale: factor by which the teacher's crops are smaller, None for the one that fits.

    Returns:
        The factor.

    Raises:
        ValueError: different numbers of prototypes, or a factor that does not fit.
    """
    for name in HEADS:
        own, wanted = student[name].num_prototypes, teacher[name].num_prototypes
        if own != wanted:
            raise ValueError(
                f"{name}: the student has {own} prototypes, the distillation teacher {wanted}; "
                "student and teacher are compared prototype by prototype: set num_prototypes of "
                "the student to the teacher's, or leave it out. Hidden and bottleneck sizes may "
                "differ"
            )
    strides = student["backbone"].token_stride, teacher["backbone"].token_stride
    fitting = strides[0] / strides[1]
    if scale is not None and not math.isclose(scale, fitting):
        raise ValueError(
            f"resolution_scale={scale}, but the student's tokens are {strides[0]} pixels apart and "
            f"the teacher's {strides[1]}: only {fitting:g} gives both the same grid of tokens; "
            "leave resolution_scale out"
        )
    return fitting


def with_prototypes(head: Mapping[str, Any], teacher_head: nn.Module) -> dict[str, Any]:
    """A student's head config, with the teacher's number of prototypes where it gives none."""
    return {"num_prototypes": teacher_head.num_prototypes, **head}


def downsample(crops: Tensor, scale: float) -> Tensor:
    """Crops (B, C, S, S) for a teacher whose tokens are ``scale`` times as dense.

    Raises:
        ValueError: a side that the scale does not divide.
    """
    if scale == 1:
        return crops
    size = [round(side / scale) for side in crops.shape[-2:]]
    if any(not math.isclose(new * scale, side) for new, side in zip(size, crops.shape[-2:])):
        raise ValueError(
            f"global crops of {tuple(crops.shape[-2:])} pixels divided by {scale:g} are no whole "
            "number of pixels for the teacher; choose another global_size"
        )
    return F.interpolate(crops, size, mode="bilinear", antialias=True, align_corners=False)


def _leave_out(module: nn.Module, state_dict: dict, prefix: str, _metadata: dict) -> None:
    for key in [key for key in state_dict if key.startswith(prefix)]:
        del state_dict[key]


def _not_missing(_module: nn.Module, incompatible_keys: Any) -> None:
    missing = incompatible_keys.missing_keys
    missing[:] = [key for key in missing if not key.startswith("distillation_teacher.")]
