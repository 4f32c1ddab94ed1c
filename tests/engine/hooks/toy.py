"""A pretraining run in miniature: an algorithm with DINOv3's interface and a loop around hooks."""

import copy
import logging
from types import SimpleNamespace

import torch
from mmengine.model import BaseDataPreprocessor, BaseModel
from mmengine.optim import build_optim_wrapper
from mmengine.registry import MODELS
from torch import nn

from dinov3_mm.engine.optim import PretrainOptimWrapper

PRIORITIES = ("VERY_HIGH", "HIGH", "ABOVE_NORMAL", "NORMAL")


class ToyPreprocessor(BaseDataPreprocessor):
    def forward(self, data, training=False):
        return {"inputs": {**data, "global_crops": data["global_crops"].float() / 255}}


@MODELS.register_module()
class ToyAlgorithm(BaseModel):
    """Linear student and teacher; the loss is their squared distance plus a regulariser."""

    def __init__(self, gram: dict | None = None):
        super().__init__(data_preprocessor=ToyPreprocessor())
        self.student = nn.ModuleDict({"backbone": nn.Linear(12, 6), "dino_head": nn.Linear(6, 4)})
        self.teacher = copy.deepcopy(self.student).requires_grad_(False)
        self.gram = gram
        self.gram_teacher_ready = False
        if gram is not None and gram["teacher"] == "frozen":
            self.gram_teacher = nn.ModuleDict({"backbone": nn.Linear(12, 6).requires_grad_(False)})
        self.collect_diagnostics = False
        self.step_values: dict[str, float] = {}
        self.gram_sources: list[str] = []
        self.diagnoses = {}

    def set_step(self, **values):
        self.step_values.update(values)

    @torch.no_grad()
    def update_teacher(self, momentum):
        for old, new in zip(self.teacher.parameters(), self.student.parameters()):
            old.lerp_(new, 1 - momentum)

    def copy_teacher_to_gram(self):
        self.gram_teacher["backbone"].load_state_dict(self.teacher["backbone"].state_dict())
        self.gram_teacher_ready = True
        self.gram_sources.append("ema")

    def load_gram_teacher(self, source):
        self.gram_teacher_ready = True
        self.gram_sources.append(str(source))
        return f"loaded {source}"

    def forward(self, inputs, data_samples=None, mode="loss"):
        crops = inputs["global_crops"].flatten(1)
        student = self.student["dino_head"](self.student["backbone"](crops))
        with torch.no_grad():
            target = self.teacher["dino_head"](self.teacher["backbone"](crops)).roll(1, 0)
        noise = torch.rand(student.shape[0], 1)
        losses = {"loss": ((student - target - noise) ** 2).mean()}
        if self.collect_diagnostics:
            losses |= {f"diag/{name}": torch.tensor(v) for name, v in self.diagnoses.items()}
        return losses

    def parse_losses(self, losses):
        return losses["loss"], {name: value.detach() for name, value in losses.items()}


def uint8_batch(iteration: int, **extra) -> dict:
    generator = torch.Generator().manual_seed(iteration)
    crops = torch.randint(0, 256, (4, 3, 2, 2), dtype=torch.uint8, generator=generator)
    return {"global_crops": crops, "iteration": iteration, **extra}


class ToyRunner:
    """The parts of MMEngine's runner that hooks use, and the order of one training step."""

    def __init__(self, model, hooks, *, max_iters=10, work_dir="", accumulate=1, start=0):
        self.model = model
        self.hooks = sorted(hooks, key=lambda hook: PRIORITIES.index(hook.priority))
        self.optim_wrapper: PretrainOptimWrapper = build_optim_wrapper(
            model,
            {
                "type": "PretrainOptimWrapper",
                "constructor": "PretrainOptimConstructor",
                "optimizer": {"type": "AdamW", "lr": 1e-2},
                "accumulative_counts": accumulate,
            },
        )
        self.iter, self.max_iters = start, max_iters
        self.work_dir = str(work_dir)
        self.seed, self.rank, self.world_size = 7, 0, 1
        self.logger = logging.getLogger("toy")
        self.train_loop = SimpleNamespace(
            layout=SimpleNamespace(global_batch_size=4 * accumulate, accumulate=accumulate)
        )
        self.history: list[dict] = []

    def call(self, stage, **kwargs):
        for hook in self.hooks:
            getattr(hook, stage)(self, **kwargs)

    def train(self, make_batch=uint8_batch):
        self.call("before_train")
        while self.iter < self.max_iters:
            self.step(make_batch)
        self.call("after_train")

    def step(self, make_batch=uint8_batch):
        accumulate = self.train_loop.layout.accumulate
        batches = [make_batch(self.iter * accumulate + i) for i in range(accumulate)]
        index = {"batch_idx": self.iter, "data_batch": batches[0]}
        self.call("before_train_iter", **index)
        torch.manual_seed(1000 + self.iter)
        outputs = [self.model.train_step(batch, self.optim_wrapper) for batch in batches]
        mean = {name: torch.stack([o[name] for o in outputs]).mean(0) for name in outputs[0]}
        self.call("after_train_iter", **index, outputs=mean)
        self.history.append(mean)
        self.iter += 1
