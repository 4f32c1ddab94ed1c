"""Released weights, a folder, one command, one file: continued pretraining in miniature.

    python -m tests.acceptance.continue_pretraining [--iters 240] [--images 1500]

A toy backbone is pretrained briefly and saved as the official files are. ``tools/train.py`` with
--data and --weights continues it at the toy size of configs/dinov3/continue_vits16.py, with one
process and with two. Asserted: the score of held-out images rises, both runs agree, and the one
file gives the same features in dinov3_mm, timm and transformers; mmseg and mmdet are asked where
they are installed.
"""

import argparse
import copy
import importlib.util
import tempfile
import time
from pathlib import Path

import torch
from mmengine.config import Config
from torch import nn

import dinov3_mm
from dinov3_mm.checkpoints import to_hf, to_timm
from dinov3_mm.engine.run_files import latest_export_path
from dinov3_mm.evaluation.records import read_records
from dinov3_mm.hosts import require_host
from tests.golden import assert_parity
from tests.integration.continue_run import toy_continue, write_released_like, write_scenes
from tests.integration.toy_run import REPOSITORY, start_training, train
from tests.integration.traces import read_trace

BATCH = 32
# Steps in which one and two processes are compared to rounding; later it has grown.
COMPARED = 20
LOSS_BAR = 1e-4


def pretrain(folder: Path, iters: int) -> Path:
    """A released-like file of the quickstart's backbone after a short pretraining."""
    cfg = Config.fromfile(REPOSITORY / "configs/quickstart/scenes_pretrain.py")
    cfg.work_dir = str(folder / "pretrain")
    cfg.train_cfg.max_iters = iters
    cfg.train_dataloader.source.update(length=2000, start=500_000)
    cfg.custom_hooks[0].lr.warmup_iters = iters // 5
    cfg.custom_hooks[1].teacher_temp.total_iters = iters // 2
    cfg.custom_hooks = [hook for hook in cfg.custom_hooks if hook.type != "KNNEvalHook"]
    train(cfg, folder)
    backbone = dinov3_mm.build_backbone(latest_export_path(cfg.work_dir))
    return write_released_like(backbone, folder / "toy_pretrain_lvd1689m-00000000.pth")


def continue_config(work_dir: Path, iters: int) -> Config:
    """The recipe with a given length and batch, in fp32 so that two runs can be compared.

    The toy is far from done, unlike a released model: it gets the rates of the quickstart, and its
    share of KoLeo. A third of the images is held out, so that scores have little noise.
    """
    cfg = toy_continue(
        "continue_vits16",
        work_dir,
        train_cfg__max_iters=iters,
        train_cfg__global_batch_size=BATCH,
        train_dataloader__source__every=3,
        model__compute_dtype="fp32",
        model__koleo__weight=1.0,
        optim_wrapper__paramwise_cfg=dict(layerwise_decay=1.0, head_lr_mult=3.0),
    )
    hooks = {hook.type: hook for hook in cfg.custom_hooks}
    hooks["OptimScheduleHook"].lr.base = 1e-3
    hooks["FolderEvalHook"].update(every=3, interval=iters // 3)
    return cfg


def continue_alone(folder: Path, images: Path, weights: Path, iters: int) -> Path:
    """One process; its work folder."""
    cfg = continue_config(folder / "alone", iters)
    train(cfg, folder, "--data", str(images), "--weights", str(weights))
    return folder / "alone"


def continue_on_ranks(folder: Path, images: Path, weights: Path, iters: int, stop: int) -> Path:
    """Two gloo ranks until step ``stop``; their work folder."""
    cfg = continue_config(folder / "ranks", iters)
    cfg.custom_imports.imports = [*cfg.custom_imports.imports, "tests.integration.stop_hook"]
    if stop < iters:
        cfg.custom_hooks.append(dict(type="StopHook", after=stop))
    cfg.dump(folder / "ranks.py")
    run = start_training(
        folder / "ranks.py", "--data", str(images), "--weights", str(weights), ranks=2
    )
    output, _ = run.communicate()
    if run.returncode:
        raise RuntimeError(output[-4000:])
    return folder / "ranks"


def largest_difference(first: Path, second: Path, steps: int) -> float:
    """Largest relative difference of a loss over the first steps."""
    traces = [read_trace(path) for path in (first, second)]
    names = [name for name in traces[0][1] if name.endswith("loss")]
    return max(
        abs(traces[1][step][name] - traces[0][step][name]) / abs(traces[0][step][name])
        for step in range(1, steps + 1)
        for name in names
    )


def scores(work_dir: Path) -> tuple[float, float]:
    """k-NN top-1 of the CLS token at the start and at the end."""
    records = read_records(work_dir / "evaluations.jsonl", "knn")
    assert records[0]["step"] == 0
    return records[0]["cls_top1_k10"], records[-1]["cls_top1_k10"]


@torch.no_grad()
def compare_libraries(path: Path, images: torch.Tensor) -> dict[str, float]:
    """Largest differences of all tokens between our features of a file and those of others.

    timm and transformers compute their RoPE periods; ours are made equal to theirs for this.
    """
    backbone = dinov3_mm.build_backbone(path)
    state = backbone.state_dict()
    exact = copy.deepcopy(backbone)
    exact.rope_embed.periods.copy_(
        dinov3_mm.build_backbone(path, periods="exact").rope_embed.periods
    )
    tokens = exact.forward_tokens(images)
    expected = torch.cat((tokens.cls[:, None], tokens.registers, tokens.patches), dim=1)
    arch = backbone.arch_settings
    return {
        "timm": assert_parity(in_timm(state, arch).forward_features(images), expected),
        "transformers": assert_parity(
            in_transformers(state, arch)(images).last_hidden_state, expected
        ),
    }


def in_timm(state: dict, arch: dict) -> nn.Module:
    """timm's model with our weights."""
    import timm

    model = timm.create_model(
        "vit_small_patch16_dinov3_qkvb",
        embed_dim=arch["embed_dims"],
        depth=arch["num_layers"],
        num_heads=arch["num_heads"],
        patch_size=arch["patch_size"],
        num_reg_tokens=arch["num_registers"],
        img_size=48,
        num_classes=0,
    )
    model.load_state_dict(to_timm(state, qkv_bias=True))
    return model.eval()


def in_transformers(state: dict, arch: dict) -> nn.Module:
    """transformers' model with our weights, read from a folder as any user would."""
    import transformers
    from safetensors.torch import save_file

    config = transformers.DINOv3ViTConfig(
        hidden_size=arch["embed_dims"],
        intermediate_size=int(arch["embed_dims"] * arch["ffn_ratio"]),
        num_hidden_layers=arch["num_layers"],
        num_attention_heads=arch["num_heads"],
        num_register_tokens=arch["num_registers"],
        patch_size=arch["patch_size"],
    )
    with tempfile.TemporaryDirectory() as folder:
        transformers.DINOv3ViTModel(config).save_pretrained(folder)
        save_file(to_hf(state), f"{folder}/model.safetensors", metadata={"format": "pt"})
        return transformers.DINOv3ViTModel.from_pretrained(folder).eval()


@torch.no_grad()
def compare_hosts(path: Path, images: torch.Tensor) -> dict[str, float]:
    """Largest differences of the feature map of a backbone that mmseg and mmdet build."""
    backbone = dinov3_mm.build_backbone(path)
    (expected,) = backbone(images)
    init_cfg = dict(type="DINOv3Pretrained", checkpoint=str(path))
    cfg = dict(type="DINOv3ViT", arch=backbone.arch_settings, init_cfg=init_cfg)
    differences = {}
    for host in ("mmseg", "mmdet"):
        if importlib.util.find_spec(host) is None:
            print(f"{host}: not installed, not asked")
            continue
        require_host(host)
        registry = importlib.import_module(f"{host}.registry").MODELS
        module = registry.build(copy.deepcopy(cfg)).eval()
        module.init_weights()
        differences[host] = assert_parity(module(images)[0], expected)
    return differences


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--iters", type=int, default=240)
    parser.add_argument("--pretrain-iters", type=int, default=120)
    parser.add_argument("--images", type=int, default=1500)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    began = time.perf_counter()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        images = write_scenes(folder / "scenes", arguments.images)
        weights = pretrain(folder, arguments.pretrain_iters)
        alone = continue_alone(folder, images, weights, arguments.iters)
        ranks = continue_on_ranks(folder, images, weights, arguments.iters, COMPARED)
        start, end = scores(alone)
        print(f"held-out k-NN top-1: {start:.1f} % at the start, {end:.1f} % at the end")
        difference = largest_difference(alone, ranks, COMPARED)
        print(f"1 process vs 2 ranks, {COMPARED} iterations: losses {difference:.1e} relative")
        path = latest_export_path(alone)
        inputs = torch.randn(2, 3, 48, 48, generator=torch.Generator().manual_seed(0))
        for library, value in {
            **compare_libraries(path, inputs),
            **compare_hosts(path, inputs),
        }.items():
            print(f"features of {path.name} in {library}: largest difference {value:.1e}")
    print(f"{(time.perf_counter() - began) / 60:.1f} minutes")
    if end <= start or difference > LOSS_BAR:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
