"""What users deploy and tune on the device: ONNX on CUDA, and a step of downstream configs."""

import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

import torch
from mmengine.config import Config
from mmengine.optim import build_optim_wrapper
from mmengine.registry import MODELS, DefaultScope

import dinov3_mm
from dinov3_mm.apis.deployment.onnx_file import OnnxModel
from dinov3_mm.models.precision import autocast_parts
from tests.downstream import batches
from tests.gpu_check.check import ROOT, Check, Skip
from tests.integration.continue_run import TOY_ARCH, random_released_like
from tests.shrink import shrink

# What is trained: its job, the packages that its hosts are, a config, and where the backbone is.
DOWNSTREAM = {
    "linear classifier": (
        "classification", ("mmpretrain",), "linear_vits16_folder.py", "backbone"
    ),
    "linear segmentation": (
        "segmentation", ("mmcv", "mmseg"), "linear_vits16_ade20k.py", "backbone"
    ),
    # With mmcv's CUDA operator of deformable attention.
    "Mask2Former": (
        "segmentation",
        ("mmcv._ext", "mmseg", "mmdet"),
        "mask2former_vits16_ade20k.py",
        "backbone.backbone",
    ),
}  # fmt: skip


def onnx_cuda(check: Check) -> None:
    """An exported backbone under ONNX Runtime on CUDA: its values, and images per second."""
    missing = [n for n in ("onnx", "onnxscript", "onnxruntime") if find_spec(n) is None]
    if missing:
        raise Skip(f"{', '.join(missing)} not installed")
    import onnxruntime

    provider = "CUDAExecutionProvider" if check.on_gpu else "CPUExecutionProvider"
    if provider not in onnxruntime.get_available_providers():
        raise Skip("onnxruntime-gpu is not installed (this onnxruntime has no CUDA provider)")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        arch = dict(embed_dims=384, num_layers=12, num_heads=6, layer_scale_init_value=1.0)
        weights = random_released_like(folder / "weights.pth", arch if check.on_gpu else TOY_ARCH)
        target, size = folder / "backbone.onnx", 224 if check.on_gpu else 32
        command = [sys.executable, str(ROOT / "tools/export_onnx.py"), str(weights), str(target)]
        command += ["--provider", provider, "--image-size", str(size)]
        command += ["--mean", "0.485", "0.456", "0.406", "--std", "0.229", "0.224", "0.225"]
        run = subprocess.run(command, capture_output=True, text=True, env=dict(os.environ))
        lines = (run.stdout + run.stderr).strip().splitlines()
        # The tool compares the file with PyTorch on rendered scenes, and keeps it only if equal.
        kept = not run.returncode
        check.holds("export, and its comparison with PyTorch", lines[-1], "exit 0", kept)
        if run.returncode:
            return
        count = 64 if check.on_gpu else 2
        images = torch.randn(count, 3, size, size)
        session = OnnxModel(target, provider=provider)
        seconds = check.seconds(lambda: session(images), 5)
        check.note("ONNX Runtime, fp32, from and to main memory", count / seconds, "images/s")
        backbone = dinov3_mm.build_backbone(str(weights)).to(check.device).eval()

        @torch.inference_mode()
        def forward() -> None:
            backbone.forward_tokens(images.to(check.device)).patches.cpu()

        check.note("PyTorch, fp32, likewise", count / check.seconds(forward, 5), "images/s")


def downstream(check: Check) -> None:
    """A training step of heads in bfloat16 autocast: finite losses, heads that move."""
    for name, (job, hosts, config, frozen) in DOWNSTREAM.items():
        with check.part(name):
            missing = [host for host in hosts if not _is_there(host)]
            if missing:
                raise Skip(f"{', '.join(missing)} not installed (bash tools/setup_env.sh ops)")
            cfg = shrink(Config.fromfile(ROOT / "configs" / job / config), job)
            _downstream_step(check, name, cfg, frozen, getattr(batches, job))


def _is_there(package: str) -> bool:
    outer = package.partition(".")[0]
    return find_spec(outer) is not None and find_spec(package) is not None


def _downstream_step(
    check: Check, job: str, cfg: Config, frozen: str, make_batch: Callable
) -> None:
    with DefaultScope.overwrite_default_scope(cfg.get("default_scope", "mmengine")):
        torch.manual_seed(0)
        model = MODELS.build(cfg.model)
        model.init_weights()
        model.to(check.device).train()
        before = {name: value.clone() for name, value in model.named_parameters()}
        wrapper = build_optim_wrapper(model, cfg.optim_wrapper)
        dtypes = set()
        backbone = model.get_submodule(frozen)
        backbone.register_forward_hook(lambda _m, _i, out: dtypes.update(_dtypes(out)))
        autocast_parts(model, torch.bfloat16)
        losses = model.train_step(make_batch(cfg), wrapper)
    for name, value in losses.items():
        value = float(torch.as_tensor(value))
        check.holds(f"{job}: {name}", value, "finite", value == value and abs(value) < 1e6)
    moved = [n for n, p in model.named_parameters() if not torch.equal(p, before[n])]
    check.at_least(f"{job}: parameters that moved", len(moved), 1)
    stray = [name for name in moved if name.startswith(f"{frozen}.")]
    check.at_most(f"{job}: of these in the frozen backbone", len(stray), 0)
    check.note(f"{job}: features of the backbone", ", ".join(sorted(map(str, dtypes))))


def _dtypes(value: object) -> set[torch.dtype]:
    if isinstance(value, torch.Tensor):
        return {value.dtype}
    items = value.values() if isinstance(value, dict) else value
    return set().union(*map(_dtypes, items)) if isinstance(value, (tuple, list, dict)) else set()
