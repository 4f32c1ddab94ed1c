"""FlexibleRunner strategies for pretraining: one process, or one per GPU (or CPU rank) with DDP."""

import logging
import os
import time
from collections.abc import Callable
from pathlib import Path

import mmengine
import torch
from mmengine._strategy import DDPStrategy, SingleDeviceStrategy
from mmengine.dist import is_main_process
from mmengine.model import MMDistributedDataParallel, is_model_wrapper
from mmengine.registry import STRATEGIES
from torch import nn

import dinov3_mm
from dinov3_mm.datasets.randomness import torch_seed
from dinov3_mm.engine.cuda_graphs import COMPILE_OPTIONS, check_device, mark_steps
from dinov3_mm.engine.networks import backbones_of, compile_units, decide_compile
from dinov3_mm.engine.runner.launch import failing_together
from dinov3_mm.engine.runner.sharded_state import load_sharded_state
from dinov3_mm.engine.runner.training_state import (
    load_model_state,
    read_training_state,
    write_training_state,
)
from dinov3_mm.models.layers.fp8 import enable_fp8
from dinov3_mm.models.losses import compile_losses

# Iteration whose random numbers initialise the model.
BEFORE_THE_FIRST_STEP = -1

# Buckets as views: no second copy of the gradients.
DDP_SETTINGS = {"broadcast_buffers": False, "gradient_as_bucket_view": True}


@STRATEGIES.register_module()
class PretrainStrategy(SingleDeviceStrategy):
    """One process, on CUDA where there is a GPU and on the CPU elsewhere.

    Checkpoints are those of :mod:`dinov3_mm.engine.runner.training_state`: complete or absent, and
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
        return self.model.module if is_model_wrapper(self.model) else self.model

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
