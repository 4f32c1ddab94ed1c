"""Several students in one run: in rank groups equal to runs of their own; three kinds of network.

    python -m tests.acceptance.multi_distillation [--part groups] [--iters 20]
    python -m tests.acceptance.multi_distillation [--part kinds] [--learn 300] [--seeds 0 1 2]

First, four gloo ranks in two groups against single distillations on the same global batch, once
with KoLeo across the ranks of a group (against one process) and once within a rank (against two
ranks): losses to 1e-5 relative in each iteration, parameters to 1e-4 relative L2 at the end. Then
one process trains a ViT, a ConvNeXt and a ResNet of timm from one teacher, for each seed; their
exports are loaded and scored by k-NN beside their own random starts, which each must beat with
every seed. ``--learn`` is the length of teacher and students; a seed takes about ten minutes.
"""

import argparse
import json
import tempfile
import time
from pathlib import Path

import timm
import torch
from mmengine.config import Config
from rich.console import Console
from rich.table import Table
from safetensors.torch import load_file
from torch import Tensor

import dinov3_mm
from dinov3_mm.engine.run_files import checkpoint_path, latest_export_path
from dinov3_mm.engine.training_state import read_training_state
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


def scenes_teacher(folder: Path, iters: int, seed: int) -> Path:
    """Checkpoint of a teacher that was trained on SyntheticScenes."""
    cfg = Config.fromfile(REPOSITORY / "configs/quickstart/scenes_pretrain.py")
    cfg.merge_from_dict({"train_cfg.max_iters": iters, "work_dir": str(folder / "scenes_teacher")})
    train(cfg, folder, "--seed", str(seed))
    return checkpoint_path(cfg.work_dir, iters)


def three_kinds(
    folder: Path, teacher: Path, iters: int, seed: int = 0, **changes: object
) -> dict[str, dict]:
    """k-NN top-1 of ViT, ConvNeXt and ResNet at the start and at the end, from their records.

    The exports must load: all by ``build_backbone``, the ResNet also by timm.
    """
    cfg = Config.fromfile(THREE_KINDS)
    cfg.merge_from_dict({"train_cfg.max_iters": iters, **changes})
    cfg.work_dir = str(folder / "kinds")
    train(cfg, folder, "--teacher", str(teacher), "--seed", str(seed))
    scores = {}
    for name in cfg.model.students:
        records = Path(cfg.work_dir) / f"students/{name}/evaluations.jsonl"
        knn = [json.loads(line) for line in records.read_text().splitlines()]
        path = latest_export_path(cfg.work_dir, name)
        scores[name] = {
            "start": knn[0]["cls_top1_k10"],
            "end": knn[-1]["cls_top1_k10"],
            "loads": _export_loads(path, cfg.model.students[name].backbone),
        }
    return scores


def _export_loads(path: Path, backbone: Config) -> bool:
    """Whether the export gives finite features, of a timm network those of timm."""
    images = torch.rand(2, 3, 64, 64)
    with torch.no_grad():
        features = dinov3_mm.build_backbone(path).eval().forward_tokens(images).patches
        if backbone.type == "TimmBackbone":
            network = timm.create_model(backbone.name, num_classes=0, **backbone.model_args)
            network.load_state_dict(load_file(path), strict=True)
            expected = network.eval().forward_features(images).flatten(2).mT
            torch.testing.assert_close(features, expected)
    return bool(features.isfinite().all())


def check_groups(folder: Path, iters: int) -> bool:
    """Print the differences of rank groups from single runs; whether all are within the bars."""
    passed = True
    images, teacher = write_teacher(folder)
    for distributed in (True, False):
        for difference in grouped_against_single(folder, images, teacher, iters, distributed):
            passed &= difference.is_within_bars
            koleo = "across" if distributed else "within"
            print(f"groups vs alone, KoLeo {koleo} ranks: {difference}", flush=True)
    return passed


def check_kinds(folder: Path, iters: int, seeds: list[int]) -> bool:
    """Print the k-NN accuracies; whether every student beats its own start with every seed."""
    table = Table("student", "seed", "start %", "end %", "export loads", "minutes, all students")
    passed = True
    for seed in seeds:
        place = folder / f"seed{seed}"
        place.mkdir()
        begin = time.perf_counter()
        teacher = scenes_teacher(place, iters, seed)
        for student, score in three_kinds(place, teacher, iters, seed).items():
            passed &= score["end"] > score["start"] and score["loads"]
            print(f"{student}, seed {seed}: k-NN {score['start']:.1f} % -> {score['end']:.1f} %")
            table.add_row(
                student,
                str(seed),
                f"{score['start']:.1f}",
                f"{score['end']:.1f}",
                "yes" if score["loads"] else "no",
                f"{(time.perf_counter() - begin) / 60:.1f}",
            )
    Console().print(table)
    return passed


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--part", choices=("groups", "kinds"), help="default: both")
    parser.add_argument("--iters", type=int, default=20)
    parser.add_argument("--learn", type=int, default=300)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    arguments = parser.parse_args()
    passed = True
    with tempfile.TemporaryDirectory() as name:
        if arguments.part != "kinds":
            passed &= check_groups(Path(name), arguments.iters)
        if arguments.part != "groups":
            passed &= check_kinds(Path(name), arguments.learn, arguments.seeds)
    raise SystemExit(not passed)


if __name__ == "__main__":
    main()
