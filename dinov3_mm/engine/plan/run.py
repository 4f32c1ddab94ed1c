"""The plan of a config on some numbers of GPUs."""

import copy
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from mmengine.config import Config
from rich.console import Console
from rich.table import Table
from torch import nn

from dinov3_mm.engine.dry_run.batches import crop_sets
from dinov3_mm.engine.dry_run.config import check_numbers, needs_process_group, settle_config
from dinov3_mm.engine.dry_run.fake_world import fake_ranks
from dinov3_mm.engine.dry_run.model import build_on_meta
from dinov3_mm.engine.dry_run.run import as_bytes, make_table
from dinov3_mm.errors import ConfigError

from .memory import MemoryPlan, plan_memory
from .options import COMMON_KEYS, RECOMPUTE, Option, all_options, option_of
from .work import Traffic, step_flops, step_traffic
from .workload import Workload, read_workload

# Share of a GPU's memory that tensors should leave free: for CUDA's context and kernels, NCCL's
# buffers, and what the allocator rounds up and cannot use again.
RESERVE = 0.1
# An image needs another for KoLeo.
LEAST_IMAGES = 2


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
class SmallerBatch:
    """A batch with which something fits.

    Attributes:
        setting: what to set in ``train_cfg``.
        best: the cheapest option that fits.
        lines: what else to set in the config.
    """

    setting: dict[str, int]
    best: OptionPlan
    lines: list[str]


@dataclass(frozen=True)
class Plan:
    """Predictions for one number of GPUs; the first option is the config's own.

    Attributes:
        gpus: ranks.
        derived: how values 'auto' were derived.
        options: predictions.
        common: settings of the config's strategy that another one keeps.
        smaller: where nothing fits, batches with which something does.
    """

    gpus: int
    derived: list[str]
    options: list[OptionPlan]
    common: dict[str, Any] = field(default_factory=dict)
    smaller: list[SmallerBatch] = field(default_factory=list)

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
        memory_gib: memory of a GPU, for values 'auto' and for what fits.
        gpus_per_node: GPUs of a machine.
        on_gpu: predict the paths on a GPU, otherwise those on a CPU.

    Raises:
        ConfigError: a config that so many ranks cannot train, or a model whose step is unknown.
    """
    check_numbers(gpus, num_images=num_images, memory_gib=memory_gib)
    if gpus_per_node < 1:
        raise ConfigError(f"a machine has at least 1 GPU, got {gpus_per_node}")
    cfg = copy.deepcopy(cfg)
    with fake_ranks(gpus if needs_process_group(cfg, gpus) else None):
        derived = settle_config(cfg, gpus, num_images=num_images, memory_gib=memory_gib)
        model = build_on_meta(cfg)
        options = _plan_options(cfg, model, gpus, gpus_per_node, on_gpu=on_gpu)
        common = {key: cfg.strategy[key] for key in COMMON_KEYS if key in cfg.strategy}
        plan = Plan(gpus, derived, options, common)
        if memory_gib is None or plan.cheapest(memory_gib * 2**30) is not None:
            return plan
        for setting in ("accumulate", "global_batch_size"):
            for changed in _smaller(cfg.train_cfg, setting, gpus):
                cfg_changed = copy.deepcopy(cfg)
                cfg_changed.train_cfg.update(changed)
                tried = Plan(
                    gpus,
                    [],
                    _plan_options(cfg_changed, model, gpus, gpus_per_node, on_gpu=on_gpu),
                )
                best = tried.cheapest(memory_gib * 2**30)
                if best is not None:
                    lines = best.option.config_lines(options[0].option, common)
                    plan.smaller.append(SmallerBatch(changed, best, lines))
                    break
    return plan


def own_peaks(cfg: Config, gpus: int, *, on_gpu: bool = True) -> list[int]:
    """Predicted peak of what a completed config says itself, for each set of crop sizes, in bytes.

    Args:
        cfg: a pretraining config without values 'auto'.
        gpus: number of ranks.
        on_gpu: predict the paths on a GPU, otherwise those on a CPU.

    Raises:
        ConfigError: a model whose step is unknown.
    """
    model, option = build_on_meta(cfg), option_of(cfg, gpus)
    works = (read_workload(cfg, model, crops) for crops in crop_sets(cfg, gpus))
    return [plan_memory(work, option, gpus, on_gpu=on_gpu).peak for work in works]


def _plan_options(
    cfg: Config, model: nn.Module, gpus: int, gpus_per_node: int, *, on_gpu: bool
) -> list[OptionPlan]:
    """Predictions of a completed config: its own option first."""
    works = [read_workload(cfg, model, crops) for crops in crop_sets(cfg, gpus)]
    return [
        plan_option(works, option, gpus, on_gpu=on_gpu)
        for option in all_options(cfg, gpus, gpus_per_node)
    ]


def _smaller(train_cfg: Mapping[str, Any], key: str, gpus: int) -> Iterator[dict[str, int]]:
    """Settings that halve the images of a micro batch again and again, down to two on a GPU."""
    batch, accumulate = train_cfg["global_batch_size"], train_cfg.get("accumulate", 1)
    images = batch // (gpus * accumulate)
    factor = 2
    while images % factor == 0 and images // factor >= LEAST_IMAGES:
        yield {key: accumulate * factor if key == "accumulate" else batch // factor}
        factor *= 2


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


# --- A plan as tables, and what it recommends ---


NETWORK_WORDS = {
    "student": "student's parameters",
    "teacher": "EMA teacher",
    "gram_teacher": "Gram teacher",
    "distillation_teacher": "distillation teacher",
    "optimizer": "optimizer state",
    "gradients": "gradients (DDP's buckets)",
}


def print_plan(plan: Plan, gpu_gib: float, gpus_per_node: int, console: Console) -> None:
    """Print the predictions for one number of GPUs.

    Args:
        plan: the predictions.
        gpu_gib: memory of a GPU.
        gpus_per_node: GPUs of a machine.
        console: where to.
    """
    nodes = -(-plan.gpus // gpus_per_node)
    own = plan.options[0]
    console.rule(f"{plan.gpus} GPU(s) of {gpu_gib:g} GiB, {nodes} node(s)", align="left")
    for line in plan.derived:
        console.print(line, highlight=False)
    crops = own.work.crops
    console.print(
        f"as configured: {own.option.strategy_words}; {crops.images} images per GPU, {crops}; "
        f"{crops.num_masked} masked patches",
        highlight=False,
    )
    console.print(_memory(own))
    console.print(_flops(own, plan.gpus))
    if own.traffic:
        console.print(_traffic(own))
    console.print(_options(plan, gpu_gib))
    _recommend(plan, gpu_gib, console)


def _memory(plan: OptionPlan) -> Table:
    memory = plan.memory
    rows = [(NETWORK_WORDS[name], as_bytes(size)) for name, size in memory.resident.items()]
    if "gradients" not in memory.resident:
        rows.append(("gradients", as_bytes(memory.gradients)))
    rows += [
        ("activations for the backward pass", as_bytes(memory.activations)),
        ("logits, targets and their gradients", as_bytes(memory.prototypes)),
        ("gathered parameters, gradients in flight", as_bytes(memory.gathered)),
        (f"peak: {memory.fullest}", as_bytes(memory.peak)),
    ]
    return make_table("memory of a GPU (not all at the same time)", ("kind", "size"), rows)


def _flops(plan: OptionPlan, gpus: int) -> Table:
    rows = [
        (name, _tera(count), _tera(count * gpus)) for name, count in plan.flops.items() if count
    ]
    rows.append(("step", _tera(plan.total_flops), _tera(plan.total_flops * gpus)))
    return make_table("TFLOP of a step", ("part", "per GPU", "all GPUs"), rows)


def _traffic(plan: OptionPlan) -> Table:
    rows = [
        (
            row.purpose,
            row.operation,
            "in buckets" if row.calls is None else f"{row.calls:,}",
            as_bytes(row.size),
            as_bytes(row.sent),
        )
        for row in plan.traffic
    ]
    rows.append(("step", "", "", "", as_bytes(plan.sent)))
    header = ("of", "collective", "calls", "whole tensors", "sent per GPU")
    return make_table("communication of a step", header, rows)


def _options(plan: Plan, gpu_gib: float) -> Table:
    cheapest = plan.cheapest(gpu_gib * 2**30)
    rows = []
    for index, each in enumerate(plan.options):
        fits = each.fits(gpu_gib * 2**30)
        mark = "recommended" if each is cheapest else ""
        option = each.option
        rows.append(
            (
                ("* " if index == 0 else "") + option.strategy_words,
                {False: "nothing", True: "everything", "selective": "selective"}[option.recompute],
                "whole" if option.chunk_size is None else f"chunks of {option.chunk_size:,}",
                as_bytes(each.memory.peak),
                "yes" if fits else "no",
                _tera(each.total_flops),
                as_bytes(each.sent),
                mark,
            )
        )
    header = ("strategy", "recomputed", "prototypes", "peak", "fits", "TFLOP", "sent", "")
    title = f"options (*: as configured; fits: {RESERVE:.0%} of the GPU stay free)"
    return make_table(title, header, rows)


def _recommend(plan: Plan, gpu_gib: float, console: Console) -> None:
    cheapest = plan.cheapest(gpu_gib * 2**30)
    if cheapest is None:
        _recommend_smaller(plan, console)
        return
    lines = cheapest.option.config_lines(plan.options[0].option, plan.common)
    if not lines:
        console.print("The cheapest that fits is what the config says.", highlight=False)
        return
    own = "The config's own choice fits too. " if plan.options[0].fits(gpu_gib * 2**30) else ""
    console.print(f"{own}The cheapest that fits; set in the config:", highlight=False)
    _print_lines(lines, console)


def _recommend_smaller(plan: Plan, console: Console) -> None:
    least = min(plan.options, key=lambda each: each.memory.peak)
    images = least.work.crops.images
    console.print(
        f"Nothing fits with {images} images per GPU: the least is {as_bytes(least.memory.peak)}. "
        + ("It fits with either of:" if plan.smaller else "Take more or larger GPUs."),
        highlight=False,
    )
    for each in plan.smaller:
        (name, value), best = next(iter(each.setting.items())), each.best
        words = f"{best.work.crops.images} images at a time, {best.option.strategy_words}"
        console.print(
            f"  {words}: {as_bytes(best.memory.peak)}, {_tera(best.total_flops)} TFLOP, "
            f"{as_bytes(best.sent)} sent; set in the config:",
            highlight=False,
            soft_wrap=True,
        )
        _print_lines([f"train_cfg = dict({name}={value})", *each.lines], console)


def _print_lines(lines: list[str], console: Console) -> None:
    for line in lines:
        console.print(f"    {line}", highlight=False, soft_wrap=True)


def _tera(count: float) -> str:
    return f"{count / 1e12:,.2f}"
