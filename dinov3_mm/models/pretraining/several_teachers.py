"""Several frozen teachers of one student, which has heads of its own for each of them.

The backbone learns what all teachers agree to see, as in agglomerative models (AM-RADIO, arXiv
2312.06709); each comparison is that of DINOv3's distillation from one teacher.
"""

import os
from collections.abc import Iterable, Mapping
from contextlib import AbstractContextManager
from numbers import Real
from typing import Any

import torch
from mmengine.registry import MODELS
from torch import Tensor, nn

from dinov3_mm.errors import hint

from .distillation import RANDOM, DistillationTeacher, build_teacher, check_student, with_prototypes
from .groups import check_name
from .student import HEADS, ChunkedComparison, Projections, WholeComparison

LOG_PREFIX = "teacher/"


class DistillationTeachers(nn.ModuleDict):
    """A :class:`DistillationTeacher` by name, with the weight of its terms in the loss.

    Args:
        given: by name ``backbone``, ``dino_head`` and ``ibot_head`` of a teacher, perhaps its
            ``resolution_scale`` and its ``weight``: of its terms in the loss, by default one over
            the number of teachers.

    Attributes:
        weights (dict): of each teacher.

    Raises:
        ValueError: no teacher, a bad name, setting or weight.
    """

    def __init__(self, given: Mapping[str, Mapping[str, Any]]) -> None:
        if not isinstance(given, Mapping) or not given:
            raise ValueError(
                "distillation.teachers names each teacher: dict(NAME=dict(backbone=..., "
                f"dino_head=..., ibot_head=...), ...); got {given!r}"
            )
        super().__init__()
        self.weights: dict[str, float] = {}
        self._scales: dict[str, float | None] = {}
        for name, settings in given.items():
            check_name(name, "teacher")
            if hasattr(self, name) or hasattr(TeacherHeads, name):
                raise ValueError(
                    f"{name!r} cannot be the name of a teacher: it means something here"
                )
            settings = dict(settings)
            weight = settings.pop("weight", 1 / len(given))
            if not isinstance(weight, Real) or weight <= 0:
                raise ValueError(f"teacher {name!r}: weight must be positive, got {weight!r}")
            try:
                self[name], self._scales[name] = build_teacher(settings)
            except (TypeError, ValueError) as error:
                raise type(error)(f"teacher {name!r}: {error}") from error
            self.weights[name] = float(weight)

    @property
    def is_ready(self) -> bool:
        """Whether every teacher has its weights."""
        return all(teacher.is_ready for teacher in self.values())

    @is_ready.setter
    def is_ready(self, value: bool) -> None:
        for teacher in self.values():
            teacher.is_ready = value

    def init_weights(self) -> None:
        """Draw random weights, other ones for each teacher."""
        for index, teacher in enumerate(self.values()):
            teacher.init_weights(1 + index)

    def load(self, files: Mapping[str, str | os.PathLike] | str) -> str:
        """Give each teacher the weights of its file; see :meth:`DistillationTeacher.load`.

        Args:
            files: by name; 'random' for all at once.

        Raises:
            ValueError: files of other teachers, or not of all.
        """
        if files == RANDOM:
            files = dict.fromkeys(self, RANDOM)
        check_teacher_files(files, self)
        reports = []
        for name, teacher in self.items():
            try:
                reports.append(f"{name}: {teacher.load(files[name])}")
            except ValueError as error:
                raise ValueError(f"teacher {name!r}: {error}") from error
        return "; ".join(reports)

    def head_config(self, head: Mapping[str, Any], name: str) -> dict[str, Any]:
        """A student's head config for each teacher, with the teacher's number of prototypes."""
        return {
            "type": "TeacherHeads",
            "heads": {each: with_prototypes(head, teacher[name]) for each, teacher in self.items()},
        }

    def fit(self, student: nn.ModuleDict) -> dict[str, float]:
        """Compare the student with each teacher; by name, how much smaller its crops are.

        Raises:
            ValueError: see :func:`check_student`.
        """
        scales = {}
        for name, teacher in self.items():
            part = {"backbone": student["backbone"], **{h: student[h][name] for h in HEADS}}
            try:
                scales[name] = check_student(part, teacher, self._scales[name])
            except ValueError as error:
                raise ValueError(f"teacher {name!r}: {error}") from error
        return scales

    def targets(
        self,
        batch: Mapping[str, Tensor],
        scale: Mapping[str, float],
        comparison: "SeveralComparison",
        temp: float | Tensor,
        autocast: AbstractContextManager,
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        """As :meth:`DistillationTeacher.targets`, by teacher."""
        both = {
            name: teacher.targets(batch, scale[name], comparison.inner, temp, autocast)
            for name, teacher in self.items()
        }
        return tuple({name: pair[index] for name, pair in both.items()} for index in (0, 1))

    def fingerprint(self) -> dict[str, float]:
        """By which a resumed run knows the teachers."""
        return {
            f"{name}.{part}": value
            for name, teacher in self.items()
            for part, value in teacher.fingerprint().items()
        }


@MODELS.register_module()
class TeacherHeads(nn.Module):
    """Heads of the student for several teachers, all on the same features.

    Args:
        in_dims: width of the features.
        heads: config of the head for each teacher, by the teacher's name.
    """

    def __init__(self, in_dims: int, heads: Mapping[str, Mapping[str, Any]]) -> None:
        super().__init__()
        for name, cfg in heads.items():
            self.add_module(name, MODELS.build({**cfg, "in_dims": in_dims}))

    def __getitem__(self, name: str) -> nn.Module:
        """Head for the teacher of this name."""
        return self.get_submodule(name)

    def init_weights(self) -> None:
        """Initialise every head."""
        for head in self.children():
            head.init_weights()

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        """Logits for each teacher: (..., in_dims) to (..., its number of prototypes)."""
        return {name: head(x) for name, head in self.named_children()}

    def project_and_prototypes(self, x: Tensor) -> dict[str, tuple[Tensor, Tensor]]:
        """The factors of the logits for each teacher; see :class:`DINOv3Head`."""
        return {name: head.project_and_prototypes(x) for name, head in self.named_children()}


class SeveralComparison:
    """A comparison with each teacher: scores, assignments and losses are dicts by name.

    Args:
        inner: with one teacher.
        weights: of the teachers.
    """

    def __init__(
        self, inner: WholeComparison | ChunkedComparison, weights: Mapping[str, float]
    ) -> None:
        self.inner, self.weights = inner, weights

    def scores(self, head: TeacherHeads, features: Tensor) -> dict[str, Any]:
        """Scores of features (n, D)."""
        if self.inner.chunk_size is None:
            return head(features)
        return {n: Projections(*pair) for n, pair in head.project_and_prototypes(features).items()}

    def split(self, scores: Mapping[str, Any], sizes: tuple[int, ...]) -> list[dict[str, Any]]:
        """Rows of the scores, apart."""
        parts = {name: self.inner.split(each, sizes) for name, each in scores.items()}
        return [{name: part[index] for name, part in parts.items()} for index in range(len(sizes))]

    def probabilities(self, assignments: Mapping[str, Any]) -> dict[str, Tensor]:
        """Assignments as matrices (n, K)."""
        return {name: self.inner.probabilities(each) for name, each in assignments.items()}

    def dino(self, scores: Mapping, assignments: Mapping, **settings: Any) -> dict[str, Tensor]:
        """See :meth:`WholeComparison.dino`."""
        return {n: self.inner.dino(scores[n], assignments[n], **settings) for n in self.weights}

    def ibot(
        self,
        scores: Mapping,
        assignments: Mapping,
        weights: Tensor,
        num_images: int,
        **settings: Any,
    ) -> dict[str, Tensor]:
        """See :meth:`WholeComparison.ibot`."""
        return {
            name: self.inner.ibot(scores[name], assignments[name], weights, num_images, **settings)
            for name in self.weights
        }

    def combine(
        self, losses: Mapping[str, Mapping[str, Tensor]]
    ) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Weighted sums over the teachers, and the losses of each as ``teacher/NAME/LOSS``."""
        sums = {
            term: torch.stack([self.weights[n] * each for n, each in of.items()]).sum()
            for term, of in losses.items()
        }
        apart = {
            f"{LOG_PREFIX}{name}/{term}": losses[term][name]
            for name in self.weights
            for term in losses
        }
        return sums, apart


def check_teacher_files(files: Any, names: Iterable[str]) -> None:
    """Raise a ``ValueError`` unless there is a file for each teacher and no other."""
    names = tuple(names)
    if not isinstance(files, Mapping):
        raise ValueError(
            f"the teachers {', '.join(names)} have a file each: "
            f"checkpoint=dict({', '.join(f'{name}=FILE' for name in names)}), got {files!r}"
        )
    for name in files:
        if name not in names:
            raise ValueError(f"no teacher is called {name!r}; {hint(name, names)}")
    missing = [name for name in names if files.get(name) is None]
    if missing:
        raise ValueError(f"no file for the teachers {', '.join(missing)}")


def resolve_distillation(
    given: Mapping[str, Any] | DistillationTeacher | None, *, has_gram: bool
) -> tuple[DistillationTeacher | DistillationTeachers | None, float | None]:
    """The teacher or teachers that the ``distillation`` argument of ``DINOv3`` describes.

    Returns:
        Also the ``resolution_scale`` of a single teacher.

    Raises:
        ValueError: an unknown or missing setting, or a teacher beside a Gram term.
    """
    if given is not None and has_gram:
        raise ValueError(
            "a distillation has no Gram term: its teacher is frozen already; set gram=None"
        )
    if given is None or isinstance(given, DistillationTeacher):
        return given, None
    if "teachers" not in given:
        return build_teacher(given)
    others = [key for key in given if key != "teachers"]
    if others:
        raise ValueError(
            f"distillation has teachers and also {', '.join(others)}, which belongs to one teacher:"
            f" put it into distillation.teachers.NAME"
        )
    return DistillationTeachers(given["teachers"]), None


def fit_student(
    student: nn.ModuleDict,
    teacher: DistillationTeacher | DistillationTeachers,
    scale: float | None,
) -> float | dict[str, float]:
    """How much smaller the crops of a teacher, or by name of each, are; see `check_student`."""
    if isinstance(teacher, DistillationTeachers):
        return teacher.fit(student)
    return check_student(student, teacher, scale)
