"""The shapes of a training step, from a config: all that the predictions are made of."""

from dataclasses import dataclass, replace

from mmengine.config import Config
from torch import nn

from dinov3_mm.engine.config import ConfigError
from dinov3_mm.engine.dry_run.batches import NUM_GLOBAL_CROPS, CropSet
from dinov3_mm.engine.networks import networks_of, units_of
from dinov3_mm.models.backbones.vit_trunk import ViTTrunk
from dinov3_mm.models.layers import ffn_hidden_dims
from dinov3_mm.models.pretraining import DistillationTeachers
from dinov3_mm.models.pretraining.head import DINOv3Head

Sequence = tuple[int, int]  # images and tokens of each


@dataclass(frozen=True)
class Transformer:
    """Sizes of a ViT.

    Attributes:
        dims: width D.
        hidden: width H of the feed-forward.
        num_layers: blocks.
        num_heads: attention heads.
        num_prefix: CLS and register tokens.
        stride: pixels between tokens.
        channels: of the images.
        is_gated: whether the feed-forward is a SwiGLU, with three matrices.
        drop_path_rate: share of the images that skip a branch.
    """

    dims: int
    hidden: int
    num_layers: int
    num_heads: int
    num_prefix: int
    stride: int
    channels: int
    is_gated: bool
    drop_path_rate: float

    def sequence(self, images: int, side: int) -> Sequence:
        """Images of ``side`` pixels and their tokens."""
        return images, self.num_prefix + (side // self.stride) ** 2

    def kept(self, sequences: tuple[Sequence, ...]) -> tuple[Sequence, ...]:
        """What is left of the sequences in a residual branch of the student."""
        if not self.drop_path_rate:
            return sequences
        rate = 1 - self.drop_path_rate
        return tuple((max(int(images * rate), 1), tokens) for images, tokens in sequences)


@dataclass(frozen=True)
class Head:
    """Sizes of a projection head.

    Attributes:
        widths: of the features between the linear layers, from the input to the bottleneck.
        num_prototypes: K.
    """

    widths: tuple[int, ...]
    num_prototypes: int

    @property
    def bottleneck(self) -> int:
        """Width in which features are compared with prototypes."""
        return self.widths[-1]


@dataclass(frozen=True)
class Network:
    """Parameters of a network, and how they are cut into what FSDP2 gathers at a time.

    Attributes:
        units: shapes of the parameters of each unit, and whether they are trained.
        weights: values of the weight matrices of each unit, which autocast casts.
    """

    units: tuple[tuple[tuple[tuple[int, ...], bool], ...], ...]
    weights: tuple[int, ...]

    @property
    def num_params(self) -> int:
        """Values of all parameters."""
        return sum(numel(shape) for unit in self.units for shape, _ in unit)

    @property
    def num_trained(self) -> int:
        """Values of the trained parameters."""
        return sum(numel(shape) for unit in self.units for shape, trained in unit if trained)


@dataclass(frozen=True)
class Workload:
    """A step of one rank.

    Attributes:
        backbone: of the student, the EMA teacher and the Gram teacher.
        dino_head, ibot_head: their heads.
        networks: parameters by name.
        crops: sizes of the crops and of the batch.
        bf16: bfloat16 autocast.
        gram: None, 'ema' or 'frozen'.
        gram_by_image: whether similarities are those within an image.
        accumulate: micro batches per step.
        koleo_over_ranks: whether KoLeo gathers features.
        teacher: backbone and heads of a distillation teacher; None without.
    """

    backbone: Transformer
    dino_head: Head
    ibot_head: Head
    networks: dict[str, Network]
    crops: CropSet
    bf16: bool
    gram: str | None
    gram_by_image: bool
    accumulate: int
    koleo_over_ranks: bool
    teacher: tuple[Transformer, Head, Head] | None

    @property
    def width(self) -> int:
        """Bytes of an activation."""
        return 2 if self.bf16 else 4

    @property
    def num_global(self) -> int:
        """Global crops of a rank."""
        return NUM_GLOBAL_CROPS * self.crops.images

    @property
    def num_local(self) -> int:
        """Local crops of a rank."""
        return self.crops.num_local * self.crops.images

    @property
    def student_sequences(self) -> tuple[Sequence, ...]:
        """What the student sees."""
        crops = self.crops
        return (
            self.backbone.sequence(self.num_global, crops.global_size),
            self.backbone.sequence(self.num_local, crops.local_size),
        )

    @property
    def teacher_sequences(self) -> tuple[Sequence, ...]:
        """What the teacher of the targets sees."""
        backbone = self.backbone if self.teacher is None else self.teacher[0]
        side = self.crops.global_size
        return (backbone.sequence(self.num_global, side * backbone.stride // self.backbone.stride),)

    @property
    def gram_sequences(self) -> tuple[Sequence, ...]:
        """What the frozen Gram teacher sees."""
        if self.gram != "frozen" or self.crops.gram_size is None:
            return ()
        return (self.backbone.sequence(self.num_global, self.crops.gram_size),)

    @property
    def pixels(self) -> int:
        """Values of all images of a micro batch."""
        crops = self.crops
        area = self.num_global * crops.global_size**2 + self.num_local * crops.local_size**2
        return self.backbone.channels * (area + self.num_global * (crops.gram_size or 0) ** 2)

    def with_crops(self, crops: CropSet) -> "Workload":
        """The same with other crops."""
        return replace(self, crops=crops)


def read_workload(cfg: Config, model: nn.Module, crops: CropSet) -> Workload:
    """Take the sizes of a model that was built on the meta device.

    Raises:
        ConfigError: a backbone or an algorithm whose step is not known.
    """
    student = getattr(model, "student", None)
    if student is None:
        raise ConfigError(
            f"model: the plan knows DINOv3, not {type(model).__name__}; tools/train.py --dry-run "
            "runs a step of several students"
        )
    distillation = getattr(model, "distillation_teacher", None)
    if isinstance(distillation, DistillationTeachers):
        raise ConfigError(
            "model: the plan knows one distillation teacher; tools/train.py --dry-run runs a step "
            "with several"
        )
    parts = ("backbone", "dino_head", "ibot_head")
    return Workload(
        *(_part(student[name]) for name in parts),
        networks={name: _network(module) for name, module in networks_of(model)},
        crops=crops,
        bf16=model.compute_dtype == "bf16",
        gram=None if model.gram is None else model.gram["teacher"],
        gram_by_image=model.gram is None or model.gram["img_level"],
        accumulate=cfg.train_cfg.get("accumulate", 1),
        koleo_over_ranks=bool(model.koleo["weight"] and model.koleo["distributed"]),
        teacher=None if distillation is None else tuple(_part(distillation[n]) for n in parts),
    )


def numel(shape: tuple[int, ...]) -> int:
    """Values of a tensor of this shape."""
    count = 1
    for size in shape:
        count *= size
    return count


def _part(module: nn.Module) -> Transformer | Head:
    if isinstance(module, DINOv3Head):
        layers = [m for m in module.mlp.modules() if isinstance(m, nn.Linear)]
        widths = (layers[0].in_features, *(layer.out_features for layer in layers))
        return Head(widths, module.num_prototypes)
    if not isinstance(module, ViTTrunk):
        raise ConfigError(
            f"model: the plan knows the activations of a ViT, not of {type(module).__name__}; "
            "tools/train.py --dry-run measures any backbone"
        )
    settings = module.arch_settings
    ffn, dims = settings["ffn_layer"], module.embed_dims
    return Transformer(
        dims,
        ffn_hidden_dims(ffn, dims, settings["ffn_ratio"]),
        module.num_layers,
        module.num_heads,
        1 + module.num_registers,
        module.patch_size,
        settings["in_channels"],
        ffn != "mlp",
        module.drop_path_rate,
    )


def _network(network: nn.Module) -> Network:
    """Parameters by unit, in the way in which FSDP2 is told to cut them."""
    units, weights = [], []
    for name, child in network.named_children():
        parts = [*units_of(child), child] if name == "backbone" else [child]
        seen: set[int] = set()
        for part in parts:
            own = [p for p in part.parameters() if id(p) not in seen]
            layers = [m.weight for m in part.modules() if isinstance(m, nn.Linear)]
            weights.append(sum(w.numel() for w in layers if id(w) not in seen))
            seen.update(map(id, own))
            units.append(tuple((tuple(p.shape), p.requires_grad) for p in own))
    return Network(tuple(units), tuple(weights))
