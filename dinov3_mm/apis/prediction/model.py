"""A trained or released downstream model with its preprocessing, ready to predict."""

import copy
import logging
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from mmengine.config import Config
from mmengine.dataset import Compose, pseudo_collate
from mmengine.logging import print_log
from mmengine.registry import DATASETS, MODELS, DefaultScope
from torch import nn

from dinov3_mm.datasets.class_names import stored_metainfo
from dinov3_mm.engine.config import read_config
from dinov3_mm.engine.config.host import set_head, set_host_weights, settle_host
from dinov3_mm.engine.downstream import load_model_weights
from dinov3_mm.models.precision import (
    AUTO,
    DTYPES,
    asked_dtype,
    autocast_parts,
    choose_dtype,
    describe_choice,
)

# By class, the more special ones first.
_JOBS = {
    "DINOv3DepthEstimator": "depth",
    "ImageClassifier": "classification",
    "BaseSegmentor": "segmentation",
    "BaseDetector": "detection",
}


@dataclass(frozen=True)
class DownstreamModel:
    """A model of a host and what belongs to it.

    Attributes:
        module: in eval mode.
        pipeline: the config's test pipeline without the steps that read files.
        job: 'classification', 'segmentation', 'detection' or 'depth'.
        classes: names, empty where nothing states them (and for depth).
        palette: RGB colours, one a class; empty where nothing states them.
        scope: the host.
        dtype: what it computes in, 'fp32' or 'bf16'; its weights and results are fp32.
        choice: that in words, with the reason.
    """

    module: nn.Module
    pipeline: Compose
    job: str
    classes: tuple[str, ...]
    palette: tuple[tuple[int, int, int], ...]
    scope: str
    dtype: str = "fp32"
    choice: str = "fp32"

    @torch.no_grad()
    def predict(self, images: Sequence[np.ndarray]) -> list:
        """The host's data samples for (H, W, 3) uint8 RGB images, which are run one by one."""
        samples = []
        with DefaultScope.overwrite_default_scope(self.scope):
            for index, image in enumerate(images):
                item = self.pipeline(
                    {
                        "img": np.ascontiguousarray(image[..., ::-1]),
                        "img_shape": image.shape[:2],
                        "ori_shape": image.shape[:2],
                        "height": image.shape[0],
                        "width": image.shape[1],
                        "img_path": f"image-{index}",
                        "img_id": index,
                    }
                )
                samples += self.module.test_step(pseudo_collate([item]))
        return samples


def load_model(
    config: str | os.PathLike | Config,
    checkpoint: str | os.PathLike | None = None,
    *,
    weights: str | os.PathLike | None = None,
    head: str | os.PathLike | None = None,
    device: str | torch.device | None = None,
    dtype: str = AUTO,
) -> DownstreamModel:
    """Load a downstream model.

    Args:
        config: config file, or config.
        checkpoint: a training checkpoint. None takes what the config's ``init_cfg`` name, which
            ``weights`` and ``head`` replace: a released backbone and head.
        weights: file or name of the backbone's weights; with a checkpoint, where those lie that it
            leaves out.
        head: file of a released head.
        device: None takes a GPU if there is one.
        dtype: 'fp32', 'bf16' (autocast of the parts with the large products), or 'auto': what the
            config's ``compute_dtype`` says, and bf16 on a GPU and fp32 elsewhere where it says
            nothing or 'auto' itself.

    Raises:
        ConfigError: weights or head that are not there, or that the config does not take.
        FileNotFoundError: no such checkpoint.
        ValueError: tensors that do not fit, or an unknown dtype; fp16 is refused.
    """
    choose_dtype(dtype, "cpu")  # refuses an unknown one before weights are read
    cfg = copy.deepcopy(config) if isinstance(config, Config) else read_config(config)
    if weights is not None:
        set_host_weights(cfg, str(weights))
    if head is not None:
        set_head(cfg, str(head))
    if checkpoint is None:
        settle_host(cfg)
    scope = cfg.get("default_scope", "mmengine")
    device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    asked = (asked_dtype(cfg) or AUTO) if dtype == AUTO else dtype
    computes = choose_dtype(asked, device)
    with DefaultScope.overwrite_default_scope(scope):
        module = MODELS.build(cfg.model)
        meta = load_model_weights(
            module,
            None if checkpoint is None else str(checkpoint),
            weights=None if weights is None else str(weights),
        )
        dataset = _innermost(cfg.test_dataloader.dataset)
        pipeline = Compose(_without_loading(dataset.pipeline))
        facts = _facts(dataset, meta)
    job = _job(module)
    classes = _names_of_outputs(module, job, tuple(facts.get("classes") or ()))
    palette = tuple(tuple(colour) for colour in facts.get("palette") or ())
    if computes == "bf16":
        autocast_parts(module, DTYPES[computes])
    return DownstreamModel(
        module.to(device).eval(),
        pipeline,
        job,
        classes,
        palette,
        scope,
        computes,
        describe_choice(asked, computes, device),
    )


def _innermost(dataset: Config) -> Config:
    while "dataset" in dataset:
        dataset = dataset.dataset
    return dataset


def _without_loading(pipeline: Sequence[dict]) -> list[dict]:
    return [step for step in pipeline if not step["type"].split(".")[-1].startswith("Load")]


def _facts(dataset: Config, meta: dict[str, Any]) -> dict[str, Any]:
    """Class names and colours: of the checkpoint, else of the config's data set."""
    stated = stored_metainfo({"meta": meta})
    if stated.get("classes"):
        return stated
    return DATASETS.build({**dataset, "lazy_init": True, "pipeline": []}).metainfo


def _names_of_outputs(module: nn.Module, job: str, classes: tuple[str, ...]) -> tuple[str, ...]:
    """The names, unless there are more or fewer than a classifier or segmentor has outputs."""
    part = {"classification": "head", "segmentation": "decode_head"}.get(job)
    outputs = getattr(getattr(module, part or "", None), "num_classes", None)
    if not classes or outputs in (None, len(classes)):
        return classes
    print_log(
        f"the model has {outputs} outputs, and its data set names {len(classes)} classes "
        f"({', '.join(classes[:3])}, ...): results carry numbers, not names. A checkpoint of "
        "tools/train.py has the names of its classes",
        logger="current",
        level=logging.WARNING,
    )
    return ()


def _job(module: nn.Module) -> str:
    """What a model does, from its class."""
    kinds = [kind.__name__ for kind in type(module).__mro__]
    for kind, job in _JOBS.items():
        if kind in kinds:
            return job
    raise ValueError(f"a {kinds[0]} neither classifies, segments, detects nor estimates depth")


def as_model(model: DownstreamModel | str | os.PathLike | Sequence, job: str) -> DownstreamModel:
    """A loaded model for a job, loaded here if it is given as config or (config, checkpoint).

    Raises:
        ValueError: a model of another job.
    """
    if not isinstance(model, DownstreamModel):
        model = load_model(*model) if isinstance(model, (tuple, list)) else load_model(Path(model))
    if model.job != job:
        raise ValueError(f"this model is one of {model.job}, not of {job}")
    return model
