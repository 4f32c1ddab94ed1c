"""CUDA graphs of compiled blocks: what they need, and the mark that begins a step.

torch records one graph for each block and shape of its input and replays it, which saves the launch
of its kernels. A recorded graph owns the memory of its results until the next step begins.
"""

from collections.abc import Iterator, Mapping

import torch
from torch import nn

# What a block is compiled with: no graph breaks, and a recording for every shape.
COMPILE_OPTIONS = {"mode": "reduce-overhead", "fullgraph": True, "dynamic": False}


def check_device(device: torch.device) -> None:
    """Raise a ``ValueError`` unless ``device`` is a GPU."""
    if device.type != "cuda":
        raise ValueError(
            f"strategy.cuda_graphs=True needs a CUDA device, and this process trains on "
            f"{device.type}; leave it out (compile_blocks=True alone works everywhere)"
        )


def check_settings(cfg: Mapping) -> None:
    """Refuse a config whose steps cannot be replayed; nothing without ``strategy.cuda_graphs``.

    Raises:
        ValueError: with all reasons.
    """
    if not (cfg.get("strategy") or {}).get("cuda_graphs"):
        return
    findings = list(_conflicts(cfg))
    if findings:
        raise ValueError(
            f"strategy.cuda_graphs=True does not go with {'; '.join(findings)}. Change that, or "
            "leave cuda_graphs out"
        )


def _conflicts(cfg: Mapping) -> Iterator[str]:
    strategy, model = cfg["strategy"], cfg.get("model") or {}
    kind = strategy.get("type")
    if (kind if isinstance(kind, str) else getattr(kind, "__name__", "")) == "FSDP2Strategy":
        yield (
            "FSDP2Strategy, which gathers the parameters of a block into other memory in each "
            "pass, while a graph reads them where they lay when it was recorded "
            "(PretrainDDPStrategy keeps them in place)"
        )
    if not strategy.get("compile_blocks"):
        yield "compile_blocks=False: the graphs are those of compiled blocks"
    students = model.get("students") or {}
    if students:
        yield "several students, which take turns within a step"
    with_cp = (model.get("backbone") or {}).get("with_cp", False)
    if with_cp:
        yield (
            f"model.backbone.with_cp={with_cp!r}: blocks that run again in the backward pass would "
            "overwrite what their graph still owns"
        )
    transform = (cfg.get("train_dataloader") or {}).get("transform") or {}
    sizes = transform.get("size_sets") or ()
    if len(sizes) > 1:
        yield (
            f"train_dataloader.transform with {len(sizes)} sets of crop sizes: every size is "
            "recorded, and each recording keeps its memory"
        )
    accumulate = (cfg.get("train_cfg") or {}).get("accumulate", 1)
    if accumulate > 1:
        yield (
            f"train_cfg.accumulate={accumulate}: gradients of an earlier micro batch lie in memory "
            "that the next replay overwrites"
        )


def mark_steps(model: nn.Module) -> None:
    """Let every forward pass of the algorithm begin a step: earlier results may be overwritten."""
    model.register_forward_pre_hook(_begin_step)


def _begin_step(*_: object) -> None:
    torch.compiler.cudagraph_mark_step_begin()
