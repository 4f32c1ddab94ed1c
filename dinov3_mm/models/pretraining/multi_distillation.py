"""Several students of one frozen teacher in one run (arXiv 2508.10104 section 5.2)."""

import copy
from collections.abc import Iterator, Mapping
from typing import Any, NoReturn

import torch
import torch.distributed as dist
from mmengine.config import Config
from mmengine.model import BaseModel
from mmengine.registry import MODELS
from torch import Tensor, nn

from dinov3_mm.errors import hint
from dinov3_mm.models.wrapping import unwrapped

from .dinov3 import DINOv3
from .distillation import TeacherFeatures, build_teacher
from .groups import StudentRanks, group_as_world, place_students, share_crops
from .student import NUM_GLOBAL_CROPS
from .terms import check_compute_dtype

PREFIX = "student/"
MASKS = ("masks", "mask_indices", "masks_weight")
_OWN = ("distillation", "data_preprocessor", "gram", "init_cfg")


@MODELS.register_module()
class MultiDistillation(BaseModel):
    """Students that learn from the same batches of one frozen teacher, which sees each image once.

    Each student is a :class:`DINOv3` with its EMA teacher, and is trained exactly as if it were
    alone: same initial weights, batches, noise and losses. Two ways to spread them:

    - together: every process trains all students in turn on its images; the teacher's forward pass
      is shared. The way for one GPU, and for few;
    - in groups (``ranks``): each process trains one student. It reads and shows the teacher its
      share of the global batch; crops and bottleneck features, which are small, then travel, so
      that each group works on the whole global batch. Groups should be as large as their students
      are slow, because all wait for the slowest.
      Sinkhorn-Knopp, and KoLeo with ``distributed=True``, gather over the ranks of a group, never
      over those of another student; without it KoLeo sees the images of its rank only.

    ``MultiDistillationStrategy`` trains it, ``DistillationHook`` reads the teacher's weights and
    ``PerStudentHook`` runs the hooks of a pretraining for every student.

    Args:
        teacher: ``backbone``, ``dino_head`` and ``ibot_head`` of the teacher.
        students: by name, arguments of :class:`DINOv3`, and perhaps ``ranks``: first rank and one
            past the last. With one process ranks have no effect.
        student: arguments that all students share; those in ``students`` are merged into them.
        compute_dtype: 'fp32' or 'bf16', for the teacher and for students that do not say.
        data_preprocessor: default ``MultiCropPreprocessor`` with ImageNet statistics.

    Attributes:
        students (nn.ModuleDict): the students that this process trains.
        strides (dict): pixels between the tokens of every student.

    Raises:
        ValueError: no student, a bad name or setting, or ranks that do not fit the processes; see
            also :class:`DINOv3`.
    """

    def __init__(
        self,
        teacher: dict,
        students: Mapping[str, Mapping[str, Any]],
        *,
        student: Mapping[str, Any] | None = None,
        compute_dtype: str = "fp32",
        data_preprocessor: dict | None = None,
    ) -> None:
        preprocessor = data_preprocessor or dict(type="MultiCropPreprocessor")
        super().__init__(copy.deepcopy(preprocessor))
        if not students:
            raise ValueError("students must name at least one student")
        self.compute_dtype = check_compute_dtype(compute_dtype)
        if "teachers" in teacher:
            raise ValueError(
                "several students have one teacher; several teachers have one student: a run of "
                "type DINOv3 with distillation=dict(teachers=...)"
            )
        self.distillation_teacher, _ = build_teacher(teacher)
        self.placement = place_students({n: cfg.get("ranks") for n, cfg in students.items()})
        self.groups: dict[str, dist.ProcessGroup | None] = dict.fromkeys(students)
        self.strides: dict[str, int] = {}
        self.students = nn.ModuleDict()
        for name, changes in students.items():
            settings = merged_student(student or {}, changes)
            built = self._build(name, settings, preprocessor)
            self.strides[name] = built.student.backbone.token_stride
            if self.placement[name].is_local:
                self.students[name] = built

    def _build(self, name: str, settings: dict, preprocessor: dict) -> DINOv3:
        for key in settings:
            if key in _OWN:
                raise ValueError(f"student {name!r}: {key} is the same for all students")
        arguments = {"compute_dtype": self.compute_dtype, **settings}
        # Students of other ranks are built too, so that all ranks find the same mistakes.
        device = torch.get_default_device() if self.placement[name].is_local else "meta"
        try:
            with torch.device(device):
                return DINOv3(
                    **copy.deepcopy(arguments),
                    distillation=self.distillation_teacher,
                    data_preprocessor=copy.deepcopy(preprocessor),
                )
        except (TypeError, ValueError) as error:
            raise type(error)(f"student {name!r}: {error}") from error

    @property
    def student_names(self) -> tuple[str, ...]:
        """Names of all students, also of those on other ranks."""
        return tuple(self.placement)

    @property
    def is_grouped(self) -> bool:
        """Whether each rank trains one student of its own."""
        return any(place.ranks is not None for place in self.placement.values())

    @property
    def teacher_backbone(self) -> nn.Module:
        """The frozen teacher's backbone."""
        return self.distillation_teacher["backbone"]

    def share_of(self, batch_size: int) -> tuple[int, int] | None:
        """Which part of a batch this rank's student is given: index, and number of parts.

        None where students are not in groups.

        Raises:
            ValueError: a group whose ranks do not divide the batch.
        """
        if not self.is_grouped:
            return None
        for name, place in self.placement.items():
            if batch_size % len(place.ranks):
                raise ValueError(
                    f"student {name!r} has {len(place.ranks)} ranks, which do not divide the "
                    f"batch of {batch_size} images"
                )
        place = self._own_place()
        return place.index, len(place.ranks)

    def _own_place(self) -> StudentRanks:
        return next(place for place in self.placement.values() if place.is_local)

    def form_groups(self) -> None:
        """Create the process group of every student; all ranks must call this."""
        for name, place in self.placement.items():
            self.groups[name] = None if place.ranks is None else dist.new_group(place.ranks)

    def local_students(self) -> Iterator[tuple[str, DINOv3]]:
        """Name and model of the students that this rank trains, without distributed wrapper."""
        for name, student in self.students.items():
            yield name, unwrapped(student)

    def init_weights(self) -> None:
        """Initialise each student as if it were the only one, then the teacher at random."""
        state = torch.get_rng_state()
        for _, student in self.local_students():
            torch.set_rng_state(state)
            student.init_weights()
        self.distillation_teacher.init_weights()
        self._is_init = True

    def forward(self, *_, **__) -> NoReturn:
        """Not defined: students are stepped one by one by :meth:`train_step`."""
        raise RuntimeError(
            "MultiDistillation is trained by its train_step, with "
            "strategy=dict(type='MultiDistillationStrategy')"
        )

    def train_step(self, data: Mapping, optim_wrapper: Mapping) -> dict[str, Tensor]:
        """One step of every student of this rank.

        Args:
            data: batch of the multi-crop collate function.
            optim_wrapper: the optimizer wrapper of each student, by name.

        Returns:
            The metrics of each student as ``student/<name>/<metric>``.
        """
        wanted = ("global_crops", "local_crops", "masks_of", *MASKS)
        # Distorted crops are 8-bit again, as the students' own preprocessors expect them.
        data = self.data_preprocessor.receive(data, [key for key in wanted if key in data])
        features = self._teacher_features(data)
        crops = self._student_crops(data)
        logs = {}
        for name, student in self.local_students():
            stride = self.strides[name]
            student.listen_to(features[stride])
            batch = {**crops, **_masks(data, stride)}
            # The random numbers of a student are those that it would draw alone.
            with torch.random.fork_rng(_cuda_devices()), group_as_world(self.groups[name]):
                outputs = self.students[name].train_step(batch, optim_wrapper[name])
            student.listen_to(self.distillation_teacher)
            logs.update({f"{PREFIX}{name}/{key}": value for key, value in outputs.items()})
        return logs

    @torch.no_grad()
    def _teacher_features(self, data: Mapping) -> dict[int, TeacherFeatures]:
        """Bottleneck features of the crops of this rank's students, by token stride."""
        self.distillation_teacher.require_ready()
        crops = self.data_preprocessor.normalize("global_crops", data["global_crops"])
        features = {}
        for stride in sorted(set(self.strides.values())):
            masks = _masks(data, stride)
            scale = stride / self.teacher_backbone.token_stride
            with torch.autocast(
                crops.device.type, torch.bfloat16, enabled=self.compute_dtype == "bf16"
            ):
                cls, patches = self.distillation_teacher.project(
                    crops, scale, masks["masks"].shape[1], None if self.is_grouped else masks
                )
            if self.is_grouped:
                length = self._batch_size(masks)
                cls, patches = (self._share(x, NUM_GLOBAL_CROPS, length) for x in (cls, patches))
                patches = patches.flatten(0, 1).index_select(0, masks["mask_indices"])
            features[stride] = TeacherFeatures(cls, patches, self.distillation_teacher)
        return features

    def _student_crops(self, data: Mapping) -> dict[str, Tensor]:
        crops = {key: data[key] for key in ("global_crops", "local_crops")}
        if not self.is_grouped:
            return crops
        num_local = len(crops["local_crops"]) * NUM_GLOBAL_CROPS // len(crops["global_crops"])
        length = self._batch_size(_masks(data, min(self.strides.values())))
        return {
            "global_crops": self._share(crops["global_crops"], NUM_GLOBAL_CROPS, length),
            "local_crops": self._share(crops["local_crops"], num_local, length),
        }

    def _batch_size(self, masks: Mapping) -> int:
        """Images of all ranks, without surplus: the masks are those of this rank's part."""
        return len(masks["masks"]) // NUM_GLOBAL_CROPS * len(self._own_place().ranks)

    def _share(self, rows: Tensor, num_crops: int, length: int) -> Tensor:
        place = self._own_place()
        return share_crops(rows, num_crops, length, index=place.index, size=len(place.ranks))


def _masks(data: Mapping, stride: int) -> dict[str, Tensor]:
    """Masks of the grid of a token stride; a batch for a single stride has them at the top."""
    return data["masks_of"][str(stride)] if "masks_of" in data else {k: data[k] for k in MASKS}


def merged_student(shared: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments of a student: the shared ones with its own merged into them, without ``ranks``."""
    own = {key: value for key, value in changes.items() if key != "ranks"}
    cfg = Config(dict(student=copy.deepcopy(dict(shared))))
    cfg.merge_from_dict(dict(student=copy.deepcopy(own)))
    return cfg.student.to_dict()


def check_names(given: Mapping[str, Any], known: tuple[str, ...], where: str) -> None:
    """Raise a ``ValueError`` for settings of a student that does not exist."""
    for name in given:
        if name not in known:
            raise ValueError(f"{where}: no student is called {name!r}; {hint(name, known)}")


def _cuda_devices() -> list[int]:
    return [torch.cuda.current_device()] if torch.cuda.is_initialized() else []
