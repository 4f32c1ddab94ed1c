"""Blocks on the device: attention backends, compilation, recomputation, CUDA graphs."""

import gc
import itertools
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor
from torch._dynamo.utils import counters
from torch.profiler import ProfilerActivity, profile

from benchmarks.train_step import Trainer
from dinov3_mm.engine.strategies.ddp import COMPILE_OPTIONS, compile_units, mark_steps
from dinov3_mm.models.layers import RotaryEmbedding2D, SelfAttention
from dinov3_mm.models.layers.attention import ATTN_BACKENDS
from dinov3_mm.models.losses import compile_losses
from tests.gpu_check.check import ROOT, Check, Skip, exact_products, relative_error
from tests.gpu_check.training import (
    GRADIENT_BAR,
    LOSS_BAR,
    losses_and_gradients,
    losses_of_steps,
    make_trainer,
    quickstart_config,
    worst_gradient,
    worst_loss,
)

# Of compiled blocks and losses against eager ones, which round more often in bf16: on a CPU 4e-3 in
# the losses of three steps and 2e-2 in the gradients of the quickstart's model.
STEP_BARS = {"fp32": (LOSS_BAR, GRADIENT_BAR), "bf16": (1e-2, 5e-2)}
# Kept bytes of compiled blocks against those of eager ones, recomputed by the same policy. On a GPU
# autocast's copies of the weights are a twelfth of them, and one of the two may make them anew.
KEPT_BARS = {"cpu": 0.02, "cuda": 0.1}
# Of attention against that of each sequence alone in fp32.
ATTENTION_BARS = {torch.float32: 1e-5, torch.bfloat16: 2e-2}
# (images, rows and columns of patches) of the crops in the comparison.
CROPS = ((2, (14, 14)), (5, (6, 6)), (3, (7, 5)))


def attention_backends(check: Check) -> None:
    """Every backend on packed crops against each sequence alone in fp32, and its time."""
    exact_products()
    torch.manual_seed(0)
    reference = SelfAttention(128, 2, backend="sdpa")
    for parameter in reference.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    shapes = [(images, 1 + rows * columns) for images, (rows, columns) in CROPS]
    x = torch.randn(sum(images * tokens for images, tokens in shapes), 128)
    rope = RotaryEmbedding2D(64, dtype="fp32")
    tables = [rope(*grid) for _, grid in CROPS]
    weight = torch.randn_like(x)
    expected = _alone(reference, x, shapes, tables, weight)
    for name, dtype in itertools.product(_backends(), ATTENTION_BARS):
        for compiled in (False, True):
            words = f"{name}, {str(dtype)[6:]}, {'compiled' if compiled else 'eager'}"
            with check.part(words):
                if compiled:
                    check.require_compiler()
                layer = _backend(name, reference, check)
                _forget_graphs()
                found = _packed(layer, compiled, (x, shapes, tables, weight), check, dtype)
                for what, actual in found.items():
                    error = relative_error(actual, expected[what])
                    check.at_most(f"{words}: {what}", error, ATTENTION_BARS[dtype])
                if compiled:
                    breaks = sum(counters["graph_break"].values())
                    check.at_most(f"{words}: graph breaks", breaks, 0)
    _time_backends(check)


def _forget_graphs() -> None:
    """Start anew: after eight compilations of one function torch would go on without compiling."""
    torch.compiler.reset()
    counters.clear()


def _backends() -> list[str]:
    return [name for name in ATTN_BACKENDS if name != "auto"]


def _backend(name: str, reference: SelfAttention, check: Check) -> SelfAttention:
    """The layer with another backend on the device.

    Raises:
        Skip: if the backend is not installed.
    """
    dims = reference.qkv.in_features
    try:
        layer = SelfAttention(dims, reference.num_heads, backend=name)
    except ImportError as error:
        raise Skip(str(error)) from error
    if name == "xformers" and not check.on_gpu:
        raise Skip("needs cuda")
    layer.load_state_dict(reference.state_dict())
    return layer.to(check.device)


def _alone(reference: SelfAttention, x: Tensor, shapes: list, tables: list, weight: Tensor) -> dict:
    """Output and gradient of the input, one sequence after the other, on the CPU in fp32."""
    x = x.clone().requires_grad_()
    outputs, start = [], 0
    for (images, tokens), table in zip(shapes, tables, strict=True):
        for _ in range(images):
            outputs.append(reference(x[start : start + tokens], [(1, tokens)], [table]))
            start += tokens
    output = torch.cat(outputs)
    (grad,) = torch.autograd.grad(output, x, weight)
    return {"output": output.detach(), "gradient": grad}


def _packed(
    layer: SelfAttention, compiled: bool, inputs: tuple, check: Check, dtype: torch.dtype
) -> dict[str, Tensor]:
    """Output and gradient of the input on the device, all sequences in one call."""
    x, shapes, tables, weight = inputs
    x = x.to(check.device, dtype).requires_grad_()
    tables = [tuple(half.to(check.device) for half in table) for table in tables]
    with torch.autocast(check.device.type, torch.bfloat16, enabled=dtype == torch.bfloat16):
        packing = layer.pack(x, shapes)  # outside of what is compiled, as the backbone does
        if packing.backend != layer.backend:
            raise Skip(f"{layer.backend} does not run here in {dtype}")
        output = (torch.compile(layer) if compiled else layer)(x, shapes, tables, packing)
    (grad,) = torch.autograd.grad(output, x, weight.to(check.device, output.dtype))
    return {"output": output.detach(), "gradient": grad}


def _time_backends(check: Check) -> None:
    """``benchmarks/attention_backends.py`` on the recipe's shapes: which backend 'auto' takes."""
    script = ROOT / "benchmarks/attention_backends.py"
    sizes = ("64" if check.is_large else "16", "7", "5") if check.on_gpu else ("1", "1", "1")
    with tempfile.TemporaryDirectory() as folder, check.part("times"):
        out = Path(folder) / "result.json"
        command = [str(script), "--device", check.device.type, "--out", str(out)]
        command += ["--images", sizes[0], "--pairs", sizes[1], "--repeats", sizes[2]]
        # What is recorded is what attn_backend='auto' takes on this GPU from now on.
        command += ["--record"] if check.on_gpu else ["--arch", "small"]
        report = check.json_of(command, out)
        for state in ("plain", "compiled"):
            for name, cell in report[state].items():
                what = f"{name}, {state}: attention of {sizes[0]} images, forward and backward"
                check.note(what, cell["milliseconds"], "ms")
            cells = report[state]
            best = min(cells, key=lambda name: cells[name]["milliseconds"])
            check.note(f"auto should choose, {state}", best)


def compile(check: Check) -> None:
    """Compiled blocks and losses against eager ones: values, gradients, graph breaks."""
    check.require_compiler()
    exact_products()
    for dtype, bars in STEP_BARS.items():
        cfg = quickstart_config()
        eager, compiled = (make_trainer(cfg, dtype, check) for _ in range(2))
        _forget_graphs()
        count = compile_units(compiled.model)
        batches = list(eager.batches(3, num_workers=0))
        expected = losses_and_gradients(eager, batches[0])
        expected_steps = losses_of_steps(eager, batches)
        with _fused_losses():
            actual = losses_and_gradients(compiled, batches[0])
            steps = losses_of_steps(compiled, batches)
        worst = worst_loss(actual[0].values(), expected[0].values())
        check.at_most(f"{dtype}: values of a step, {count} blocks", worst, bars[0])
        worst = worst_gradient(actual[1], expected[1])
        check.at_most(f"{dtype}: gradients", worst, bars[1])
        worst = worst_loss(steps, expected_steps)
        check.at_most(f"{dtype}: losses of {len(batches)} steps", worst, bars[0])
        check.at_most(f"{dtype}: graph breaks", sum(counters["graph_break"].values()), 0)
        check.note(f"{dtype}: graphs compiled", counters["stats"]["unique_graphs"])


@contextmanager
def _fused_losses(is_on: bool = True) -> Iterator[None]:
    """The losses compiled meanwhile, as a strategy that compiles blocks has them."""
    compile_losses(is_on)
    try:
        yield
    finally:
        compile_losses(False)


def recompute(check: Check) -> None:
    """``with_cp`` compiled and not: equal gradients, memory between the passes, peak of a step."""
    backbone = {"arch": "base" if check.is_large else "small"} if check.on_gpu else {}
    images = 16 if check.on_gpu else 2
    kept: dict[tuple[str, bool], float] = {}
    for compiled in (False, True):
        words = "compiled" if compiled else "eager"
        expected = None
        for mode in (False, "selective", True):
            name = f"{words}, with_cp={mode}"
            with check.part(name):
                if compiled:
                    check.require_compiler()
                trainer = _recomputing_trainer(check, backbone, mode, images)
                if compiled:
                    _forget_graphs()
                    compile_units(trainer.model)
                batch = next(trainer.batches(1, num_workers=0))
                with _fused_losses(compiled):
                    grads = losses_and_gradients(trainer, batch)[1]
                    kept[mode, compiled] = _kept_bytes(trainer, batch, check)
                    peak = _peak_of_step(trainer, batch) if check.on_gpu else None
                if expected is None:
                    expected = grads
                else:
                    check.at_most(
                        f"{name}: gradients against with_cp=False",
                        worst_gradient(grads, expected),
                        # Flash attention adds gradients in an order of its own choice.
                        5e-2 if compiled else 1e-2 if check.on_gpu else 1e-5,
                    )
                check.note(f"{name}: kept between the passes", kept[mode, compiled] / 2**20, "MiB")
                if peak is not None:
                    check.note(f"{name}: peak of a step", peak, "MiB")
                del trainer
    for compiled in (False, True):
        order = [kept.get((mode, compiled)) for mode in (True, "selective", False)]
        if None not in order:
            check.holds(
                f"{'compiled' if compiled else 'eager'}: kept with True, selective, False",
                " < ".join(f"{value / 2**20:.1f}" for value in order),
                "in this order",
                order[0] < order[1] < order[2],
                "MiB",
            )
    if ("selective", True) in kept:
        ratio = kept["selective", True] / kept["selective", False]
        bar = KEPT_BARS[check.device.type]
        check.at_most("selective, kept compiled over eager, off 1", abs(ratio - 1), bar)


def _recomputing_trainer(check: Check, backbone: dict, mode: bool | str, images: int) -> Trainer:
    cfg = quickstart_config(train_cfg__global_batch_size=images)
    if backbone:
        cfg.model.backbone = dict(type="DINOv3ViT", **backbone)
        cfg.train_dataloader.source.image_size = 256
        cfg.train_dataloader.transform = dict(type="MultiCrop", global_size=224, local_size=96)
        for head in ("dino_head", "ibot_head"):
            cfg.model[head].num_prototypes = 1024
    cfg.model.backbone.with_cp = mode
    # On a CPU short attention in bf16 is another function eager than compiled.
    return make_trainer(cfg, "bf16" if check.on_gpu else "fp32", check)


def _kept_bytes(trainer: Trainer, batch: dict, check: Check) -> float:
    """Bytes that live between forward and backward pass because autograd wants them."""
    model = trainer.model
    data = model.data_preprocessor(dict(batch), True)
    gc.collect()
    if check.on_gpu:
        before = torch.cuda.memory_allocated()
        losses = model(**data, mode="loss")
        kept = torch.cuda.memory_allocated() - before
    else:
        # The allocator's own account, which sees compiled code too.
        settings = dict(activities=[ProfilerActivity.CPU], profile_memory=True, acc_events=True)
        with profile(**settings) as recorded:
            losses = model(**data, mode="loss")
        events = recorded.profiler.kineto_results.events()
        kept = sum(event.nbytes() for event in events if event.name() == "[memory]")
    losses["loss"].backward()
    model.zero_grad(set_to_none=True)
    return float(kept)


def _peak_of_step(trainer: Trainer, batch: dict) -> float:
    trainer.step(batch)
    torch.cuda.reset_peak_memory_stats()
    trainer.step(batch)
    return torch.cuda.max_memory_allocated() / 2**20


def cuda_graphs(check: Check) -> None:
    """Replayed blocks against eager ones: losses, gradients, milliseconds of a small step."""
    check.require_compiler()
    bars = STEP_BARS["bf16"]
    cfg = quickstart_config(train_cfg__global_batch_size=64)
    eager = make_trainer(cfg, "bf16", check)
    batches = list(eager.batches(4, num_workers=0))
    expected = losses_and_gradients(eager, batches[0])
    expected_steps = losses_of_steps(eager, batches)
    milliseconds = {"eager": 1e3 * check.seconds(lambda: eager.step(batches[0]), 20)}
    for name, options in (("compiled", {}), ("graphs", COMPILE_OPTIONS)):
        trainer = make_trainer(cfg, "bf16", check)
        _forget_graphs()
        compile_units(trainer.model, **options)
        if options:
            mark_steps(trainer.model)
        with _fused_losses():
            # Graphs are recorded in two passes, and replayed from the third on.
            for _ in range(2 if options else 0):
                losses_and_gradients(trainer, batches[0])
            actual = losses_and_gradients(trainer, batches[0])
            steps = losses_of_steps(trainer, batches)
            seconds = check.seconds(lambda t=trainer: t.step(batches[0]), 20)
        worst = worst_loss(actual[0].values(), expected[0].values())
        check.at_most(f"{name}: values of a step against eager", worst, bars[0])
        worst = worst_gradient(actual[1], expected[1])
        check.at_most(f"{name}: gradients against eager", worst, bars[1])
        worst = worst_loss(steps, expected_steps)
        check.at_most(f"{name}: losses of {len(batches)} steps", worst, bars[0])
        milliseconds[name] = 1e3 * seconds
    for name, value in milliseconds.items():
        check.note(f"{name}: a step of the quickstart's model, 64 images", value, "ms")
