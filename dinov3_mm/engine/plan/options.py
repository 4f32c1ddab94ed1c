"""The choices that trade memory against time, and the config lines that make them."""

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from itertools import product
from typing import Any

from mmengine.config import Config

from dinov3_mm.engine.dry_run.config import DDP, FSDP2, SINGLE, strategy_name

RECOMPUTE = (False, "selective", True)
CHUNK_SIZE = 16384
_TYPES = {"single": SINGLE, "ddp": DDP, "fsdp2": FSDP2}
_STRATEGY_KEYS = {
    "reshard": "reshard_after_forward",
    "num_replicas": "num_replicas",
    "reduce_every": "reduce_every_micro_batch",
}
# Settings that every strategy has, which another one should keep.
COMMON_KEYS = ("compile_blocks", "fp8_filter", "load_optimizer")


@dataclass(frozen=True)
class Option:
    """One way to run the same step.

    Attributes:
        strategy: 'single', 'ddp' or 'fsdp2'.
        reshard: FSDP2 frees gathered parameters between forward and backward pass.
        param_bytes: of a gathered parameter under FSDP2.
        reduce_bytes: of a gradient while FSDP2 reduces it.
        num_replicas: FSDP2's groups of ranks that each hold all parameters.
        reduce_every: FSDP2 reduces the gradients of every micro batch, so that none wait whole.
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
    reduce_every: bool = False

    @property
    def is_sharded(self) -> bool:
        """Whether parameters are sharded."""
        return self.strategy == "fsdp2"

    @property
    def strategy_words(self) -> str:
        """The strategy as a table shows it."""
        if self.strategy != "fsdp2":
            return {"single": "one process", "ddp": "DDP"}[self.strategy]
        words = "FSDP2" if self.reshard else "FSDP2, parameters stay gathered"
        if self.num_replicas > 1:
            words += f", {self.num_replicas} replicas"
        return f"{words}, each micro batch reduced" if self.reduce_every else words

    def config_lines(self, own: "Option", common: Mapping[str, Any] | None = None) -> list[str]:
        """What to set in a config that makes the choice ``own``.

        Args:
            own: choice of the config.
            common: its settings that another strategy keeps.
        """
        changes = {
            name: value for name, value in asdict(self).items() if value != getattr(own, name)
        }
        strategy = {
            _STRATEGY_KEYS[name]: changes[name] for name in _STRATEGY_KEYS if name in changes
        }
        if "strategy" in changes:
            strategy = {"_delete_": True, "type": _TYPES[self.strategy], **(common or {})}
            if self.is_sharded:
                strategy["param_dtype"] = {2: "bf16", 4: "fp32"}[self.param_bytes]
                strategy["reshard_after_forward"] = self.reshard
                strategy["num_replicas"] = self.num_replicas
                strategy["reduce_every_micro_batch"] = self.reduce_every
        model = {}
        if "chunk_size" in changes:
            model["prototype_chunk_size"] = self.chunk_size
        if "recompute" in changes:
            model["backbone"] = {"with_cp": self.recompute}
        parts = {"strategy": strategy, "model": model}
        return [f"{name} = {_as_call(part)}" for name, part in parts.items() if part]


def _as_call(value: object) -> str:
    if not isinstance(value, dict):
        return repr(value)
    return f"dict({', '.join(f'{key}={_as_call(item)}' for key, item in value.items())})"


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
        reduce_every=strategy.get("reduce_every_micro_batch", False),
        **common,
    )


def all_options(cfg: Config, world_size: int, gpus_per_node: int = 8) -> Iterator[Option]:
    """The config's own choice first, then every combination that is worth a look.

    FSDP2 is tried over all ranks, with gathered parameters kept, in shards within a machine, and of
    several micro batches with the gradients of each reduced.
    """
    own = option_of(cfg, world_size)
    yield own
    compute = 2 if cfg.model.get("compute_dtype", "fp32") == "bf16" else 4
    param_bytes = own.param_bytes if own.is_sharded else compute
    ways = [{"strategy": "single" if world_size == 1 else "ddp"}]
    if world_size > 1:
        nodes, rest = divmod(world_size, gpus_per_node)
        replicas = [1, nodes] if nodes > 1 and not rest else [1]
        several = cfg.train_cfg.get("accumulate", 1) > 1
        ways += [
            {
                "strategy": "fsdp2",
                "reshard": not stay,
                "num_replicas": n,
                "param_bytes": param_bytes,
                "reduce_every": every,
            }
            for n in dict.fromkeys([own.num_replicas, *replicas])
            for stay in (True, False)
            for every in ((False, True) if several else (own.reduce_every,))
        ]
    chunk = own.chunk_size or CHUNK_SIZE
    for way, recompute, size in product(ways, RECOMPUTE, (None, chunk)):
        reduce_bytes = own.reduce_bytes if way["strategy"] == "fsdp2" else 4
        option = Option(recompute=recompute, chunk_size=size, reduce_bytes=reduce_bytes, **way)
        if option != own:
            yield option
