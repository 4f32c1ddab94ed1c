"""The shapes of a training step, from a config: all that the predictions are made of."""

import math
from dataclasses import dataclass

from mmengine.config import Config
from torch import nn

from dinov3_mm.engine.dry_run.batches import NUM_GLOBAL_CROPS, CropSet
from dinov3_mm.engine.strategies.ddp import networks_of, units_of
from dinov3_mm.models.pretraining import DistillationTeachers

from .backbones import Backbone, Crops, UnknownStepError, read_backbone

_PARTS = ("backbone", "dino_head", "ibot_head")


@dataclass(frozen=True)
class Head:
    """Sizes of a projection head: widths of the features between its linear layers, from the input
    to the bottleneck, and its prototypes.
    """

    widths: tuple[int, ...]
    num_prototypes: int

    @property
    def bottleneck(self) -> int:
        """Width in which features are compared with prototypes."""
        return self.widths[-1]


@dataclass(frozen=True)
class Unit:
    """What FSDP2 gathers at a time.

    Attributes:
        params: shapes of its parameters, and whether they are trained.
        weights: values of its weight matrices and kernels, which autocast casts.
    """

    params: tuple[tuple[tuple[int, ...], bool], ...]
    weights: int

    @property
    def numel(self) -> int:
        """Values of all parameters."""
        return sum(math.prod(shape) for shape, _ in self.params)

    def local(self, num_shards: int, *, trained: bool = False) -> int:
        """Values on the first rank, of the trained parameters only if asked: FSDP2 cuts the first
        axis and rounds up.
        """
        return sum(
            math.prod(shape)
            if num_shards == 1
            else -(-shape[0] // num_shards) * math.prod(shape[1:])
            for shape, requires_grad in self.params
            if requires_grad or not trained
        )


@dataclass(frozen=True)
class Network:
    """A network in units: the parts of its backbone, the rest of it, the heads."""

    units: tuple[Unit, ...]
    num_parts: int

    def local(self, num_shards: int, *, trained: bool = False) -> int:
        """Values on the first rank, see :meth:`Unit.local`."""
        return sum(unit.local(num_shards, trained=trained) for unit in self.units)

    @property
    def num_trained_tensors(self) -> int:
        """Trained parameter tensors."""
        return sum(trained for unit in self.units for _, trained in unit.params)


@dataclass(frozen=True)
class Workload:
    """A step of one rank.

    Attributes:
        backbone: of the student, the EMA teacher and the Gram teacher.
        dino_head, ibot_head: their heads.
        networks: parameters by name.
        crops: sizes of the crops and of the batch.
        width: bytes of an activation.
        gram: None, 'ema' or 'frozen'.
        gram_by_image: whether similarities are those within an image.
        accumulate: micro batches per step.
        koleo_over_ranks: whether KoLeo gathers features.
        teacher: backbone and heads of a distillation teacher; None without.
    """

    backbone: Backbone
    dino_head: Head
    ibot_head: Head
    networks: dict[str, Network]
    crops: CropSet
    width: int
    gram: str | None
    gram_by_image: bool
    accumulate: int
    koleo_over_ranks: bool
    teacher: tuple[Backbone, Head, Head] | None

    @property
    def num_global(self) -> int:
        """Global crops of a rank."""
        return NUM_GLOBAL_CROPS * self.crops.images

    @property
    def num_local(self) -> int:
        """Local crops of a rank."""
        return self.crops.num_local * self.crops.images

    @property
    def student_crops(self) -> tuple[Crops, ...]:
        """Images and sides of what the student sees."""
        crops = self.crops
        return (self.num_global, crops.global_size), (self.num_local, crops.local_size)

    @property
    def teacher_crops(self) -> tuple[Crops, ...]:
        """What the teacher of the targets sees, at the student's number of tokens."""
        backbone = self.backbone if self.teacher is None else self.teacher[0]
        return (
            (self.num_global, self.crops.global_size * backbone.stride // self.backbone.stride),
        )

    @property
    def gram_crops(self) -> tuple[Crops, ...]:
        """What the frozen Gram teacher sees."""
        if self.gram != "frozen" or self.crops.gram_size is None:
            return ()
        return ((self.num_global, self.crops.gram_size),)

    @property
    def gram_rows(self) -> tuple[int, int]:
        """How many matrices the Gram term compares, and patches in each."""
        patches = self.backbone.tokens(self.crops.global_size) - self.backbone.num_prefix
        return (self.num_global, patches) if self.gram_by_image else (1, self.num_global * patches)

    @property
    def pixels(self) -> int:
        """Values of all images of a micro batch."""
        seen = *self.student_crops, (self.num_global, self.crops.gram_size or 0)
        return self.backbone.channels * sum(images * side**2 for images, side in seen)


def read_workload(cfg: Config, model: nn.Module, crops: CropSet) -> Workload:
    """Take the sizes of a model that was built on the meta device.

    Raises:
        UnknownStepError: a backbone or an algorithm whose step is not known.
    """
    student = getattr(model, "student", None)
    if student is None:
        raise UnknownStepError(
            f"model: the plan knows DINOv3, not {type(model).__name__}; tools/train.py --dry-run "
            "runs a step of several students"
        )
    distillation = getattr(model, "distillation_teacher", None)
    if isinstance(distillation, DistillationTeachers):
        raise UnknownStepError(
            "model: the plan knows one distillation teacher; tools/train.py --dry-run runs a step "
            "with several"
        )
    return Workload(
        *_parts(student),
        networks={name: _network(module) for name, module in networks_of(model)},
        crops=crops,
        width=2 if model.compute_dtype == "bf16" else 4,
        gram=None if model.gram is None else model.gram["teacher"],
        gram_by_image=model.gram is None or model.gram["img_level"],
        accumulate=cfg.train_cfg.get("accumulate", 1),
        koleo_over_ranks=bool(model.koleo["weight"] and model.koleo["distributed"]),
        teacher=None if distillation is None else _parts(distillation),
    )


def _parts(network: nn.Module) -> tuple[Backbone, Head, Head]:
    backbone, *heads = (network[name] for name in _PARTS)
    return read_backbone(backbone), *map(_head, heads)


def _head(head: nn.Module) -> Head:
    layers = [module for module in head.mlp.modules() if isinstance(module, nn.Linear)]
    widths = (layers[0].in_features, *(layer.out_features for layer in layers))
    return Head(widths, head.num_prototypes)


def _network(network: nn.Module) -> Network:
    """Parameters by unit, in the way in which FSDP2 is told to cut them."""
    parts = units_of(network.backbone)
    units, seen = [], set()
    for part in (*parts, *network.children()):
        own = [param for param in part.parameters() if id(param) not in seen]
        layers = [m.weight for m in part.modules() if isinstance(m, (nn.Linear, nn.Conv2d))]
        weights = sum(weight.numel() for weight in layers if id(weight) not in seen)
        seen.update(map(id, own))
        units.append(Unit(tuple((tuple(p.shape), p.requires_grad) for p in own), weights))
    return Network(tuple(units), len(parts))
