"""How the networks of the algorithm are cut into shards with PyTorch's ``fully_shard``."""

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed import device_mesh
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import (
    FSDPModule,
    MixedPrecisionPolicy,
    fully_shard,
    register_fsdp_forward_method,
)

from dinov3_mm.engine.networks import networks_of, units_of

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
