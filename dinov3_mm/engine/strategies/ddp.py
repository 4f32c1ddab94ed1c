"""FlexibleRunner strategies of one process or DDP; how networks are compiled and captured."""

import logging
import os
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import mmengine
import torch
from mmengine._strategy import DDPStrategy, SingleDeviceStrategy
from mmengine.dist import is_main_process
from mmengine.model import MMDistributedDataParallel
from mmengine.registry import STRATEGIES
from torch import nn
from torch.compiler import config as compiler_config
from torch.utils._triton import has_triton_package

import dinov3_mm
from dinov3_mm.datasets.order import torch_seed
from dinov3_mm.engine.launch import failing_together
from dinov3_mm.engine.training_state import (
    load_model_state,
    load_sharded_state,
    read_training_state,
    write_training_state,
)
from dinov3_mm.models.layers.fp8 import enable_fp8
from dinov3_mm.models.losses import compile_losses
from dinov3_mm.models.pretraining import DistillationTeachers
from dinov3_mm.models.wrapping import unwrapped

# --- The parts that are compiled and sharded one at a time ---


# Kinds of inputs, and widths of a ConvNeXt, for which one block may be compiled; torch's own limit
# of 8 would leave a network uncompiled halfway.
_MAX_KINDS = 64

# Networks of the algorithm that run on their own; each holds a backbone and perhaps heads.
NETWORKS = ("student", "teacher", "gram_teacher", "distillation_teacher")


def networks_of(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Name and module of every network of the algorithm that is there.

    Those of several students and of several distillation teachers are named apart.
    """
    for student, algorithm in getattr(model, "students", {}).items():
        for name, network in networks_of(algorithm):
            yield f"students.{student}.{name}", network
    for name in NETWORKS:
        network = getattr(model, name, None)
        if isinstance(network, DistillationTeachers):
            for teacher, each in network.items():
                yield f"{name}.{teacher}", each
        elif isinstance(network, nn.Module):
            yield name, network


def backbones_of(model: nn.Module) -> list[nn.Module]:
    """The backbone of every network of the algorithm."""
    return [
        child
        for _, network in networks_of(model)
        for name, child in network.named_children()
        if name == "backbone"
    ]


def units_of(backbone: nn.Module) -> list[nn.Module]:
    """Parts of a backbone in the order of their forward pass: its blocks, for a convolutional one
    with the down-sampling before each stage.
    """
    if hasattr(backbone, "blocks"):
        return list(backbone.blocks)
    if hasattr(backbone, "downsample_layers"):
        stages = zip(backbone.downsample_layers, backbone.stages)
        return [unit for downsample, blocks in stages for unit in (downsample, *blocks)]
    return []


def compile_units(model: nn.Module, **options: Any) -> int:
    """Compile every block of every network on its own, in place; names of parameters stay.

    Blocks are alike, so one compilation serves all of them, and the loop over blocks stays plain
    Python.

    Args:
        model: the algorithm.
        **options: of ``torch.compile``.

    Returns:
        How many parts were compiled.
    """
    _keep_instruction_sets_apart()
    dynamo = torch._dynamo.config
    dynamo.recompile_limit = max(dynamo.recompile_limit, _MAX_KINDS)
    units = [unit for backbone in backbones_of(model) for unit in units_of(backbone)]
    for unit in units:
        unit.compile(**options)
    return len(units)


def _keep_instruction_sets_apart() -> None:
    """Cache what is compiled for the processor at hand under its instruction set.

    Inductor's cached C++ loops advance by the width of the vectors that they were written for, but
    its key names GPUs only. In a home folder that several kinds of machines share, a graph for
    AVX-512 would be loaded under AVX2 and write past the end of its tensors.
    """
    tag = f"cpu:{torch.backends.cpu.get_cpu_capability()}"
    if tag not in compiler_config.cache_key_tag:
        compiler_config.cache_key_tag += tag


def decide_compile(setting: bool | str, device: torch.device) -> tuple[bool, str | None]:
    """Whether blocks and losses are compiled, and why not if that was wished for or left open.

    Args:
        setting: ``compile_blocks`` of a strategy: 'auto' compiles on a GPU that has what it takes.
        device: where the model trains.

    Raises:
        ValueError: another setting.
        RuntimeError: True on a machine that cannot compile.
    """
    if setting not in (True, False, "auto"):
        raise ValueError(f"compile_blocks is {setting!r}; expected True, False or 'auto'")
    if not setting:
        return False, None
    if setting == "auto" and device.type != "cuda":
        return False, f"off on {device.type} (compile_blocks='auto' compiles on a GPU)"
    obstacle = compile_obstacle(device)
    if obstacle is None:
        return True, None
    if setting == "auto":
        return False, f"off, the run is slower than it could be: {obstacle}"
    raise RuntimeError(
        f"strategy.compile_blocks=True: {obstacle}. Or train without: "
        "--cfg-options strategy.compile_blocks=False"
    )


def compile_obstacle(device: torch.device) -> str | None:
    """What torch.compile lacks on this machine for ``device``; None if nothing."""
    kind, variable, names = ("C++", "CXX", ("g++", "clang++"))
    if device.type == "cuda":
        # Triton compiles a small launcher for every kernel.
        kind, variable, names = ("C", "CC", ("gcc", "clang"))
        if not has_triton_package():
            return "torch.compile needs triton, which is not installed; install it"
        if torch.cuda.device_count():
            major, minor = torch.cuda.get_device_capability(device)
            if major < 7:
                found = f"{device} has {major}.{minor}"
                return f"torch.compile needs compute capability 7.0, and {found}"
    wanted = os.environ.get(variable)
    if not any(shutil.which(name) for name in ((wanted,) if wanted else names)):
        sought = f"{variable}={wanted}" if wanted else " or ".join(names)
        return (
            f"torch.compile needs a {kind} compiler, and there is no {sought}; install one or name "
            f"it by the variable {variable}"
        )
    return None


# --- CUDA graphs of compiled blocks: what they need, and the mark that begins a step ---
#
# torch records one graph for each block and shape of its input and replays it, which saves the
# launch of its kernels. A recorded graph owns the memory of its results until the next step
# begins.


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


# --- The strategies ---


# Iteration whose random numbers initialise the model.
BEFORE_THE_FIRST_STEP = -1

# Buckets as views: no second copy of the gradients.
DDP_SETTINGS = {"broadcast_buffers": False, "gradient_as_bucket_view": True}


@STRATEGIES.register_module()
class PretrainStrategy(SingleDeviceStrategy):
    """One process, on CUDA where there is a GPU and on the CPU elsewhere.

    Checkpoints are those of :mod:`dinov3_mm.engine.training_state`: complete or absent, and
    read without unpickling.

    Args:
        compile_blocks (bool or str): Compile each block of the backbones, and the passes of the
            losses over their prototypes, with ``torch.compile``. ``'auto'``: on a GPU, if triton
            and a C compiler are there. Defaults to False.
        cuda_graphs (bool): Replay the compiled blocks as CUDA graphs, which saves the launch of
            kernels where blocks are small. Needs a CUDA device, ``compile_blocks``, crops of one
            set of sizes, one micro batch per step, no recomputation and no ``FSDP2Strategy``.
        fp8_filter (str, optional): Regular expression for the paths of the backbones' linear layers
            that multiply in float8, e.g. ``'blocks'``. Defaults to None: none.
        load_optimizer (bool): ``load_from`` also takes the optimizer's moments, for a stage that
            goes on training.
        **kwargs: See :class:`mmengine._strategy.BaseStrategy`.

    Raises:
        ValueError: ``cuda_graphs`` on a CPU.
        RuntimeError: ``compile_blocks=True`` where torch.compile cannot run.
    """

    def __init__(
        self,
        *,
        compile_blocks: bool | str = False,
        cuda_graphs: bool = False,
        fp8_filter: str | None = None,
        load_optimizer: bool = False,
        **kwargs,
    ) -> None:
        if cuda_graphs:
            check_device(training_device())
        super().__init__(**kwargs)
        self.cuda_graphs = cuda_graphs
        self.load_optimizer = load_optimizer
        self.fp8_filter = fp8_filter
        self.compile_blocks = compile_blocks

    # Whether checkpoints are folders that all ranks write.
    saves_shards = False
    # Whether one is still being written, in the background.
    is_saving = False

    @property
    def unwrapped_model(self) -> nn.Module:
        """The algorithm itself, without a distributed wrapper."""
        return unwrapped(self.model)

    def _init_model_weights(self, model: nn.Module) -> nn.Module:
        # Building draws random numbers too, but not where a model is built without storage.
        torch.manual_seed(torch_seed(self.seed, BEFORE_THE_FIRST_STEP))
        return super()._init_model_weights(model)

    def _wrap_model(self, model: nn.Module) -> nn.Module:
        return self._accelerated(model).to(training_device())

    def _accelerated(self, model: nn.Module) -> nn.Module:
        """The model with what makes its blocks faster, before it is moved or sharded."""
        if self.fp8_filter is not None:
            layers = [enable_fp8(backbone, self.fp8_filter) for backbone in backbones_of(model)]
            self.logger.info(f"float8: {sum(map(len, layers))} linear layers")
        is_compiled, reason = decide_compile(
            # Graphs are those of compiled blocks.
            True if self.cuda_graphs and self.compile_blocks else self.compile_blocks,
            training_device(),
        )
        if reason is not None:
            level = logging.INFO if training_device().type == "cpu" else logging.WARNING
            self.logger.log(level, f"torch.compile: {reason}")
        compile_losses(is_compiled)
        if is_compiled:
            options = COMPILE_OPTIONS if self.cuda_graphs else {}
            count = compile_units(model, **options)
            graphs = ", then replayed as CUDA graphs" if self.cuda_graphs else ""
            what = f"{count} blocks and the losses"
            self.logger.info(f"torch.compile: {what}, compiled when they first run{graphs}")
        if self.cuda_graphs:
            mark_steps(model)
        return model

    def load_checkpoint(
        self, filename: str, *, callback: Callable[[dict], None] | None = None, **_
    ) -> dict:
        """Take the model weights of a training checkpoint as the start of a new stage.

        With ``load_optimizer`` also the moments of its optimizer.

        A Gram teacher that the checkpoint lacks keeps its values; its hook fills it.

        Args:
            filename (str): Training checkpoint.
            callback (Callable, optional): Called with the checkpoint's content.

        Returns:
            dict: The checkpoint.

        Raises:
            FileNotFoundError: If there is no such file.
            ValueError: If it cannot be read safely or its tensors are not the model's.
        """
        return self._read_state(filename, callback, with_optimizer=self.load_optimizer)

    def _read_state(
        self, filename: str, callback: Callable[[dict], None] | None, *, with_optimizer: bool
    ) -> dict:
        self.logger.info(f"Load checkpoint from {filename}")
        model = self.unwrapped_model
        if Path(filename).is_dir():
            optimizer = self.optim_wrapper.optimizer if with_optimizer else None
            checkpoint, absent = load_sharded_state(filename, model, optimizer, callback)
        else:
            checkpoint = read_training_state(filename)
            if callback is not None:
                callback(checkpoint)
            absent = load_model_state(model, checkpoint["state_dict"])
            if with_optimizer:
                self.load_optim_state_dict(checkpoint["optimizer"])
        self.logger.info(f"loaded {len(model.state_dict())} tensors, every key matched")
        for name in absent:
            self.logger.warning(f"{filename} has no {name}: it keeps its initial values")
        return checkpoint

    def resume(self, filename: str, *, callback: Callable[[dict], None] | None = None, **_) -> dict:
        """Continue a run: model, optimizer, iteration and what hooks stored.

        Random numbers are a function of seed and iteration, so the seed is all there is to compare.

        Raises:
            FileNotFoundError: If there is no such file.
            ValueError: If it cannot be read safely, does not fit, or was trained with another seed.
        """
        checkpoint = self._read_state(filename, callback, with_optimizer=True)
        stored_seed = checkpoint["meta"]["seed"]
        if stored_seed != self.seed:
            raise ValueError(
                f"{filename} was trained with seed {stored_seed}, this run has seed {self.seed}: "
                f"resume with --seed {stored_seed}, or start a new stage with load_from"
            )
        # FlexibleRunner reads the hub; what must survive is stored by the hooks themselves.
        checkpoint["message_hub"] = {"log_scalars": {}, "runtime_info": {}, "resumed_keys": {}}
        return checkpoint

    def gather_state(self) -> tuple[dict, dict]:
        """State of the model and of the optimizer on the CPU; empty on all ranks but the first."""
        if not is_main_process():
            return {}, {}
        tensors = self.unwrapped_model.state_dict()
        return {key: value.cpu() for key, value in tensors.items()}, self.optim_state_dict()

    def save_checkpoint(
        self,
        filename: str,
        *,
        extra_ckpt: dict | None = None,
        callback: Callable[[dict], None] | None = None,
        **_,
    ) -> None:
        """Write model, optimizer and meta data from the main process; all ranks must call this.

        Args:
            filename (str): Target; it appears when the file is complete.
            extra_ckpt (dict, optional): With a ``meta`` dict; other entries are FlexibleRunner's
                message hub, whose pickled histories are not kept.
            callback (Callable, optional): Called with the content before it is written.

        Raises:
            TypeError: If a hook added something that is neither a tensor nor a plain value.
            RuntimeError: On the other ranks, when the main process could not write.
        """
        tensors, optimizer = self.gather_state()
        with failing_together():
            if is_main_process():
                state = self._plain_state(extra_ckpt)
                state.update(state_dict=tensors, optimizer=optimizer)
                if callback is not None:
                    callback(state)
                write_training_state(filename, state)

    def _plain_state(self, extra_ckpt: dict | None) -> dict:
        """What a checkpoint holds beside tensors."""
        return {
            "meta": {
                **(extra_ckpt or {}).get("meta", {}),
                "seed": self.seed,
                "world_size": self.world_size,
                "time": time.strftime("%Y-%m-%d %H:%M:%S"),
                "versions": library_versions(),
            }
        }

    def finish_saving(self) -> None:
        """Wait for what is still being written; nothing here."""


@STRATEGIES.register_module()
class PretrainDDPStrategy(PretrainStrategy, DDPStrategy):
    """One model copy per rank, gradients averaged; NCCL on GPUs and gloo on CPUs.

    The process group must exist (``tools/train.py`` makes it).

    Args:
        model_wrapper (dict, optional): Further arguments of ``MMDistributedDataParallel``, such as
            ``dict(find_unused_parameters=True)``.
        sync_bn (str, optional): Convert batch norms: ``'torch'`` or ``'mmcv'``. Defaults to None.
        **kwargs: See :class:`mmengine._strategy.BaseStrategy`.
    """

    def _wrap_model(self, model: nn.Module) -> nn.Module:
        device = training_device()
        return MMDistributedDataParallel(
            module=self.convert_model(self._accelerated(model)).to(device),
            device_ids=None if device.type == "cpu" else [device.index],
            **{**DDP_SETTINGS, **(self.model_wrapper or {})},
        )


def training_device() -> torch.device:
    """This process's GPU, or the CPU where there is none."""
    if not torch.cuda.is_available():
        return torch.device("cpu")
    return torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))


def library_versions() -> dict[str, str]:
    """Versions that a checkpoint's provenance names."""
    return {
        "dinov3_mm": dinov3_mm.__version__,
        "mmengine": mmengine.__version__,
        "torch": str(torch.__version__),
    }
