"""Parity on the device: reference vectors and the CPU's passes, in fp32, bf16 and float8."""

import copy
from collections.abc import Callable

import torch
from torch import Tensor, nn

from dinov3_mm.models.backbones import DINOv2ViT, DINOv3ConvNeXt, DINOv3ViT
from dinov3_mm.models.layers.fp8 import enable_fp8, fp8_linear
from tests.checkpoints.toys import redraw
from tests.golden import assert_parity, load_golden
from tests.gpu_check.check import Check, Skip, exact_products, largest_error, relative_error
from tests.parity import backbone_cases, convnext_cases, ssl_cases

VIT_GOLDENS = (
    "vit_mlp",
    "vit_swiglu8_officiallike",
    "vit_7blike",
    "vit_untied",
    "vit_untied_clsnorm",
    "vit_rmsnorm",
)
# Against the CPU, of the largest value of a tensor. Rounding in other orders gives 1e-6 in the
# outputs of twelve redrawn blocks; TF32, or an operator in 16 bits, gives 1e-3 and more.
OUTPUT_BAR, GRADIENT_BAR = 2e-5, 1e-4
# How much more error than the CPU's own bfloat16 the device's may have.
BF16_FACTOR = 1.5
# Rounding to bfloat16 once or twice gives 2e-3 in the mean; tensor cores add float8 products with
# fewer bits than float32. One scale where there should be many gives 1e-2 and more.
FLOAT8_BAR = 6e-3
# Two units in the last place of bfloat16: sums are taken in another order, and rounded once more.
FLOAT8_GOLDEN_BAR = 2**-6


def parity_fp32(check: Check) -> None:
    """Reference vectors, and forward and backward passes against the CPU, without TF32."""
    exact_products()
    device = check.device
    for name in VIT_GOLDENS:
        _golden(check, name, lambda name=name: backbone_cases.check_golden(name, device=device))
    _golden(
        check,
        "vit_ropebf16",
        lambda: backbone_cases.check_golden("vit_ropebf16", tolerance=5e-3, device=device),
        bar=5e-3,
    )
    _golden(
        check, "convnext", lambda: convnext_cases.check_golden("convnext", device=device), bar=1e-5
    )
    for name in ssl_cases.VARIANTS:
        _golden(
            check,
            f"ssl_full_step {name}",
            lambda name=name: _golden_losses(name, device),
            bar=ssl_cases.LOSS_TOLERANCE,
        )
    _golden(
        check,
        "ssl_full_step gradients",
        lambda: _golden_gradients(device),
        bar=ssl_cases.GRAD_TOLERANCE,
    )
    _golden(
        check,
        "ssl_full_step after clipping, fused AdamW and EMA",
        lambda: _golden_step(device),
        bar=ssl_cases.STEP_TOLERANCE,
    )
    for name, make in _networks(check).items():
        with check.part(name):
            model, images = make()
            expected = _forward_backward(model, images, "cpu")
            actual = _forward_backward(model, images, device)
            check.at_most(
                f"{name}: outputs against the CPU", _worst(actual, expected, 0), OUTPUT_BAR
            )
            worst = _worst(actual, expected, 1)
            check.at_most(f"{name}: gradients against the CPU", worst, GRADIENT_BAR)


def _golden(check: Check, name: str, compare: Callable[[], float], bar: float = 1e-5) -> None:
    try:
        value, holds = compare(), True
    except AssertionError as error:
        value, holds = str(error), False
    check.holds(f"golden {name}", value, f"<= {bar:g} x max(1, largest value)", holds)


def _golden_losses(name: str, device: torch.device) -> float:
    expected = ssl_cases.SCALARS[name]
    model = ssl_cases.build_model(**ssl_cases.VARIANTS[name]).to(device)
    losses = ssl_cases.run_losses(model, expected)
    return max(
        assert_parity(losses[ours].cpu(), torch.tensor(expected[theirs]), ssl_cases.LOSS_TOLERANCE)
        for ours, theirs in ssl_cases.LOG_KEYS.items()
    )


def _golden_gradients(device: torch.device) -> float:
    model = ssl_cases.build_model().to(device)
    ssl_cases.run_losses(model, ssl_cases.SCALARS["main"])["loss"].backward()
    grads = {name: p.grad.cpu() for name, p in model.student.named_parameters()}
    return max(
        assert_parity(grads[key.removeprefix("grad.")], expected, ssl_cases.GRAD_TOLERANCE)
        for key, expected in ssl_cases.TENSORS.items()
        if key.startswith("grad.")
    )


def _golden_step(device: torch.device) -> float:
    model = ssl_cases.build_model().to(device)
    wrapper = ssl_cases.optimizer_wrapper(model)
    loss, _ = model.parse_losses(ssl_cases.run_losses(model, ssl_cases.SCALARS["main"]))
    wrapper.update_params(loss)
    model.update_teacher(torch.tensor(ssl_cases.OPTIMIZER["ema_momentum"], device=device))
    worst = 0.0
    for branch in ("student", "teacher"):
        params, prefix = dict(getattr(model, branch).named_parameters()), f"after.{branch}."
        for key, expected in ssl_cases.TENSORS.items():
            if key.startswith(prefix):
                actual = params[key.removeprefix(prefix)].cpu()
                worst = max(worst, assert_parity(actual, expected, ssl_cases.STEP_TOLERANCE))
    return worst


def _networks(check: Check) -> dict[str, Callable[[], tuple[nn.Module, list[Tensor]]]]:
    """Released architectures (on a CPU toys) with all parameters redrawn, and crops for them."""
    sizes = (224, 96) if check.on_gpu else (64, 32)
    toy = dict(embed_dims=64, num_layers=2, num_heads=2)
    vit = "small" if check.on_gpu else toy
    convnext = "tiny" if check.on_gpu else dict(depths=[1, 1, 2, 1], dims=[8, 8, 16, 16])
    dinov2 = "small" if check.on_gpu else toy

    def crops(stride: int) -> list[Tensor]:
        generator = torch.Generator().manual_seed(0)
        sides = [size // stride * stride for size in sizes]
        return [torch.randn(2, 3, side, side, generator=generator) for side in sides]

    def built(model: nn.Module) -> nn.Module:
        model.init_weights()
        return redraw(model)

    return {
        "ViT": lambda: (built(DINOv3ViT(arch=vit)), crops(16)),
        "ConvNeXt": lambda: (built(DINOv3ConvNeXt(arch=convnext)), crops(32)),
        "DINOv2": lambda: (built(DINOv2ViT(arch=dinov2)), crops(14)),
    }


def _forward_backward(
    model: nn.Module, images: list[Tensor], device: str | torch.device, *, bf16: bool = False
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Tokens and gradients of a copy on a device, by name, on the CPU."""
    model = copy.deepcopy(model).to(device).train()
    with torch.autocast(torch.device(device).type, torch.bfloat16, enabled=bf16):
        tokens = model.forward_tokens([each.to(device) for each in images])
    outputs = {}
    for index, each in enumerate(tokens):
        outputs |= {f"{index} cls": each.cls.float(), f"{index} patches": each.patches.float()}
    generator = torch.Generator().manual_seed(1)
    loss = sum(
        (value * torch.randn(value.shape, generator=generator).to(device)).mean()
        for value in outputs.values()
    )
    loss.backward()
    grads = {name: p.grad.cpu() for name, p in model.named_parameters() if p.grad is not None}
    return {name: value.detach().cpu() for name, value in outputs.items()}, grads


def _worst(actual: tuple[dict, dict], expected: tuple[dict, dict], part: int) -> float:
    """Largest difference over the largest value of its tensor."""
    assert actual[part].keys() == expected[part].keys()
    return max(
        ((actual[part][name] - value).abs().max() / value.abs().max().clamp(min=1e-30)).item()
        for name, value in expected[part].items()
    )


def parity_bf16(check: Check) -> None:
    """Autocast on the device is as near to fp32 as on the CPU; losses of the golden step."""
    exact_products()
    for name, make in _networks(check).items():
        with check.part(name):
            model, images = make()
            exact = _forward_backward(model, images, "cpu")
            host = _forward_backward(model, images, "cpu", bf16=True)
            device = _forward_backward(model, images, check.device, bf16=True)
            for part, what in enumerate(("outputs", "gradients")):
                own, theirs = (_joint_error(each[part], exact[part]) for each in (device, host))
                check.note(f"{name}: {what}, error of bf16 on the CPU", theirs)
                check.at_most(f"{name}: {what}, error of bf16", own, BF16_FACTOR * theirs)
    expected = ssl_cases.SCALARS["main"]
    model = ssl_cases.build_model(compute_dtype="bf16").to(check.device)
    losses = ssl_cases.run_losses(model, expected)
    worst = max(
        largest_error(losses[ours], torch.tensor(expected[theirs]))
        for ours, theirs in ssl_cases.LOG_KEYS.items()
    )
    check.at_most("golden ssl_full_step main, losses in bf16", worst, 2e-2)


def _joint_error(actual: dict[str, Tensor], exact: dict[str, Tensor]) -> float:
    flat = [torch.cat([part[name].flatten() for name in exact]) for part in (actual, exact)]
    return relative_error(*flat)


def parity_float8(check: Check) -> None:
    """Products in float8 and both gradients against the product of the rounded operands."""
    if check.on_gpu:
        capability = torch.cuda.get_device_capability(check.device)
        if capability < (8, 9):
            raise Skip(f"compute capability {capability[0]}.{capability[1]} has no float8 products")
    # Rows are tokens, of which there may be any number.
    shapes = [(690, 1024, 3072), (690, 1024, 4096), (693, 4096, 1024)]
    functions = {"eager": fp8_linear, "compiled": torch.compile(fp8_linear, fullgraph=True)}
    for rows, width_in, width_out in shapes if check.on_gpu else [(13, 64, 128)]:
        for mode, function in functions.items():
            with check.part(f"{mode} {rows} x {width_in} x {width_out}"):
                if mode == "compiled":
                    check.require_compiler()
                errors = _float8_errors(function, rows, width_in, width_out, check.device)
                for what, error in errors.items():
                    name = f"{mode} {rows} x {width_in} x {width_out}: {what}"
                    check.at_most(name, error, FLOAT8_BAR)
    for mode, function in functions.items():
        with check.part(f"golden, {mode}"):
            if mode == "compiled":
                check.require_compiler()
            _golden_float8(check, mode, function)
    with check.part("backbone"):
        _float8_backbone(check)


def _float8_errors(
    function: Callable, rows: int, width_in: int, width_out: int, device: torch.device
) -> dict[str, float]:
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        # Rows of very different size, as activations are: one scale for all would show.
        spread = torch.logspace(-2, 2, shape[0])[:, None]
        values = torch.randn(*shape, generator=generator) * spread
        return values.to(device, torch.bfloat16)

    x, weight = draw(rows, width_in), draw(width_out, width_in)
    grad = draw(rows, width_out)
    x.requires_grad_()
    weight.requires_grad_()
    out = function(x, weight, None)
    grads = torch.autograd.grad(out, (x, weight), grad)
    x, weight, grad = (t.detach().double() for t in (x, weight, grad))
    row_peaks = weight.abs().amax(1, keepdim=True)
    expected = {
        "product": _rounded(x) @ _rounded(weight).t(),
        # One scale for all weights, as the documentation of fp8_linear states.
        "gradient of the input": _rounded(grad) @ _rounded(weight, row_peaks.amax().expand(1, 1)),
        "gradient of the weight": grad.t() @ x,
    }
    found = (out, *grads)
    return {
        what: relative_error(actual, value)
        for actual, (what, value) in zip(found, expected.items())
    }


def _rounded(rows: Tensor, peaks: Tensor | None = None) -> Tensor:
    """Float64 values of rows as float8 holds them, each row scaled by its largest value."""
    if peaks is None:
        peaks = rows.abs().amax(1, keepdim=True)
    scale = (peaks.float() / torch.finfo(torch.float8_e4m3fn).max).clamp(min=1e-30)
    return (rows.float() / scale).to(torch.float8_e4m3fn).double() * scale.double()


def _golden_float8(check: Check, mode: str, function: Callable) -> None:
    _, tensors = load_golden("ssl_fp8_linear")
    tensors = {name: tensor.to(check.device) for name, tensor in tensors.items()}
    inputs = [tensors[name].clone().requires_grad_() for name in ("a", "weight", "bias")]
    out = function(*inputs)
    found = (out, *torch.autograd.grad(out, inputs, tensors["grad_out"]))
    for actual, name in zip(found, ("out", "grad_a", "grad_weight", "grad_bias")):
        expected = tensors[name]
        error = ((actual - expected).abs().max() / expected.abs().max()).item()
        check.at_most(f"golden ssl_fp8_linear {name}, {mode}", error, FLOAT8_GOLDEN_BAR)


def _float8_backbone(check: Check) -> None:
    """A backbone in float8 computes what it computes in bfloat16, to the rounding of float8."""
    arch = "small" if check.on_gpu else dict(embed_dims=64, num_layers=2, num_heads=2)
    model = DINOv3ViT(arch=arch)
    model.init_weights()
    redraw(model)  # initial layer scales would hide the blocks
    images = [torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))]
    plain = _forward_backward(model, images, check.device, bf16=True)
    enable_fp8(model)
    eighth = _forward_backward(model, images, check.device, bf16=True)
    check.at_most(
        "backbone: outputs in float8 against bf16", _joint_error(eighth[0], plain[0]), 0.1
    )
    check.at_most(
        "backbone: gradients in float8 against bf16", _joint_error(eighth[1], plain[1]), 0.2
    )
