"""The trained networks, a backbone with two heads, and how they are compared with a teacher's."""

import copy
import os
from collections.abc import Mapping
from typing import NamedTuple

import torch
from mmengine.model import BaseModule
from mmengine.model.weight_init import initialize
from mmengine.registry import MODELS
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm

from dinov3_mm.checkpoints import install_weights, load_weights
from dinov3_mm.checkpoints.load import shard_state
from dinov3_mm.models.layers.batch_norm import FrozenBatchNorm2d, SyncedBatchNorm2d
from dinov3_mm.models.losses import dino_loss, ibot_loss, sinkhorn_knopp
from dinov3_mm.models.losses.prototypes import (
    ChunkedAssignments,
    chunked_cross_entropy,
    sinkhorn_assignments,
)

# --- A backbone with a DINO and an iBOT head ---


HEADS = ("dino_head", "ibot_head")
# Values from which a tensor of the EMA teacher is moved by a kernel of its own.
_OWN_KERNEL = 2**16


def build_student(backbone: dict | nn.Module, dino_head: dict, ibot_head: dict) -> nn.ModuleDict:
    """Build ``backbone``, ``dino_head`` and ``ibot_head``; the heads take the backbone's width.

    Raises:
        TypeError: a head that is no config dict.
        ValueError: a head whose ``in_dims`` is not the backbone's width.
    """
    backbone = backbone if isinstance(backbone, nn.Module) else MODELS.build(backbone)
    heads = {}
    for name, cfg in zip(HEADS, (dino_head, ibot_head), strict=True):
        if not isinstance(cfg, Mapping):
            raise TypeError(f"{name} must be a config dict, got {type(cfg).__name__}")
        width = backbone.embed_dims
        if cfg.get("in_dims", width) != width:
            raise ValueError(
                f"{name}: in_dims is {cfg['in_dims']}, but the backbone's features have {width}; "
                "leave in_dims out"
            )
        heads[name] = MODELS.build({**copy.deepcopy(dict(cfg)), "in_dims": width})
    return nn.ModuleDict({"backbone": backbone, **heads})


def check_batch_norm(student: nn.ModuleDict, *, has_frozen_teacher: bool) -> None:
    """Refuse batch norms whose statistics are of the batch, unless the teacher is frozen.

    Raises:
        ValueError: a batch norm that is neither frozen nor, under a frozen teacher, synced.
    """
    allowed = (FrozenBatchNorm2d, SyncedBatchNorm2d) if has_frozen_teacher else FrozenBatchNorm2d
    for name, module in student.named_modules():
        if isinstance(module, _BatchNorm) and not isinstance(module, allowed):
            raise ValueError(
                f"{name} is a {type(module).__name__}: batch normalisation leaks information "
                "between the images of a batch and has no meaning in the EMA teacher. Use a "
                "backbone without it, or TimmBackbone or FeatureMapBackbone with "
                "batch_norm='group', 'frozen' (trained statistics) or, as the student of a frozen "
                "teacher, 'sync'"
            )


def check_mask_token(backbone: nn.Module) -> None:
    """Raise a ``ValueError`` for a backbone from which patches cannot be hidden."""
    if not hasattr(backbone, "mask_token"):
        raise ValueError(
            f"{type(backbone).__name__} has no mask token, so patches cannot be hidden from it; "
            "set mask_student=False, which evaluates the iBOT term on patches that the student sees"
        )


def _running_statistics(network: nn.Module) -> list[Tensor]:
    norms = [child for child in network.modules() if isinstance(child, SyncedBatchNorm2d)]
    return [tensor for norm in norms for tensor in (norm.running_mean, norm.running_var)]


@torch.no_grad()
def follow(ema: nn.Module, network: nn.Module, momentum: float | Tensor) -> None:
    """Move an EMA copy: ``m * ema + (1 - m) * network``.

    It follows the parameters, and the running statistics of synced batch norms.

    Args:
        ema: the copy.
        network: what it follows.
        momentum: ``m``, a number or a scalar tensor, which is not read to the host.
    """
    _lerp(list(ema.parameters()), list(network.parameters()), momentum)
    statistics = _running_statistics(ema)
    if statistics:  # apart, because those of a sharded network are whole
        _lerp(statistics, _running_statistics(network), momentum)


def _lerp(averages: list[Tensor], values: list[Tensor], momentum: float | Tensor) -> None:
    # Shards of a network and of its copy lie alike, so each rank moves its own.
    averages, values = ([_local(t) for t in tensors] for tensors in (averages, values))
    if not isinstance(momentum, Tensor):
        torch._foreach_lerp_(averages, values, 1.0 - momentum)
        return
    step = (1.0 - momentum).to(averages[0].device, averages[0].dtype, non_blocking=True)
    # torch has no kernel of many tensors for a weight that is on the device. A matrix is moved in
    # one pass by a kernel of its own; vectors are too small for that and moved together, with
    # temporaries of their size.
    small: tuple[list[Tensor], list[Tensor]] = ([], [])
    for average, value in zip(averages, values, strict=True):
        if average.numel() >= _OWN_KERNEL:
            average.lerp_(value, step)
        else:
            small[0].append(average)
            small[1].append(value)
    if small[0]:
        change = torch._foreach_sub(small[1], small[0])
        torch._foreach_mul_(change, step)
        torch._foreach_add_(small[0], change)


def _local(tensor: Tensor) -> Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def load_network(network: nn.ModuleDict, path: str | os.PathLike, *, what: str) -> str:
    """Load backbone and both heads of a training state or teacher export, strictly.

    Args:
        network: ``backbone``, ``dino_head`` and ``ibot_head``.
        path: the file.
        what: who needs it, for messages.

    Returns:
        One line about what was loaded.

    Raises:
        FileNotFoundError: no such file.
        ValueError: weights that lack a head or do not fit.
    """
    checkpoint = load_weights(path, heads=True, arch=network["backbone"].arch_settings)
    missing = [name for name in HEADS if name not in checkpoint.heads]
    if missing:
        raise ValueError(f"{path} holds no {' and no '.join(missing)}; {what} needs both heads")
    report = install_weights(network["backbone"], checkpoint)
    for name in HEADS:
        head, state = network[name], checkpoint.heads[name]
        try:
            head.load_state_dict(shard_state(state, head.state_dict()), strict=True)
        except RuntimeError as error:
            raise ValueError(f"the {name} of {path} does not fit the config: {error}") from None
    return str(report)


# --- The head (arXiv 2508.10104 section 3.2) ---


@MODELS.register_module()
class DINOv3Head(BaseModule):
    """MLP to a bottleneck, L2 normalisation, linear layer onto the prototypes.

    Unlike the heads of DINO and DINOv2, the prototypes carry no weight normalisation.

    Args:
        in_dims: width of the backbone features.
        num_prototypes: K, number of outputs.
        hidden_dims: width of the hidden layers.
        bottleneck_dims: width in which features are normalised and compared with the prototypes.
        num_layers: linear layers of the MLP (at least 1).
        init_cfg: MMEngine initialisation config, applied after the truncated-normal initialisation.

    Raises:
        ValueError: a size below 1.
    """

    def __init__(
        self,
        in_dims: int,
        num_prototypes: int,
        hidden_dims: int = 2048,
        bottleneck_dims: int = 256,
        num_layers: int = 3,
        init_cfg: dict | None = None,
    ) -> None:
        super().__init__(init_cfg)
        sizes = dict(
            in_dims=in_dims,
            num_prototypes=num_prototypes,
            hidden_dims=hidden_dims,
            bottleneck_dims=bottleneck_dims,
            num_layers=num_layers,
        )
        for name, value in sizes.items():
            if value < 1:
                raise ValueError(f"DINOv3Head: {name} must be at least 1, got {value}")
        self.num_prototypes = num_prototypes
        self.mlp = _build_mlp(in_dims, hidden_dims, bottleneck_dims, num_layers)
        self.last_layer = nn.Linear(bottleneck_dims, num_prototypes, bias=False)

    def init_weights(self) -> None:
        """Draw all weights from a normal of std 0.02 (truncated at +-2) and zero the biases."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        if self.init_cfg:
            initialize(self, self.init_cfg)
        self._is_init = True

    def project(self, x: Tensor) -> Tensor:
        """Return the normalised bottleneck features: (..., in_dims) -> (..., bottleneck_dims)."""
        x = self.mlp(x)
        return F.normalize(x, dim=-1, eps=1e-6 if x.dtype == torch.float16 else 1e-12)

    def project_and_prototypes(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The factors of the logits in the compute dtype: features (n, b) and prototypes (K, b).

        The prototypes are a copy, which outlives the gathered parameter of a sharded head.
        """
        device = x.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype
        return self.project(x).to(dtype), self.last_layer.weight.to(dtype, copy=True)

    def forward(self, x: Tensor) -> Tensor:
        """Return the prototype logits: (..., in_dims) -> (..., num_prototypes)."""
        return self.last_layer(self.project(x))


def _build_mlp(in_dims: int, hidden_dims: int, out_dims: int, num_layers: int) -> nn.Module:
    """Linear layers with GELU between them; a single layer stands alone (key ``mlp.weight``)."""
    if num_layers == 1:
        return nn.Linear(in_dims, out_dims)
    layers: list[nn.Module] = [nn.Linear(in_dims, hidden_dims), nn.GELU()]
    for _ in range(num_layers - 2):
        layers += [nn.Linear(hidden_dims, hidden_dims), nn.GELU()]
    return nn.Sequential(*layers, nn.Linear(hidden_dims, out_dims))


# --- The comparison with a teacher: whole matrices, or chunks of prototypes ---


NUM_GLOBAL_CROPS = 2


class WholeComparison:
    """Logits (n, K) of all samples at once; teacher probabilities of the same shape."""

    chunk_size = None

    def scores(self, head: DINOv3Head, features: Tensor) -> Tensor:
        """Logits of features (n, D)."""
        return head(features)

    def projected_scores(self, head: DINOv3Head, projected: Tensor) -> Tensor:
        """Logits of bottleneck features (n, b)."""
        return head.last_layer(projected)

    def split(self, scores: Tensor, sizes: tuple[int, ...]) -> tuple[Tensor, ...]:
        """Rows of the scores, apart."""
        return scores.split(sizes)

    def assignments(self, scores: Tensor, temp: float | Tensor) -> Tensor:
        """Centred probabilities of the teacher's scores."""
        return sinkhorn_knopp(scores, temp)

    def probabilities(self, assignments: Tensor) -> Tensor:
        """Assignments as a matrix (n, K)."""
        return assignments

    def dino(
        self,
        scores: Tensor,
        assignments: Tensor,
        *,
        num_crops: int,
        student_temp: float,
        ignore_diagonal: bool = False,
    ) -> Tensor:
        """DINO loss of crop-major scores (crops * B) against those of the two global crops."""
        return dino_loss(
            scores.unflatten(0, (num_crops, -1)),
            assignments.unflatten(0, (NUM_GLOBAL_CROPS, -1)),
            student_temp=student_temp,
            ignore_diagonal=ignore_diagonal,
        )

    def ibot(
        self,
        scores: Tensor,
        assignments: Tensor,
        weights: Tensor,
        num_images: int,
        *,
        student_temp: float,
    ) -> Tensor:
        """IBOT loss of the masked patches."""
        return ibot_loss(scores, assignments, weights, num_images, student_temp=student_temp)

    def combine(self, losses: Mapping[str, Tensor]) -> tuple[Mapping[str, Tensor], dict]:
        """The losses of all teachers, and those of each: there is one."""
        return losses, {}


class Projections(NamedTuple):
    """What logits are the product of: bottleneck features (n, b) and prototypes (K, b)."""

    features: Tensor
    prototypes: Tensor


class ChunkedComparison:
    """The same losses without any matrix of K columns.

    Args:
        chunk_size: prototypes handled at a time.

    Raises:
        ValueError: ``chunk_size`` below 1.
    """

    def __init__(self, chunk_size: int) -> None:
        if chunk_size < 1:
            raise ValueError(f"prototype_chunk_size must be at least 1, got {chunk_size}")
        self.chunk_size = chunk_size

    def scores(self, head: DINOv3Head, features: Tensor) -> Projections:
        """Bottleneck features and prototypes, in the dtype in which the head computes."""
        return Projections(*head.project_and_prototypes(features))

    def projected_scores(self, head: DINOv3Head, projected: Tensor) -> Projections:
        """The same of bottleneck features (n, b)."""
        return Projections(projected, head.last_layer.weight.to(projected.dtype))

    def split(self, scores: Projections, sizes: tuple[int, ...]) -> tuple[Projections, ...]:
        """Rows of the scores, apart."""
        return tuple(Projections(part, scores.prototypes) for part in scores.features.split(sizes))

    def assignments(self, scores: Projections, temp: float | Tensor) -> ChunkedAssignments:
        """Centred probabilities of the teacher's scores, as scaling vectors."""
        return sinkhorn_assignments(*scores, temp, chunk_size=self.chunk_size)

    def probabilities(self, assignments: ChunkedAssignments) -> Tensor:
        """Assignments as a matrix (n, K)."""
        return assignments.chunk(slice(None))

    def dino(
        self,
        scores: Projections,
        assignments: ChunkedAssignments,
        *,
        num_crops: int,
        student_temp: float,
        ignore_diagonal: bool = False,
    ) -> Tensor:
        """See :meth:`WholeComparison.dino`."""
        features = scores.features.unflatten(0, (num_crops, -1))
        pairs = torch.ones(num_crops, NUM_GLOBAL_CROPS, device=features.device)
        if ignore_diagonal:
            pairs.fill_diagonal_(0.0)
        kept = num_crops * NUM_GLOBAL_CROPS - ignore_diagonal * min(num_crops, NUM_GLOBAL_CROPS)
        num_images = features.shape[1]
        weights = torch.full((num_images,), 1.0 / (num_images * kept), device=features.device)
        return self._cross_entropy(
            features, scores.prototypes, assignments, pairs, weights, student_temp
        )

    def ibot(
        self,
        scores: Projections,
        assignments: ChunkedAssignments,
        weights: Tensor,
        num_images: int,
        *,
        student_temp: float,
    ) -> Tensor:
        """See :meth:`WholeComparison.ibot`."""
        pairs = torch.ones(1, 1, device=weights.device)
        return self._cross_entropy(
            scores.features[None],
            scores.prototypes,
            assignments,
            pairs,
            weights.float() / num_images,
            student_temp,
        )

    def combine(self, losses: Mapping[str, Tensor]) -> tuple[Mapping[str, Tensor], dict]:
        """See :meth:`WholeComparison.combine`."""
        return losses, {}

    def _cross_entropy(self, *arguments) -> Tensor:
        return chunked_cross_entropy(*arguments, chunk_size=self.chunk_size)


Comparison = WholeComparison | ChunkedComparison


def build_comparison(prototype_chunk_size: int | None) -> Comparison:
    """In chunks of so many prototypes, or whole."""
    if prototype_chunk_size is None:
        return WholeComparison()
    return ChunkedComparison(prototype_chunk_size)
