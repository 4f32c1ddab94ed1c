"""FlexibleRunner strategy on PyTorch's ``fully_shard``: what is sharded, how it starts."""

from collections.abc import Callable, Iterator
from concurrent.futures import Future
from dataclasses import dataclass

import torch
from mmengine.dist import is_main_process
from mmengine.optim import OptimWrapper
from mmengine.registry import MODELS, STRATEGIES
from torch import Tensor, nn
from torch import distributed as dist
from torch.distributed import device_mesh
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import (
    FSDPModule,
    MixedPrecisionPolicy,
    fully_shard,
    register_fsdp_forward_method,
)
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

from dinov3_mm.checkpoints.load import gather_whole, reading_for_shards
from dinov3_mm.datasets.order import torch_seed
from dinov3_mm.engine.training_state import finish, new_background_group, save_sharded_state

from .ddp import BEFORE_THE_FIRST_STEP, PretrainStrategy, networks_of, training_device, units_of

# --- How networks are cut into shards, and when their gradients are reduced ---


DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
_FORWARD_METHODS = ("forward_tokens", "forward_features", "get_intermediate_layers")


@dataclass(frozen=True)
class ShardingPolicy:
    """What FSDP2 is told.

    Attributes:
        param_dtype: dtype in which parameters are gathered; None keeps float32.
        reduce_dtype: dtype in which gradients are reduced.
        reshard_after_forward: free the gathered parameters of a block of the student after its
            forward pass (they are gathered again for the backward pass); False keeps them: more
            memory, less communication. Teachers always free theirs.
        num_prefetch: blocks whose parameters are gathered ahead of use.
    """

    param_dtype: torch.dtype | None = None
    reduce_dtype: torch.dtype = torch.float32
    reshard_after_forward: bool = True
    num_prefetch: int = 1

    @classmethod
    def of(
        cls,
        *,
        param_dtype: str = "fp32",
        reduce_dtype: str = "fp32",
        reshard_after_forward: bool = True,
        num_prefetch: int = 1,
    ) -> "ShardingPolicy":
        """The policy of the arguments of ``FSDP2Strategy``.

        Raises:
            ValueError: an unknown dtype.
        """
        for name, value in (("param_dtype", param_dtype), ("reduce_dtype", reduce_dtype)):
            if value not in DTYPES:
                raise ValueError(f"{name} must be one of {tuple(DTYPES)}, got {value!r}")
        return cls(
            param_dtype=None if param_dtype == "fp32" else DTYPES[param_dtype],
            reduce_dtype=DTYPES[reduce_dtype],
            reshard_after_forward=reshard_after_forward,
            num_prefetch=num_prefetch,
        )

    @property
    def mixed_precision(self) -> MixedPrecisionPolicy:
        # Inputs are not cast: RoPE tables and targets of the losses stay float32.
        return MixedPrecisionPolicy(
            param_dtype=self.param_dtype, reduce_dtype=self.reduce_dtype, cast_forward_inputs=False
        )


def build_mesh(device_type: str, num_replicas: int) -> DeviceMesh:
    """All ranks of the default process group, in one dimension or as replicas of shards.

    Raises:
        ValueError: the ranks cannot be cut into the replicas.
    """
    ranks = dist.get_world_size()
    if num_replicas < 1 or ranks % num_replicas:
        raise ValueError(f"num_replicas={num_replicas} does not divide {ranks} ranks")
    if num_replicas == 1:
        return device_mesh.init_device_mesh(device_type, (ranks,), mesh_dim_names=("shard",))
    shape = (num_replicas, ranks // num_replicas)
    return device_mesh.init_device_mesh(device_type, shape, mesh_dim_names=("replicate", "shard"))


def shard_model(model: nn.Module, mesh: DeviceMesh, policy: ShardingPolicy) -> nn.Module:
    """Shard every network of the algorithm over ``mesh``, in place.

    A block, the rest of a backbone and a head are one unit each. A mesh of two dimensions
    replicates over the first and shards over the second (HSDP).

    Args:
        model: the algorithm, on any device including meta.
        mesh: one or two dimensions.
        policy: precision, resharding, prefetching.
    """
    for _, network in networks_of(model):
        # A backward pass frees what stays gathered; a teacher has none.
        is_trained = any(param.requires_grad for param in network.parameters())
        settings = {
            "mesh": mesh,
            "mp_policy": policy.mixed_precision,
            "reshard_after_forward": policy.reshard_after_forward or not is_trained,
        }
        for name, child in network.named_children():
            if name == "backbone":
                _shard_backbone(child, settings, policy.num_prefetch)
            else:
                fully_shard(child, **settings)
                register_fsdp_forward_method(child, "project_and_prototypes")
    return model


def _shard_backbone(backbone: nn.Module, settings: dict, num_prefetch: int) -> None:
    units = units_of(backbone)
    for unit in units:
        fully_shard(unit, **settings)
    fully_shard(backbone, **settings)
    for method in _FORWARD_METHODS:
        if hasattr(backbone, method):
            register_fsdp_forward_method(backbone, method)
    for index, unit in enumerate(units):
        ahead = units[index + 1 : index + 1 + num_prefetch]
        behind = units[max(0, index - num_prefetch) : index][::-1]
        if ahead:
            unit.set_modules_to_forward_prefetch(ahead)
        if behind:
            unit.set_modules_to_backward_prefetch(behind)


def sharded_modules(model: nn.Module) -> list[FSDPModule]:
    """Every unit of the model that FSDP2 manages."""
    return [module for module in model.modules() if isinstance(module, FSDPModule)]


class GradientReduction:
    """Tells the units of a sharded model whether the coming backward pass reduces gradients.

    By default only that of the last micro batch of a step does: the others add up the whole
    gradients of every unit, in the dtype of the reduction, on every rank. With
    ``every_micro_batch`` each backward pass reduces and only shards are kept; replicas (HSDP) are
    still averaged once a step.

    Args:
        model: the sharded algorithm.
        every_micro_batch: less memory for more traffic.
    """

    def __init__(self, model: nn.Module, *, every_micro_batch: bool = False) -> None:
        self._units = sharded_modules(model)
        self.every_micro_batch = every_micro_batch

    def __call__(self, is_last: bool) -> None:
        """Prepare a micro batch.

        Args:
            is_last: whether the optimizer steps after it.
        """
        for unit in self._units:
            unit.set_requires_gradient_sync(is_last or self.every_micro_batch, recurse=False)
            unit.set_requires_all_reduce(is_last, recurse=False)


# --- The EMA teacher must lie as the student does, so that its update needs no messages ---


_SHOWN = 4


def check_alignment(model: nn.Module) -> int:
    """Compare student and EMA teacher of the algorithm, and of every student of several.

    ``teacher = m * teacher + (1 - m) * student`` pairs the parameters by position and works on each
    rank's own shards: names, order, shapes and the placement of the shards must be equal.

    Args:
        model: the algorithm, sharded or not.

    Returns:
        Number of pairs of parameters.

    Raises:
        ValueError: with the first parameters that differ.
    """
    algorithms = dict(getattr(model, "students", {})) or {"": model}
    return sum(_check(name, algorithm) for name, algorithm in algorithms.items())


def _check(name: str, algorithm: nn.Module) -> int:
    student = dict(algorithm.student.named_parameters())
    teacher = dict(algorithm.teacher.named_parameters())
    findings = list(_differences(student, teacher))
    if findings:
        who = f"student {name!r} and its EMA teacher" if name else "student and EMA teacher"
        more = f" and {len(findings) - _SHOWN} more" if len(findings) > _SHOWN else ""
        raise ValueError(
            f"{who} are not aligned, so the teacher cannot follow on each rank's own shards: "
            f"{'; '.join(findings[:_SHOWN])}{more}. Build the teacher as a copy of the student, "
            "change both alike (adapters, frozen or replaced layers), and shard both over the same "
            "ranks"
        )
    return len(student)


def _differences(student: dict[str, Tensor], teacher: dict[str, Tensor]) -> Iterator[str]:
    for name in sorted(student.keys() - teacher.keys()):
        yield f"{name} is missing in the teacher"
    for name in sorted(teacher.keys() - student.keys()):
        yield f"{name} is missing in the student"
    if student.keys() == teacher.keys() and list(student) != list(teacher):
        first = next(pair for pair in zip(student, teacher) if pair[0] != pair[1])
        yield f"the student has {first[0]} where the teacher has {first[1]}"
    for name in student:
        if name in teacher:
            yield from _difference(name, student[name], teacher[name])


def _difference(name: str, student: Tensor, teacher: Tensor) -> Iterator[str]:
    if student.shape != teacher.shape:
        kinds = (tuple(student.shape), tuple(teacher.shape))
    elif student.dtype != teacher.dtype:
        kinds = (student.dtype, teacher.dtype)
    elif _layout(student) != _layout(teacher):
        kinds = (_layout_words(student), _layout_words(teacher))
    else:
        return
    yield f"{name} is {kinds[0]} in the student, {kinds[1]} in the teacher"


def _layout(tensor: Tensor) -> tuple | None:
    return (tensor.device_mesh, tensor.placements) if isinstance(tensor, DTensor) else None


def _layout_words(tensor: Tensor) -> str:
    if not isinstance(tensor, DTensor):
        return "whole"
    placements = ", ".join(map(str, tensor.placements))
    return f"{placements} over ranks {tensor.device_mesh.mesh.flatten().tolist()}"


# --- Storage and initial values of what was built on the meta device ---
#
# Every rank draws each tensor whole, keeps its shard and drops the rest, so the values are those
# of one process with the same seed, and no rank ever holds more than one whole tensor.


_RANDOM = (torch.ops.aten.uniform_.default, torch.ops.aten.normal_.default)


@torch.no_grad()
def materialise(model: nn.Module, device: torch.device) -> None:
    """Give every meta tensor storage on ``device``, filled with NaN, and move all others there."""
    for module in model.modules():
        for tensors in (module._parameters, module._buffers):
            for name, tensor in tensors.items():
                if tensor is not None and tensor.is_meta:
                    tensors[name] = _like(tensor, _nan(tensor, device))
    # Not by hand: modules that keep a device of their own learn of it here, such as the data
    # preprocessor, which moves every batch to it.
    model.to(device)


def _nan(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    empty = torch.empty_like(tensor, device=device)
    return empty.fill_(torch.nan) if empty.is_floating_point() else empty.zero_()


def _like(old: torch.Tensor, new: torch.Tensor) -> torch.Tensor:
    return nn.Parameter(new, old.requires_grad) if isinstance(old, nn.Parameter) else new


class WholeTensorDraws(TorchDispatchMode):
    """Context in which in-place random draws on shards give each rank its part of a whole draw."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        target = args[0] if args else None
        if func not in _RANDOM or not isinstance(target, DTensor):
            return func(*args, **(kwargs or {}))
        local = target.to_local()
        whole = torch.empty(target.shape, dtype=local.dtype, device=local.device)
        func(whole, *args[1:], **(kwargs or {}))
        part = distribute_tensor(whole, target.device_mesh, target.placements, src_data_rank=None)
        local.copy_(part.to_local())
        return target


def check_initialised(model: nn.Module) -> None:
    """Raise a ``RuntimeError`` that names tensors to which the initialisation gave no value."""
    left = []
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        local = tensor.to_local() if isinstance(tensor, DTensor) else tensor
        if local.is_floating_point() and torch.isnan(local).any():
            left.append(name)
    if left:
        raise RuntimeError(
            f"{len(left)} tensors were not initialised, e.g. {', '.join(left[:5])}: init_weights "
            "must write every parameter and buffer of a module that is built on the meta device"
        )


# --- The strategy ---


@STRATEGIES.register_module()
class FSDP2Strategy(PretrainStrategy):
    """Parameters, gradients and optimizer state in shards: one per rank.

    Args:
        param_dtype (str): ``'fp32'`` or ``'bf16'``: dtype in which parameters are gathered.
        reduce_dtype (str): ``'fp32'`` or ``'bf16'``: dtype in which gradients are averaged.
        reshard_after_forward (bool): Free gathered parameters between forward and backward pass.
        num_replicas (int): Groups of ranks that each hold a whole copy in shards (HSDP); 1 shards
            over all ranks.
        num_prefetch (int): Blocks gathered ahead.
        reduce_every_micro_batch (bool): With several micro batches per step: reduce gradients after
            each of them, so that no rank keeps whole ones. Defaults to False: once a step.
        checkpoint (str): ``'sharded'``: folders that all ranks write; ``'whole'``: one file, as of
            the other strategies, gathered in the main memory of the first rank. Either is resumed
            by any strategy on any number of ranks.
        save_in_background (bool): Go on training while a sharded checkpoint is written, on GPUs
            too; it has its name as soon as all ranks have written. Needs main memory for a copy of
            this rank's shards.
        **kwargs: See :class:`mmengine._strategy.BaseStrategy`.

    Raises:
        ValueError: If a dtype is unknown, the ranks cannot be cut into the replicas, or student and
            EMA teacher are not aligned.
    """

    def __init__(
        self,
        *,
        param_dtype: str = "fp32",
        reduce_dtype: str = "fp32",
        reshard_after_forward: bool = True,
        num_replicas: int = 1,
        num_prefetch: int = 1,
        reduce_every_micro_batch: bool = False,
        checkpoint: str = "sharded",
        save_in_background: bool = False,
        **kwargs,
    ) -> None:
        self.policy = ShardingPolicy.of(
            param_dtype=param_dtype,
            reduce_dtype=reduce_dtype,
            reshard_after_forward=reshard_after_forward,
            num_prefetch=num_prefetch,
        )
        if checkpoint not in ("sharded", "whole"):
            raise ValueError(f"checkpoint must be 'sharded' or 'whole', got {checkpoint!r}")
        super().__init__(**kwargs)
        self.saves_shards = checkpoint == "sharded"
        self.save_in_background = save_in_background
        self._background_group: dist.ProcessGroup | None = None
        self._pending: tuple[str, Future] | None = None
        self.num_replicas = num_replicas
        self.reduce_every_micro_batch = reduce_every_micro_batch

    def build_model(self, model: nn.Module | dict) -> nn.Module:
        """Build the model without storage.

        Raises:
            ValueError: a model with several students.
        """
        if not isinstance(model, nn.Module):
            with torch.device("meta"):
                model = MODELS.build(model)
        if hasattr(model, "students"):
            raise ValueError(
                f"FSDP2Strategy trains one student, and {type(model).__name__} has "
                f"{len(model.student_names)}: use strategy=dict(type='MultiDistillationStrategy'), "
                "which keeps each student whole on its ranks, or distil the students one by one"
            )
        return model

    def _init_model_weights(self, model: nn.Module) -> nn.Module:
        return model  # after sharding, see _wrap_model

    def _wrap_model(self, model: nn.Module) -> nn.Module:
        mesh = self._mesh()
        if self.save_in_background:
            self._background_group = new_background_group()
        shard_model(self._accelerated(model), mesh, self.policy)
        pairs = check_alignment(model)
        materialise(model, training_device())
        self._init_shards(model)
        local = sum(_local(p).numel() for p in model.parameters())
        total = sum(p.numel() for p in model.parameters())
        self.logger.info(
            f"FSDP2: {len(sharded_modules(model))} units over {_words(mesh)}; "
            f"{total / 1e6:.2f} M parameters, {local / 1e6:.2f} M on this rank; gathered as "
            f"{self.policy.param_dtype or torch.float32}, reduced as {self.policy.reduce_dtype}, "
            f"resharded after forward: {self.policy.reshard_after_forward}; EMA teacher aligned "
            f"with the student: {pairs} parameters"
        )
        return model

    def _init_shards(self, model: nn.Module) -> None:
        """Draw or read the first values; a dry run has none."""
        torch.manual_seed(torch_seed(self.seed, BEFORE_THE_FIRST_STEP))
        with WholeTensorDraws(), reading_for_shards():
            model.init_weights()
        check_initialised(model)

    def build_optim_wrapper(
        self, optim_wrapper: OptimWrapper | dict, model: nn.Module | None = None
    ) -> OptimWrapper:
        """Build the wrapper and tell it when sharded gradients are reduced.

        Raises:
            ValueError: an optimizer whose fused kernel does not take shards.
        """
        wrapper = super().build_optim_wrapper(optim_wrapper, model)
        if not isinstance(wrapper.optimizer, (torch.optim.Adam, torch.optim.AdamW)):
            raise ValueError(
                f"optim_wrapper.optimizer: the fused {type(wrapper.optimizer).__name__} of torch "
                "does not step on shards; use AdamW or Adam with FSDP2Strategy, or train with "
                "PretrainDDPStrategy"
            )
        wrapper.reduce_gradients = GradientReduction(
            self.model, every_micro_batch=self.reduce_every_micro_batch
        )
        return wrapper

    def save_checkpoint(
        self,
        filename: str,
        *,
        extra_ckpt: dict | None = None,
        callback: Callable[[dict], None] | None = None,
        **_,
    ) -> None:
        """Write a checkpoint from all ranks; see :class:`PretrainStrategy`."""
        if not self.saves_shards:
            super().save_checkpoint(filename, extra_ckpt=extra_ckpt, callback=callback)
            return
        self.finish_saving()
        state = self._plain_state(extra_ckpt)
        if callback is not None:
            callback(state)
        write = save_sharded_state(
            filename,
            self.unwrapped_model,
            self.optim_wrapper.optimizer,
            state,
            background_group=self._background_group,
        )
        if write is not None:
            self._pending = (filename, write)

    def finish_saving(self) -> None:
        """Wait for the checkpoint that is still being written, if any."""
        pending, self._pending = self._pending, None
        if pending is not None:
            finish(*pending)

    @property
    def is_saving(self) -> bool:
        """Whether a checkpoint is being written in the background, or was and nobody waited."""
        return self._pending is not None

    def gather_state(self) -> tuple[dict, dict]:
        """Whole tensors on the CPU of the first rank, one gathered at a time; all ranks call it."""
        states = []
        for state in (self.unwrapped_model.state_dict(), self.optim_state_dict()):
            whole = tree_map_only(torch.Tensor, self._to_first_rank, state)
            states.append(whole if is_main_process() else {})
        return states[0], states[1]

    def _to_first_rank(self, tensor: torch.Tensor) -> torch.Tensor | None:
        whole = gather_whole(tensor)
        return whole if is_main_process() else None

    def _mesh(self) -> DeviceMesh:
        kind = training_device().type
        if not dist.is_initialized():
            backend = "nccl" if kind == "cuda" else "gloo"
            dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
        return build_mesh(kind, self.num_replicas)


def _local(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def _words(mesh: DeviceMesh) -> str:
    sizes = zip(mesh.mesh_dim_names, mesh.shape)
    return " x ".join(f"{name} {size}" for name, size in sizes) + f" ({mesh.device_type})"
