"""The plan of a config on some numbers of GPUs."""

import copy
from dataclasses import dataclass

from mmengine.config import Config

from dinov3_mm.engine.dry_run.batches import crop_sets
from dinov3_mm.engine.dry_run.fake_world import fake_ranks
from dinov3_mm.engine.dry_run.model import build_on_meta
from dinov3_mm.engine.dry_run.settle import needs_process_group, settle_config

from .flops import step_flops
from .memory import MemoryPlan, plan_memory
from .options import RECOMPUTE, Option, all_options
from .traffic import Traffic, step_traffic
from .workload import Workload, read_workload

# Share of a GPU's memory that tensors should leave free: for CUDA's context and kernels, NCCL's
# buffers, and what the allocator rounds up and cannot use again.
RESERVE = 0.1


@dataclass(frozen=True)
class OptionPlan:
    """Prediction for one way to run the step.

    Attributes:
        option: the way.
        work: the step of the crop sizes that need most memory.
        memory: of that step, on the first rank.
        flops: operations of one rank by part, mean over the sets of crop sizes.
        traffic: collectives of that step.
    """

    option: Option
    work: Workload
    memory: MemoryPlan
    flops: dict[str, float]
    traffic: list[Traffic]

    def fits(self, gpu_bytes: float) -> bool:
        """Whether the peak leaves a GPU's reserve free."""
        return self.memory.peak <= (1 - RESERVE) * gpu_bytes

    @property
    def total_flops(self) -> float:
        """Operations of one rank in a step."""
        return sum(self.flops.values())

    @property
    def sent(self) -> float:
        """Bytes that a rank sends in a step."""
        return sum(row.sent for row in self.traffic)


@dataclass(frozen=True)
class Plan:
    """Predictions for one number of GPUs; the first option is the config's own.

    Attributes:
        gpus: ranks.
        derived: how values 'auto' were derived.
        options: predictions.
    """

    gpus: int
    derived: list[str]
    options: list[OptionPlan]

    def cheapest(self, gpu_bytes: float) -> OptionPlan | None:
        """Of the options that fit the one with least work; None if none fits.

        Least recomputation first, then fewest operations, least traffic and least memory.
        """
        fitting = [plan for plan in self.options if plan.fits(gpu_bytes)]
        return min(
            fitting,
            key=lambda plan: (
                RECOMPUTE.index(plan.option.recompute),
                plan.total_flops,
                plan.sent,
                plan.memory.peak,
            ),
            default=None,
        )


def make_plan(
    cfg: Config,
    gpus: int,
    *,
    num_images: int | None = None,
    memory_gib: float | None = None,
    gpus_per_node: int = 8,
    on_gpu: bool = True,
) -> Plan:
    """Predict memory, operations and traffic of a config on ``gpus`` ranks.

    Args:
        cfg: a pretraining config; it stays as it is.
        gpus: number of ranks.
        num_images: size of the data set, for values 'auto'; None counts the config's source.
        memory_gib: memory of a GPU, for values 'auto'.
        gpus_per_node: GPUs of a machine.
        on_gpu: predict the paths on a GPU, otherwise those on a CPU.

    Raises:
        ConfigError: a config that so many ranks cannot train, or a model whose step is unknown.
    """
    cfg = copy.deepcopy(cfg)
    with fake_ranks(gpus if needs_process_group(cfg, gpus) else None):
        derived = settle_config(cfg, gpus, num_images=num_images, memory_gib=memory_gib)
        sets = crop_sets(cfg, gpus)
        model = build_on_meta(cfg)
    works = [read_workload(cfg, model, crops) for crops in sets]
    options = [plan_option(works, option, gpus, on_gpu=on_gpu) for option in all_options(cfg, gpus)]
    return Plan(gpus, derived, options)


def plan_option(
    works: list[Workload], option: Option, gpus: int, *, on_gpu: bool = True
) -> OptionPlan:
    """Prediction for one way; ``works`` are the steps of all sets of crop sizes."""
    memory, work = max(
        ((plan_memory(work, option, gpus, on_gpu=on_gpu), work) for work in works),
        key=lambda pair: pair[0].peak,
    )
    parts: dict[str, float] = {}
    for each in works:
        for name, count in step_flops(each, option).items():
            parts[name] = parts.get(name, 0) + each.crops.ratio * count
    return OptionPlan(option, work, memory, parts, step_traffic(work, option, gpus))
