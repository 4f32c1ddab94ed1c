"""FlexibleRunner strategy on PyTorch's ``fully_shard``."""

from collections.abc import Callable
from concurrent.futures import Future

import torch
import torch.distributed as dist
from mmengine.dist import is_main_process
from mmengine.optim import OptimWrapper
from mmengine.registry import MODELS, STRATEGIES
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor
from torch.utils._pytree import tree_map_only

from dinov3_mm.checkpoints.sharding import gather_whole
from dinov3_mm.checkpoints.unread import reading_for_shards
from dinov3_mm.datasets.randomness import torch_seed
from dinov3_mm.engine.runner.sharded_state import (
    finish,
    new_background_group,
    save_sharded_state,
)
from dinov3_mm.engine.strategy import BEFORE_THE_FIRST_STEP, PretrainStrategy, training_device

from .accumulation import GradientReduction
from .alignment import check_alignment
from .initialisation import WholeTensorDraws, check_initialised, materialise
from .sharding import ShardingPolicy, build_mesh, shard_model, sharded_modules


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
