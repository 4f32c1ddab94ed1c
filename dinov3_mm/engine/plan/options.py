"""The choices that trade memory against time, and the config lines that make them."""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product

from mmengine.config import Config

from dinov3_mm.engine.dry_run.settle import FSDP2, strategy_name

RECOMPUTE = (False, "selective", True)
CHUNK_SIZE = 16384


@dataclass(frozen=True)
class Option:
    """One way to run the same step.

    Attributes:
        strategy: 'single', 'ddp' or 'fsdp2'.
        reshard: FSDP2 frees gathered parameters between forward and backward pass.
        param_bytes: of a gathered parameter under FSDP2.
        reduce_bytes: of a gradient while FSDP2 reduces it.
        num_replicas: FSDP2's groups of ranks that each hold all parameters.
        recompute: ``with_cp`` of the backbone.
        chunk_size: ``prototype_chunk_size`` of the model.
    """

    strategy: str
    recompute: bool | str
    chunk_size: int | None
    reshard: bool = True
    param_bytes: int = 4
    reduce_bytes: int = 4
    num_replicas: int = 1

    @property
    def is_sharded(self) -> bool:
        """Whether parameters are sharded."""
        return self.strategy == "fsdp2"

    @property
    def strategy_words(self) -> str:
        """The strategy as a table shows it."""
        if self.strategy != "fsdp2":
            return {"single": "one process", "ddp": "DDP"}[self.strategy]
        return "FSDP2" if self.reshard else "FSDP2, parameters stay gathered"

    def config_lines(self) -> list[str]:
        """What to set in the config."""
        dtype = {2: "bf16", 4: "fp32"}
        kinds = {"single": "PretrainStrategy", "ddp": "PretrainDDPStrategy"}
        arguments = f"type={kinds.get(self.strategy, FSDP2)!r}"
        if self.is_sharded:
            arguments += f", param_dtype={dtype[self.param_bytes]!r}"
            arguments += f", reshard_after_forward={self.reshard}"
            if self.num_replicas > 1:
                arguments += f", num_replicas={self.num_replicas}"
        return [
            f"strategy = dict({arguments})",
            f"model = dict(prototype_chunk_size={self.chunk_size}, "
            f"backbone=dict(with_cp={self.recompute!r}))",
        ]


def option_of(cfg: Config, world_size: int) -> Option:
    """The choice that the config makes."""
    strategy = cfg.get("strategy") or {}
    common = {
        "recompute": cfg.model["backbone"].get("with_cp", False),
        "chunk_size": cfg.model.get("prototype_chunk_size"),
    }
    if strategy_name(cfg) != FSDP2:
        return Option("single" if world_size == 1 else "ddp", **common)
    return Option(
        "fsdp2",
        reshard=strategy.get("reshard_after_forward", True),
        param_bytes=2 if strategy.get("param_dtype", "fp32") == "bf16" else 4,
        reduce_bytes=2 if strategy.get("reduce_dtype", "fp32") == "bf16" else 4,
        num_replicas=strategy.get("num_replicas", 1),
        **common,
    )


def all_options(cfg: Config, world_size: int) -> Iterator[Option]:
    """The config's own choice first, then every combination that is worth a look."""
    own = option_of(cfg, world_size)
    yield own
    compute = 2 if cfg.model.get("compute_dtype", "fp32") == "bf16" else 4
    sharded = {"param_bytes": own.param_bytes if own.is_sharded else compute}
    sharded["num_replicas"] = own.num_replicas
    ways = [{"strategy": "single" if world_size == 1 else "ddp"}]
    if world_size > 1:
        ways += [{"strategy": "fsdp2", "reshard": stay, **sharded} for stay in (False, True)]
    chunk = own.chunk_size or CHUNK_SIZE
    for way, recompute, size in product(ways, RECOMPUTE, (None, chunk)):
        option = Option(recompute=recompute, chunk_size=size, **way)
        if option != own:
            yield option
