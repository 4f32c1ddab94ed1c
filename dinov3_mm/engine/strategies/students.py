"""FlexibleRunner strategy of runs with several students."""

from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist
from mmengine.dist import is_main_process
from mmengine.model import MMDistributedDataParallel
from mmengine.registry import STRATEGIES
from torch import nn

from dinov3_mm.datasets.randomness import torch_seed
from dinov3_mm.engine.runner.launch import failing_together
from dinov3_mm.engine.runner.sharded_state import begin, finish, partial_folder
from dinov3_mm.engine.runner.training_state import (
    STATE_FILE,
    load_model_state,
    read_training_state,
    write_training_state,
)
from dinov3_mm.engine.strategy import (
    BEFORE_THE_FIRST_STEP,
    DDP_SETTINGS,
    PretrainStrategy,
    training_device,
)
from dinov3_mm.models.pretraining.groups import group_as_world

STUDENTS = "students"


@STRATEGIES.register_module()
class MultiDistillationStrategy(PretrainStrategy):
    """One process or many; the gradients of a student are averaged over the ranks that train it.

    A checkpoint is a folder::

        iter_00001000/state.pth             meta data of the run
        iter_00001000/students/NAME.pth     all of a student, written by the first of its ranks

    A student's file is a training checkpoint of ``DINOv3``: it can be continued alone. The folder
    is resumed on any number of processes, in groups or together.

    Args:
        model_wrapper (dict, optional): Further arguments of ``MMDistributedDataParallel``.
        **kwargs: See :class:`mmengine._strategy.BaseStrategy`.
    """

    saves_shards = True

    def __init__(self, *, model_wrapper: dict | None = None, **kwargs) -> None:
        super().__init__(**kwargs)
        self.model_wrapper = model_wrapper

    def _init_model_weights(self, model: nn.Module) -> nn.Module:
        # The same values on every rank without a broadcast: ranks hold different students.
        torch.manual_seed(torch_seed(self.seed, BEFORE_THE_FIRST_STEP))
        model.init_weights()
        return model

    def _wrap_model(self, model: nn.Module) -> nn.Module:
        if not hasattr(model, "students"):
            raise ValueError(
                f"MultiDistillationStrategy trains a MultiDistillation, not {type(model).__name__}"
            )
        model.form_groups()
        device = training_device()
        self._accelerated(model).to(device)
        if dist.is_initialized() and dist.get_world_size() > 1:
            for name, student in list(model.students.items()):
                with group_as_world(model.groups[name]):
                    model.students[name] = MMDistributedDataParallel(
                        module=student,
                        device_ids=None if device.type == "cpu" else [device.index],
                        **{**DDP_SETTINGS, **(self.model_wrapper or {})},
                    )
        for name in model.student_names:
            ranks = model.placement[name].ranks
            where = "all ranks" if ranks is None else f"ranks {ranks[0]} to {ranks[-1]}"
            self.logger.info(f"student {name}: on {where}, tokens {model.strides[name]} px apart")
        return model

    def save_checkpoint(
        self,
        filename: str,
        *,
        extra_ckpt: dict | None = None,
        callback: Callable[[dict], None] | None = None,
        **_,
    ) -> None:
        """Write the folder; all ranks must call this."""
        folder = Path(filename)
        begin(folder)
        partial = partial_folder(folder)
        state = self._plain_state(extra_ckpt)
        if callback is not None:
            callback(state)
        with failing_together():
            (partial / STUDENTS).mkdir(exist_ok=True)
            self._write_own(partial / STUDENTS, state, state.pop(STUDENTS, {}))
            if is_main_process():
                write_training_state(partial / STATE_FILE, state)
        finish(folder)

    def _write_own(self, folder: Path, state: dict, own: dict) -> None:
        """Write the students of which this rank is the first."""
        for name, student in self.model.local_students():
            if self.model.placement[name].index == 0:
                tensors = {key: value.cpu() for key, value in student.state_dict().items()}
                stored = {
                    **{key: value for key, value in state.items() if key == "meta"},
                    **own.get(name, {}),
                    "state_dict": tensors,
                    "optimizer": self.optim_wrapper[name].state_dict(),
                }
                write_training_state(folder / f"{name}.pth", stored)

    def _read_state(
        self, filename: str, callback: Callable[[dict], None] | None, *, with_optimizer: bool
    ) -> dict:
        self.logger.info(f"Load checkpoint from {filename}")
        folder = Path(filename)
        checkpoint = read_training_state(folder)
        if not (folder / STUDENTS).is_dir():
            raise ValueError(
                f"{folder} is no checkpoint of a run with several students: it has no folder "
                f"{STUDENTS}. A single student's weights are given as model.students.NAME."
                "start_from"
            )
        checkpoint[STUDENTS] = {}
        for name, student in self.model.local_students():
            stored = read_training_state(folder / STUDENTS / f"{name}.pth")
            load_model_state(student, stored.pop("state_dict"))
            optimizer = stored.pop("optimizer")
            if with_optimizer:
                self.optim_wrapper[name].load_state_dict(optimizer)
            checkpoint[STUDENTS][name] = stored
        if callback is not None:
            callback(checkpoint)
        self.logger.info(f"loaded the students {', '.join(checkpoint[STUDENTS])} of this rank")
        return checkpoint
