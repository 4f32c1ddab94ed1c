"""A pretraining run that takes seconds: random images, a backbone of two blocks, every hook."""

import itertools
import os
import subprocess
import sys
from pathlib import Path
from unittest.mock import patch

import numpy as np
from mmengine.config import Config
from PIL import Image

from tools.train import main

REPOSITORY = Path(__file__).parents[2]
_RUNS = itertools.count()


def write_images(folder: Path, count: int = 24, size: int = 48, seed: int = 0) -> Path:
    """Write smooth random RGB images as PNG files and return the folder."""
    rng = np.random.default_rng(seed)
    folder.mkdir(parents=True, exist_ok=True)
    for index in range(count):
        coarse = rng.integers(0, 256, (6, 6, 3), dtype=np.uint8)
        Image.fromarray(coarse).resize((size, size), Image.BICUBIC).save(
            folder / f"{index:03d}.png"
        )
    return folder


def toy_config(images: Path, work_dir: Path, **changes: object) -> Config:
    """Config of the run; ``changes`` are dotted paths with ``__`` for the dot.

    32 px global and 16 px local crops at patch size 8: 16 and 4 tokens. Stochastic depth and RoPE
    augmentation are on, so that a resumed run is only right if the model's noise is.
    """
    head = dict(
        type="DINOv3Head", in_dims=32, num_prototypes=24, hidden_dims=32, bottleneck_dims=16
    )
    cfg = Config(
        dict(
            runner_type="FlexibleRunner",
            work_dir=str(work_dir),
            model=dict(
                type="DINOv3",
                backbone=dict(
                    type="DINOv3ViT",
                    arch=dict(embed_dims=32, num_layers=2, num_heads=2),
                    patch_size=8,
                    drop_path_rate=0.2,
                    rope_jitter_coords=1.1,
                    rope_rescale_coords=2.0,
                ),
                dino_head=dict(head),
                ibot_head=dict(head),
                data_preprocessor=dict(
                    type="MultiCropPreprocessor",
                    mean=[0.485, 0.456, 0.406],
                    std=[0.229, 0.224, 0.225],
                ),
            ),
            train_cfg=dict(type="PretrainLoop", max_iters=12, global_batch_size=4),
            train_dataloader=dict(
                source=dict(type="ImageFolder", root=str(images)),
                transform=dict(type="MultiCrop", global_size=32, local_size=16, num_local=2),
                num_workers=0,
            ),
            optim_wrapper=dict(
                type="PretrainOptimWrapper",
                constructor="PretrainOptimConstructor",
                optimizer=dict(type="AdamW", lr=2e-3, betas=(0.9, 0.999)),
                paramwise_cfg=dict(layerwise_decay=0.9, patch_embed_lr_mult=0.2),
                clip_grad=3.0,
            ),
            custom_hooks=[
                dict(
                    type="OptimScheduleHook",
                    lr=dict(type="cosine", base=2e-3, final=1e-6, warmup_iters=2, total_iters=12),
                    weight_decay=dict(type="cosine", base=0.04, final=0.2, total_iters=12),
                    freeze_last_layer_iters=1,
                ),
                dict(
                    type="TeacherEMAHook",
                    momentum=dict(type="cosine", base=0.9, final=1.0, total_iters=12),
                    teacher_temp=dict(type="linear", start=0.04, end=0.07, total_iters=6),
                ),
                dict(type="DiagnosisHook", interval=5),
            ],
            default_hooks=dict(
                logger=dict(type="ProgressHook", interval=1, bar=False),
                checkpoint=dict(type="PretrainCheckpointHook", interval=3),
            ),
            visualizer=dict(type="Visualizer", vis_backends=[dict(type="LocalVisBackend")]),
        )
    )
    cfg.merge_from_dict({key.replace("__", "."): value for key, value in changes.items()})
    return cfg


def train(cfg: Config, folder: Path, *arguments: str) -> int:
    """Run ``tools/train.py`` in this process on a config file of ``cfg``; its exit status."""
    # MMEngine names loggers and writers by experiment and second.
    cfg.experiment_name = f"toy{next(_RUNS)}"
    path = folder / "toy.py"
    # Laying the config out for readers would take half of the time of such a run.
    with patch("yapf.yapflib.yapf_api.FormatCode", lambda text, **_: (text, True)):
        cfg.dump(path)
        return main([str(path), *arguments])


def start_training(config: Path, *arguments: str, ranks: int | None = None) -> subprocess.Popen:
    """Start ``tools/train.py``, or ``tools/dist_train.sh`` with ``ranks``, as a process."""
    environment = {
        **os.environ,
        "PYTHONPATH": str(REPOSITORY),
        "PYTHON": sys.executable,
        "OMP_NUM_THREADS": "1",
        "CUDA_VISIBLE_DEVICES": "",
    }
    if ranks is None:
        command = [sys.executable, str(REPOSITORY / "tools/train.py"), str(config)]
    else:
        command = ["bash", str(REPOSITORY / "tools/dist_train.sh"), str(config), str(ranks)]
    return subprocess.Popen(
        [*command, *arguments],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
