"""Several students in one run: in rank groups equal to runs of their own; three kinds of network.

    python -m tests.acceptance.multi_distillation [--iters 20] [--learn 300]

First, four gloo ranks in two groups against single distillations on the same global batch, once
with KoLeo across the ranks of a group (against one process) and once within a rank (against two
ranks): losses to 1e-5 relative in each iteration, parameters to 1e-4 relative L2 at the end. Then
one process trains a ViT, a ConvNeXt and a ResNet of timm from one teacher; their exports are loaded
and scored by k-NN beside their own random starts. ``--learn`` is the length of this part.
"""

import argparse
import json
import tempfile
from pathlib import Path

import timm
import torch
from mmengine.config import Config
from safetensors.torch import load_file
from torch import Tensor

import dinov3_mm
from dinov3_mm.engine.runner.files import checkpoint_path, latest_export_path
from dinov3_mm.engine.runner.training_state import read_training_state
from dinov3_mm.models.pretraining.multi_distillation import PREFIX
from tests.acceptance.rank_parity import Difference, relative
from tests.integration.distill_run import distill_config, multi_config, write_teacher
from tests.integration.toy_run import REPOSITORY, start_training, train
from tests.integration.traces import read_trace

RANKS = {"narrow": (0, 2), "deep": (2, 4)}
THREE_KINDS = REPOSITORY / "configs/quickstart/scenes_distill_multi.py"


def with_koleo(cfg: Config, distributed: bool) -> Config:
    """Where KoLeo looks for neighbours, for the student or for all students."""
    models = [cfg.model] if "students" not in cfg.model else list(cfg.model.students.values())
    for model in models:
        model.koleo = dict(weight=0.1, distributed=distributed)
    return cfg


def run_ranks(cfg: Config, folder: Path, name: str, ranks: int, *arguments: str) -> None:
    """Train on gloo ranks that ``tools/dist_train.sh`` starts."""
    cfg.dump(folder / f"{name}.py")
    run = start_training(folder / f"{name}.py", *arguments, ranks=ranks)
    output, _ = run.communicate()
    if run.returncode:
        raise RuntimeError(output[-6000:])


def student_trace(work_dir: Path, name: str) -> dict[int, dict[str, float]]:
    """Metrics of one student of a run with several, as of a run of its own."""
    prefix = f"{PREFIX}{name}/"
    return {
        step: {k.removeprefix(prefix): v for k, v in record.items() if k.startswith(prefix)}
        for step, record in read_trace(work_dir).items()
    }


def student_tensors(work_dir: Path, name: str, iteration: int) -> dict[str, Tensor]:
    folder = checkpoint_path(work_dir, iteration, sharded=True)
    return read_training_state(folder / f"students/{name}.pth")["state_dict"]


def compare(alone: Path, multi: Path, name: str, iters: int) -> Difference:
    """Largest relative difference of a loss in any iteration, and of a parameter at the end."""
    expected, actual = read_trace(alone), student_trace(multi, name)
    losses = {
        f"{name} {key} at iteration {step}": relative(actual[step][key], value)
        for step, record in expected.items()
        for key, value in record.items()
        if key.endswith("loss")
    }
    assert len(losses) == 5 * iters
    tensors = read_training_state(checkpoint_path(alone, iters))["state_dict"]
    others = student_tensors(multi, name, iters)
    assert tensors.keys() == others.keys()
    parameters = {
        key: ((others[key] - tensor).norm() / tensor.norm().clamp(min=1e-12)).item()
        for key, tensor in tensors.items()
        if tensor.is_floating_point() and "bias_mask" not in key
    }
    worst, worst_parameter = max(losses, key=losses.get), max(parameters, key=parameters.get)
    return Difference(losses[worst], worst, parameters[worst_parameter], worst_parameter)


def grouped_against_single(
    folder: Path,
    images: Path,
    teacher: Path,
    iters: int,
    distributed_koleo: bool,
    begin_together: bool = False,
) -> list[Difference]:
    """Two groups of two ranks; each student alone on one process, or two with local KoLeo.

    With ``begin_together`` one process trains both students for half of the run, and the groups
    resume its checkpoint.
    """
    tag = "koleo_across" if distributed_koleo else "koleo_within"
    multi = multi_config(images, teacher, folder / f"{tag}_multi", iters, ranks=RANKS)
    arguments = ()
    if begin_together:
        begun = multi_config(images, teacher, folder / f"{tag}_multi", iters // 2)
        train(with_koleo(begun, distributed_koleo), folder)
        arguments = ("--resume",)
    run_ranks(with_koleo(multi, distributed_koleo), folder, f"{tag}_multi", 4, *arguments)
    differences = []
    for name in RANKS:
        alone = folder / f"{tag}_{name}"
        cfg = distill_config(images, teacher, alone, name, iters)
        with_koleo(cfg, distributed_koleo)
        if distributed_koleo:
            train(cfg, folder)
        else:
            run_ranks(cfg, folder, f"{tag}_{name}", 2)
        differences.append(compare(alone, folder / f"{tag}_multi", name, iters))
    return differences


def three_kinds(folder: Path, teacher: Path, iters: int, **changes: object) -> dict[str, dict]:
    """k-NN top-1 of ViT, ConvNeXt and ResNet at the start and at the end, from their records.

    The exports must load: two by ``build_backbone``, the third by timm.
    """
    cfg = Config.fromfile(THREE_KINDS)
    cfg.merge_from_dict({"train_cfg.max_iters": iters, **changes})
    cfg.work_dir = str(folder / "kinds")
    train(cfg, folder, "--teacher", str(teacher))
    scores = {}
    for name in cfg.model.students:
        records = Path(cfg.work_dir) / f"students/{name}/evaluations.jsonl"
        knn = [json.loads(line) for line in records.read_text().splitlines()]
        scores[name] = {"start": knn[0]["cls_top1_k10"], "end": knn[-1]["cls_top1_k10"]}
        path = latest_export_path(cfg.work_dir, name)
        images = torch.rand(2, 3, 64, 64)
        backbone = cfg.model.students[name].backbone
        if backbone.type == "TimmBackbone":
            network = timm.create_model(backbone.name, num_classes=0)
            network.load_state_dict(load_file(path), strict=True)
            features = network.eval().forward_features(images)
        else:
            features = dinov3_mm.build_backbone(path).forward_tokens(images).patches
        scores[name]["finite"] = bool(features.isfinite().all())
    return scores


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--iters", type=int, default=20)
    parser.add_argument("--learn", type=int, default=300)
    arguments = parser.parse_args()
    passed = True
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        images, teacher = write_teacher(folder)
        for distributed in (True, False):
            for difference in grouped_against_single(
                folder, images, teacher, arguments.iters, distributed
            ):
                passed &= difference.is_within_bars
                koleo = "across" if distributed else "within"
                print(f"groups vs alone, KoLeo {koleo} ranks: {difference}", flush=True)
        scenes = folder / "scenes_teacher"
        cfg = Config.fromfile(REPOSITORY / "configs/quickstart/scenes_pretrain.py")
        cfg.merge_from_dict({"train_cfg.max_iters": arguments.learn, "work_dir": str(scenes)})
        train(cfg, folder)
        teacher = checkpoint_path(scenes, arguments.learn)
        for student, score in three_kinds(folder, teacher, arguments.learn).items():
            passed &= score["end"] > score["start"] and score["finite"]
            print(f"{student}: k-NN {score['start']:.1f} % -> {score['end']:.1f} %", flush=True)
    raise SystemExit(not passed)


if __name__ == "__main__":
    main()
