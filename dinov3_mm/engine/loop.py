"""The training loop of self-supervised pretraining."""

import time
from collections.abc import Iterator

import torch
from mmengine.registry import LOOPS
from mmengine.runner import BaseLoop
from torch import Tensor, nn

from dinov3_mm.datasets import build_pretrain_dataloader
from dinov3_mm.datasets.order import BatchLayout, torch_seed
from dinov3_mm.engine.strategies.ddp import check_settings
from dinov3_mm.models.wrapping import unwrapped


@LOOPS.register_module()
class PretrainLoop(BaseLoop):
    """Counts optimizer steps; one step is ``accumulate`` micro batches over all processes.

    Data order, crops, masks and the model's own noise are functions of the seed and the position in
    the run: a resumed loop starts its loader at the right position and seeds torch in each step, so
    it repeats what an uninterrupted one would have done.

    Hooks get ``outputs``, the mean over the micro batches of the step's metrics: detached tensors
    on the device, which nobody should read in each step. They may add entries.

    Args:
        runner (FlexibleRunner): The runner.
        dataloader (dict): Config for :func:`build_pretrain_dataloader`.
        max_iters (int): Optimizer steps of the whole run.
        global_batch_size (int): Images of one optimizer step, over all processes and micro batches.
        accumulate (int): Micro batches per step. Sinkhorn-Knopp and KoLeo see one micro batch.
        surplus (bool): Allow a batch that the processes do not divide; each then reads one image
            more than its share, and the surplus is dropped. For students in rank groups.

    Raises:
        ValueError: If a count is not a positive integer or the batch cannot be divided.
    """

    def __init__(
        self,
        runner,
        dataloader: dict,
        *,
        max_iters: int,
        global_batch_size: int,
        accumulate: int = 1,
        surplus: bool = False,
    ) -> None:
        if not isinstance(max_iters, int) or max_iters < 1:
            raise ValueError(f"max_iters must be an integer >= 1, got {max_iters!r}")
        self.layout = BatchLayout(global_batch_size, runner.world_size, accumulate, surplus=surplus)
        loader = build_pretrain_dataloader(
            dataloader,
            global_batch_size=global_batch_size,
            accumulate=accumulate,
            surplus=surplus,
            seed=runner.seed,
            rank=runner.rank,
            world_size=runner.world_size,
            start_iter=0,
            max_iters=max_iters,
        )
        super().__init__(runner, loader)
        self._max_iters = max_iters
        self._iter = 0
        self._epoch = 0
        self.stop_training = False
        #: ``time.perf_counter()`` when the current step began to wait for data.
        self.step_began = 0.0
        #: Seconds that the current step waited for data.
        self.data_seconds = 0.0

    @property
    def max_iters(self) -> int:
        """Optimizer steps of the whole run."""
        return self._max_iters

    @property
    def max_epochs(self) -> int:
        """FlexibleRunner asks for it; a pretraining run is one epoch."""
        return 1

    @property
    def iter(self) -> int:
        """Optimizer steps done."""
        return self._iter

    @property
    def epoch(self) -> int:
        """Always 0; see :attr:`max_epochs`."""
        return self._epoch

    def run(self):
        """Train to ``max_iters`` or until a hook sets ``stop_training``; return the model."""
        runner = self.runner
        self._check_channels()
        check_settings(runner.cfg)
        runner.logger.info(_batch_in_words(self.layout))
        runner.call_hook("before_train")
        runner.call_hook("before_train_epoch")
        # The loader was built before the checkpoint was read, and the optimizer wrapper was told of
        # optimizer steps, while it counts micro batches.
        self.dataloader.batch_sampler.start_iter = self._iter
        self._share_masks()
        micro_batches = (count * self.layout.accumulate for count in (self._iter, self._max_iters))
        runner.optim_wrapper.initialize_count_status(runner.model, *micro_batches)
        batches = iter(self.dataloader)
        while self._iter < self._max_iters and not self.stop_training:
            self._run_step(batches)
        runner.call_hook("after_train_epoch")
        runner.call_hook("after_train")
        return runner.model

    def _check_channels(self) -> None:
        model, data = self.runner.model, self.dataloader.dataset
        model = unwrapped(model)
        check_channels(model, data.num_channels, type(data.source).__name__)

    def _share_masks(self) -> None:
        """For students in rank groups: masks for the images that this rank will be given."""
        model, layout = self.runner.model, self.layout
        share = model.share_of(layout.micro_batch_size) if hasattr(model, "share_of") else None
        self.dataloader.collate_fn.mask_share = share
        if share is None and layout.micro_batch_size % layout.world_size:
            raise ValueError(
                "surplus=True is for students in rank groups, where surplus images are dropped; "
                f"use a global batch that {layout.world_size} processes divide"
            )

    def _run_step(self, batches: Iterator[dict]) -> None:
        """One optimizer step: its batches, hooks, the seed of its noise, the losses."""
        runner, index = self.runner, self._iter
        runner.model.train()
        self.step_began = time.perf_counter()
        self.data_seconds = 0.0
        batch = self._next_batch(batches)
        runner.call_hook("before_train_iter", batch_idx=index, data_batch=batch)
        self._seed_model_noise()
        outputs = [runner.model.train_step(batch, optim_wrapper=runner.optim_wrapper)]
        for _ in range(self.layout.accumulate - 1):
            batch = self._next_batch(batches)
            outputs.append(runner.model.train_step(batch, optim_wrapper=runner.optim_wrapper))
        runner.call_hook(
            "after_train_iter", batch_idx=index, data_batch=batch, outputs=_mean(outputs)
        )
        self._iter += 1

    def _next_batch(self, batches: Iterator[dict]) -> dict:
        """The next micro batch of this rank, and how long it was waited for."""
        began = time.perf_counter()
        batch = next(batches)
        self.data_seconds += time.perf_counter() - began
        return batch

    def _seed_model_noise(self) -> None:
        """Stochastic depth and RoPE augmentation: different per rank, the same after a resume."""
        position = self.layout.first_position(0, 0, self.runner.rank)
        torch.manual_seed(torch_seed(self.runner.seed, self._iter, position))


def _batch_in_words(layout: BatchLayout) -> str:
    """How the global batch is cut."""
    rest = layout.rank_batch_size * layout.world_size - layout.micro_batch_size
    line = (
        f"batch: {layout.global_batch_size} images per optimizer step = {layout.accumulate} "
        f"(micro batches) x {layout.world_size} (processes) x {layout.rank_batch_size} (images)"
    )
    if rest:
        line += f", of which {rest} of each micro batch are surplus"
    if layout.accumulate > 1:
        line += f"; Sinkhorn-Knopp and KoLeo see {layout.micro_batch_size} images at a time"
    return line


def _mean(outputs: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    if len(outputs) == 1:
        return outputs[0]
    return {name: torch.stack([each[name] for each in outputs]).mean(0) for name in outputs[0]}


def check_channels(model: nn.Module, num_channels: int, source: str) -> None:
    """Raise unless the images have the channels that the model normalises and embeds.

    Args:
        model: The algorithm. What it does not state (``data_preprocessor.statistics``, the
            ``arch_settings`` of its ``teacher_backbone``) is not compared.
        num_channels: Channels of the images.
        source: Name of their source, for the message.

    Raises:
        ValueError: With the numbers that disagree and what to set.
    """
    statistics = getattr(model.data_preprocessor, "statistics", None)
    backbone = getattr(model, "teacher_backbone", None)
    num_values = num_channels if statistics is None else len(statistics[0])
    in_channels = getattr(backbone, "arch_settings", {}).get("in_channels", num_channels)
    if num_channels == num_values == in_channels:
        return
    raise ValueError(
        f"the image channels disagree: {num_channels} in the images of {source}, {num_values} in "
        f"mean and std of the data preprocessor, {in_channels} in in_channels of the backbone. "
        f"To train on {num_channels} channels set model.backbone.in_channels={num_channels} and "
        f"{num_channels} values each of model.data_preprocessor.mean and .std, which "
        "tools/compute_statistics.py prints; or change the images with the source's color "
        "('rgb', 'gray', 'unchanged') and channels=[...]"
    )
