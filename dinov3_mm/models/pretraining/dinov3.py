"""The DINOv3 self-supervised algorithm (arXiv 2508.10104 sections 3 and 4)."""

import copy
import os
from collections.abc import Mapping
from contextlib import AbstractContextManager
from typing import Any

import torch
from mmengine.logging import print_log
from mmengine.model import BaseModel
from mmengine.model.weight_init import initialize
from mmengine.registry import MODELS
from torch import Tensor, nn

from dinov3_mm.errors import hint

from .diagnostics import diagnose
from .distillation import DistillationTeacher, TeacherFeatures
from .gram_teacher import GramTeacher, check_gram_crops, gram_term, resize_to_student
from .several_teachers import (
    DistillationTeachers,
    SeveralComparison,
    fit_student,
    resolve_distillation,
)
from .student import (
    build_comparison,
    build_student,
    check_batch_norm,
    check_mask_token,
    follow,
    load_network,
)
from .terms import (
    DINO_DEFAULTS,
    IBOT_DEFAULTS,
    StudentView,
    TeacherView,
    as_scalar,
    check_compute_dtype,
    count_local_crops,
    image_terms,
    resolve_gram,
    resolve_koleo,
    resolve_options,
)

# What hooks may write for a step; numbers, or tensors on the device that are not read.
STEP_VALUES = ("teacher_temp", "dino_local_weight", "gram_weight")


@MODELS.register_module()
class DINOv3(BaseModel):
    """Self-distillation of crops (DINO) and masked patches (iBOT), KoLeo and Gram anchoring.

    ``student`` and ``teacher`` hold ``backbone``, ``dino_head`` and ``ibot_head``. The teacher
    starts as a copy of the student and follows it through :meth:`update_teacher`; hooks give each
    step its values through :meth:`set_step`. Parameters stay float32.

    The loss is ``w_dino * (c_loc * lambda * L_local + c_glob * L_global) + w_koleo * 2 * L_koleo +
    w_ibot * L_ibot + w_gram * L_gram``, where ``c_loc`` and ``c_glob`` are the shares of the crop
    pairs (8/9 and 1/9 for eight local crops).

    Args:
        backbone: config of the backbone, or the module: ``embed_dims``, ``token_stride`` (pixels
            between neighbouring patch tokens) and ``forward_tokens(images, masks)`` as in
            ``DINOv3ViT``.
        dino_head: config of the head on CLS tokens; ``in_dims`` follows from the backbone.
        ibot_head: config of the head on masked patches.
        dino: ``weight`` (1), ``global_ignore_diagonal`` (True: a global crop is not compared with
            itself).
        ibot: ``weight`` (1).
        koleo: ``weight`` (0.1), ``distributed`` (False: neighbours are searched in the rank's own
            batch), and for ``distributed``: ``topk`` (1), ``group_size`` (None: the global batch).
            With weight 0 the term is not computed and reads 0.
        gram: None for no Gram term, else a dict: ``weight`` (1), ``teacher`` ('frozen': a backbone
            of its own, which ``GramAnchorHook`` fills and refreshes, on ``gram_crops``; 'ema': the
            EMA teacher on the global crops), ``normalized`` (True), ``img_level`` (True),
            ``remove_neg``, ``remove_only_teacher_neg`` (False), ``tokens_used`` ('all', 'masked',
            'unmasked'), ``compute_stats`` (False), ``resize_method`` ('bicubic', 'bilinear'),
            ``resize_antialias`` (False).
        distillation: None, or a frozen teacher, which takes the place of the EMA teacher in all
            terms: ``backbone``, ``dino_head`` and ``ibot_head`` as configs, and perhaps
            ``resolution_scale``, the factor by which its crops are smaller (by default the one that
            gives both networks the same grid of tokens). ``DistillationHook`` reads its weights.
            The student's ``num_prototypes`` are the teacher's; the EMA teacher still follows the
            student and is what is evaluated and exported. A :class:`DistillationTeacher` that lives
            elsewhere can be given too. ``teachers=dict(NAME=dict(...))`` alone describes several,
            each with a ``weight`` (by default one over their number): the student has a DINO and an
            iBOT head for each, and their terms are added up by weight.
        student_temp: temperature of the student's softmax.
        compute_dtype: 'fp32', or 'bf16' for bfloat16 autocast in backbones and heads; losses are
            always float32.
        prototype_chunk_size: compare student and teacher in chunks of this many prototypes, and
            recompute their logits instead of storing them: the losses are the same to rounding and
            need no memory that grows with the number of prototypes times that of the samples.
            None compares whole matrices of logits.
        mask_student: hide the masked patches from the student, which needs a backbone with a
            ``mask_token``. Off, the student sees all patches and the iBOT term is still evaluated
            on the masked ones: the way of the ConvNeXts, and of distillation. None: hidden unless
            there is a distillation teacher.
        start_from: a training state or teacher export with both heads, in any format that
            ``load_weights`` reads: student and teacher start from it (high-resolution stage).
        data_preprocessor: default ``MultiCropPreprocessor`` with ImageNet statistics.
        init_cfg: MMEngine initialisation config for the whole model, applied to the initialised
            student before the teacher is copied from it.

    Attributes:
        collect_diagnostics (bool): add the values of
            :func:`~dinov3_mm.models.pretraining.diagnostics.diagnose` to the losses: of the EMA
            teacher's features, in a distillation of the student's.
        gram (dict | None): the settings of the Gram term, completed.
        step_values (dict): what :meth:`set_step` was given.

    Raises:
        ValueError: settings that are unknown, out of range or contradict each other; a backbone
            with batch normalisation, through which the images of a batch would see each other;
            ``mask_student`` with a backbone that cannot be masked; a distillation teacher with
            other prototypes or another grid of tokens, or beside a Gram term.
    """

    def __init__(
        self,
        backbone: dict | nn.Module,
        dino_head: dict,
        ibot_head: dict,
        *,
        dino: dict | None = None,
        ibot: dict | None = None,
        koleo: dict | None = None,
        gram: dict | None = None,
        distillation: dict | DistillationTeacher | None = None,
        student_temp: float = 0.1,
        compute_dtype: str = "fp32",
        prototype_chunk_size: int | None = None,
        mask_student: bool | None = None,
        start_from: str | os.PathLike | None = None,
        data_preprocessor: dict | nn.Module | None = None,
        init_cfg: dict | list[dict] | None = None,
    ) -> None:
        super().__init__(data_preprocessor or dict(type="MultiCropPreprocessor"), init_cfg)
        self.dino = resolve_options("dino", dino, DINO_DEFAULTS)
        self.ibot = resolve_options("ibot", ibot, IBOT_DEFAULTS)
        self.koleo = resolve_koleo(koleo)
        self.gram = resolve_gram(gram)
        if student_temp <= 0:
            raise ValueError(f"student_temp must be positive, got {student_temp}")
        self.student_temp = student_temp
        self.compute_dtype = check_compute_dtype(compute_dtype)
        self.comparison = build_comparison(prototype_chunk_size)
        self.mask_student = distillation is None if mask_student is None else mask_student
        self.start_from = start_from
        self.collect_diagnostics = False
        self.step_values: dict[str, float | Tensor] = {}

        teacher, scale = resolve_distillation(distillation, has_gram=self.gram is not None)
        if teacher is not None:
            dino_head = teacher.head_config(dino_head, "dino_head")
            ibot_head = teacher.head_config(ibot_head, "ibot_head")
        if isinstance(teacher, DistillationTeachers):
            self.comparison = SeveralComparison(self.comparison, teacher.weights)
        self.student = build_student(backbone, dino_head, ibot_head)
        check_batch_norm(self.student, has_frozen_teacher=teacher is not None)
        if self.mask_student:
            check_mask_token(self.student.backbone)
        self.teacher = copy.deepcopy(self.student).requires_grad_(False)
        if self.gram is not None and self.gram["teacher"] == "frozen":
            self.gram_teacher = GramTeacher(self.student.backbone)
        if teacher is not None:
            self.resolution_scale = fit_student(self.student, teacher, scale)
            if teacher is not distillation:
                self.distillation_teacher = teacher
        self.listen_to(teacher)
        self.train()

    def listen_to(self, source: DistillationTeacher | TeacherFeatures | None) -> None:
        """Take the coming targets from ``source``; None: from the EMA teacher."""
        # Not a child by this name: it may be part of another model.
        object.__setattr__(self, "target_source", source)

    def init_weights(self) -> None:
        """Initialise the student (and what its ``init_cfg`` loads), then copy it to the teacher."""
        for module in self.student.values():
            module.init_weights()
        if self.init_cfg:
            initialize(self, self.init_cfg)
        if self.start_from is not None:
            load_network(self.student, self.start_from, what="start_from")
        elif self.student.backbone.init_cfg:
            print_log("heads: random; teacher: a copy of the student", logger="current")
        self.teacher.load_state_dict(self.student.state_dict())
        # One that has been given weights keeps them.
        if hasattr(self, "gram_teacher") and not self.gram_teacher.is_ready:
            self.gram_teacher.backbone.load_state_dict(self.student.backbone.state_dict())
        if hasattr(self, "distillation_teacher"):
            self.distillation_teacher.init_weights()
        self._is_init = True

    def train(self, mode: bool = True) -> "DINOv3":
        """Set the mode of the student; the teachers always stay in eval mode."""
        super().train(mode)
        self.teacher.eval()
        if hasattr(self, "gram_teacher"):
            self.gram_teacher.eval()
        return self

    def update_teacher(self, momentum: float | Tensor) -> None:
        """Move the EMA teacher's parameters: ``m * teacher + (1 - m) * student``.

        Of its buffers only the running statistics of synced batch norms follow.

        Args:
            momentum: ``m``, a number or a scalar tensor, which is not read to the host.
        """
        follow(self.teacher, self.student, momentum)

    @property
    def teacher_backbone(self) -> nn.Module:
        """The EMA teacher's backbone: what is evaluated and exported."""
        return self.teacher.backbone

    @property
    def gram_teacher_ready(self) -> bool:
        """Whether the Gram term has a teacher with weights."""
        if self.gram is None:
            return False
        return self.gram["teacher"] == "ema" or self.gram_teacher.is_ready

    def load_gram_teacher(self, source: str | os.PathLike | Mapping[str, Tensor]) -> str:
        """Give the frozen Gram teacher weights of a file or state dict; see :class:`GramTeacher`.

        Returns:
            One line about what was loaded.
        """
        return self._frozen_gram_teacher().load(source)

    def copy_teacher_to_gram(self) -> None:
        """Replace the frozen Gram teacher, buffers included, by the EMA teacher of the moment."""
        self._frozen_gram_teacher().copy_from(self.teacher.backbone)

    def _frozen_gram_teacher(self) -> GramTeacher:
        if not hasattr(self, "gram_teacher"):
            raise ValueError(
                "the model has no Gram teacher of its own; build it with "
                "gram=dict(teacher='frozen', ...)"
            )
        return self.gram_teacher

    def set_step(self, **values: float | Tensor) -> None:
        """Set the scalars of the coming steps; each stays until it is set again.

        Args:
            **values: ``teacher_temp`` (needed to train), ``dino_local_weight`` (1 unless set),
                ``gram_weight`` (``gram['weight']`` unless set).

        Raises:
            ValueError: an unknown name.
        """
        for name in values:
            if name not in STEP_VALUES:
                raise ValueError(f"set_step has no value {name!r}; {hint(name, STEP_VALUES)}")
        self.step_values.update(values)

    def forward(
        self,
        inputs: Mapping[str, Tensor] | Tensor,
        data_samples: None = None,
        mode: str = "tensor",
    ) -> Any:
        """Losses of a batch, or features of images.

        Args:
            inputs: the preprocessor's batch; for ``mode='tensor'`` also normalised images.
            data_samples: not used.
            mode: 'loss' for :meth:`loss`, 'tensor' for :meth:`extract_feat` of the images or of
                the batch's global crops.

        Raises:
            ValueError: another mode.
        """
        if mode == "loss":
            return self.loss(inputs)
        if mode == "tensor":
            return self.extract_feat(
                inputs if isinstance(inputs, Tensor) else inputs["global_crops"]
            )
        raise ValueError(f"mode must be 'loss' or 'tensor', got {mode!r}")

    def extract_feat(self, images: Tensor) -> tuple:
        """Features of the EMA teacher's backbone: its ``forward`` of normalised (B, C, H, W)."""
        with self._autocast(images):
            return self.teacher_backbone(images)

    def parse_losses(self, losses: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the loss to back-propagate and all values, detached and still on the device."""
        return losses["loss"], {name: value.detach() for name, value in losses.items()}

    def loss(self, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """All terms of a preprocessed batch, as scalars on the device.

        Returns:
            ``loss`` (the weighted sum, with gradient); detached and unweighted
            ``dino_local_loss``, ``dino_global_loss``, ``koleo_loss``, ``ibot_loss`` and
            ``dino_local_weight``; with several teachers the losses of each as
            ``teacher/NAME/...``; with a Gram term ``gram_loss``, ``gram_weight`` (and
            ``gram_loss_masked``, ``gram_loss_unmasked`` with ``compute_stats``); with
            ``collect_diagnostics`` the ``diag/...`` values.

        Raises:
            RuntimeError: a hook has not done its part (:meth:`set_step`, Gram teacher).
            ValueError: a batch whose parts do not fit.
        """
        num_local = count_local_crops(batch)
        if "teacher_temp" not in self.step_values:
            raise RuntimeError(
                "training needs teacher_temp: add dict(type='TeacherEMAHook', momentum=..., "
                "teacher_temp=...) to custom_hooks, or call model.set_step(teacher_temp=...)"
            )
        teacher = self._run_teacher(batch)
        student = self._run_student(batch)
        with torch.autocast(student.global_cls.device.type, enabled=False):
            total, logs = image_terms(
                teacher,
                student,
                batch,
                comparison=self.comparison,
                num_local=num_local,
                local_weight=self.step_values.get("dino_local_weight", 1.0),
                student_temp=self.student_temp,
                dino=self.dino,
                ibot=self.ibot,
                koleo=self.koleo,
            )
            if self.gram is not None:
                gram_total, gram_logs = self._gram_term(teacher, student, batch)
                total = total if gram_total is None else total + gram_total
                logs.update(gram_logs)
            if self.collect_diagnostics:
                probabilities = self.comparison.probabilities(teacher.cls_targets)
                seen = (teacher.cls, teacher.patches)
                if self.target_source is not None:
                    seen = (student.global_cls.detach(), student.patches.detach())
                logs.update(diagnose(*seen, probabilities))
        return {"loss": total, **{name: value.detach() for name, value in logs.items()}}

    @torch.no_grad()
    def _run_teacher(self, batch: Mapping[str, Tensor]) -> TeacherView:
        """Teacher on the unmasked global crops; heads and centring of what is compared."""
        temp, autocast = self.step_values["teacher_temp"], self._autocast(batch["global_crops"])
        if self.target_source is not None:
            settings = (self.resolution_scale, self.comparison, temp, autocast)
            return TeacherView(None, None, *self.target_source.targets(batch, *settings))
        with autocast:
            tokens = self.teacher.backbone.forward_tokens(batch["global_crops"])
            masked = tokens.patches.flatten(0, 1).index_select(0, batch["mask_indices"])
            patch_scores = self.comparison.scores(self.teacher.ibot_head, masked)
            cls_scores = self.comparison.scores(self.teacher.dino_head, tokens.cls)
        targets = (self.comparison.assignments(each, temp) for each in (cls_scores, patch_scores))
        return TeacherView(tokens.cls, tokens.patches, *targets)

    def _run_student(self, batch: Mapping[str, Tensor]) -> StudentView:
        """Student on masked global crops and local crops, in one pass each of backbone and head."""
        images = [batch["global_crops"], batch["local_crops"]]
        masks = [batch["masks"] if self.mask_student else None, None]
        with self._autocast(images[0]):
            tokens, local_tokens = self.student.backbone.forward_tokens(images, masks)
            masked = tokens.patches.flatten(0, 1).index_select(0, batch["mask_indices"])
            patch_scores = self.comparison.scores(self.student.ibot_head, masked)
            all_cls = torch.cat((tokens.cls, local_tokens.cls))
            cls_scores = self.comparison.scores(self.student.dino_head, all_cls)
        parts = self.comparison.split(cls_scores, (len(tokens.cls), len(local_tokens.cls)))
        return StudentView(tokens.cls, tokens.patches, *parts, patch_scores)

    def _gram_term(
        self, teacher: TeacherView, student: StudentView, batch: Mapping[str, Tensor]
    ) -> tuple[Tensor | None, dict[str, Tensor]]:
        """Weighted Gram term and its values; None while it has neither weight nor teacher."""
        weight = self.step_values.get("gram_weight", self.gram["weight"])
        logs = {"gram_weight": as_scalar(weight, student.patches)}
        if not self.gram_teacher_ready:
            if isinstance(weight, Tensor) or weight != 0:
                raise RuntimeError(
                    f"the Gram term has weight {weight} but its teacher has no weights: add "
                    "dict(type='GramAnchorHook', checkpoint=... or load_ema_at=...) to "
                    "custom_hooks, or call model.load_gram_teacher(FILE)"
                )
            return None, {**logs, "gram_loss": as_scalar(0.0, student.patches)}
        targets = self._gram_targets(teacher, batch)
        loss, stats = gram_term(student.patches, targets, batch, self.gram)
        return weight * loss, {**logs, "gram_loss": loss, **stats}

    @torch.no_grad()
    def _gram_targets(self, teacher: TeacherView, batch: Mapping[str, Tensor]) -> Tensor:
        """Patch tokens (2B, N, D) that the student's Gram matrices are compared with."""
        crops = batch.get("gram_crops")
        check_gram_crops(crops, self.gram["teacher"])
        if crops is None:
            return teacher.patches
        backbone = self.gram_teacher.backbone
        with self._autocast(crops):
            tokens = backbone.forward_tokens(crops).patches
        return resize_to_student(
            tokens, crops, batch["global_crops"], backbone.token_stride, self.gram
        )

    def _autocast(self, images: Tensor) -> AbstractContextManager:
        return torch.autocast(
            images.device.type, torch.bfloat16, enabled=self.compute_dtype == "bf16"
        )
