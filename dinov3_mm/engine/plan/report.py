"""A plan as tables, and what it recommends."""

from rich.console import Console
from rich.table import Table

from dinov3_mm.engine.dry_run.report import as_bytes, make_table

from .run import RESERVE, OptionPlan, Plan

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
