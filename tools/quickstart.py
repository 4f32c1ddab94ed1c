"""Pretrain in two stages, evaluate before and after, draw, and export one file.

``bash tools/quickstart.sh [DIR]`` prepares the environment and calls this program.
"""

import json
import os
import re
import shutil
import subprocess
import sys
import time
from argparse import Namespace
from collections import deque
from contextlib import suppress
from pathlib import Path

import torch
from mmengine.config import Config
from mmengine.registry import DATASETS
from rich.console import Console

import dinov3_mm
from dinov3_mm.command_line import INTERRUPTED, ToolParser, run_tool
from dinov3_mm.datasets import ImageFolder
from dinov3_mm.evaluation import (
    ImageSet,
    RandomViews,
    effective_rank,
    extract_features,
    random_init_backbone,
    raw_pixels,
    representation_table,
    two_crop_retrieval,
)
from dinov3_mm.evaluation.records import read_records
from dinov3_mm.visualization import plot_curves, points_vs_minutes, save_pca_grid

ROOT = Path(__file__).resolve().parent.parent
LOG_MESSAGE = re.compile(r"\d\d/\d\d (?P<time>[\d:]+) - mmengine - \w+ - (?P<text>.+)")
console = Console()


def parse_args() -> Namespace:
    parser = ToolParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", help="folder of images; without it SyntheticScenes")
    parser.add_argument("--out", default=str(ROOT / "work_dirs/quickstart"), help="result folder")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--recipe", default="quickstart", choices=("quickstart", "long"), help="length of stage 1"
    )
    parser.add_argument("--restart", action="store_true", help="discard what --out holds")
    return parser.parse_args()


def stage_config(stage: str, args: Namespace) -> Path:
    """Config file of a stage for the scenes or for a folder of images."""
    data = "folder" if args.images else "scenes"
    recipe = "_long" if args.recipe == "long" and stage == "pretrain" else ""
    return ROOT / f"configs/quickstart/{data}_{stage}{recipe}.py"


def num_processes() -> int:
    """One process per GPU, or per core of up to four: a power of two, so that batches divide.

    On the CPU single-threaded processes beat the threads of one: tensors this small gain little
    from a second thread.
    """
    available = torch.cuda.device_count() or min(4, len(os.sched_getaffinity(0)))
    return 1 << (available.bit_length() - 1)


def hook_index(cfg: Config, kind: str) -> int:
    """Position of the hook of a type in ``custom_hooks``."""
    return [hook["type"] for hook in cfg.custom_hooks].index(kind)


def train(stage: str, args: Namespace, *, earlier: Path | None = None) -> Path:
    """Run one stage in a process of its own, resuming what an interrupted run left behind.

    ``earlier`` is the work folder of the stage that it goes on from.
    """
    work_dir = Path(args.out) / stage
    options = {}
    if args.images:
        hook = hook_index(Config.fromfile(stage_config(stage, args)), "RetrievalEvalHook")
        options = {
            "train_dataloader.source.root": args.images,
            f"custom_hooks.{hook}.source.source.root": args.images,
        }
    command = ["bash", str(ROOT / "tools/dist_train.sh"), str(stage_config(stage, args))]
    command += [str(num_processes()), "--work-dir", str(work_dir)]
    command += ["--seed", str(args.seed), "--resume"]
    if earlier is not None:
        command += ["--from-stage", str(earlier)]
    if options:
        command += ["--cfg-options", *[f"{key}={value}" for key, value in options.items()]]
    console.rule(f"stage: {stage}")
    run_quietly(command, f"stage {stage} failed; the log is in {work_dir}", args.traceback)
    return work_dir


def run_quietly(command: list[str], failure: str, wants_all: bool) -> None:
    """Run a training and show its messages; if it fails, what it said that is no message."""
    environment = {**os.environ, "PYTHON": sys.executable}
    tail: deque[str] = deque(maxlen=30)
    command = [*command, "--traceback"] if wants_all else command
    with subprocess.Popen(
        command, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    ) as process:
        # Ctrl-C reaches the training too, which saves and ends; the second one ends both.
        with suppress(KeyboardInterrupt):
            show(process, tail)
        show(process, tail)
    if process.returncode == INTERRUPTED:
        raise KeyboardInterrupt
    if process.returncode:
        sys.exit("".join(tail) + f"{failure}. The same command goes on from the last checkpoint.")


def show(process: subprocess.Popen, tail: deque[str]) -> None:
    """Print the messages of a training; put everything else aside."""
    for line in process.stdout:
        message = LOG_MESSAGE.match(line)
        if message:
            print(message["time"], message["text"], flush=True)
        elif line.startswith("Ctrl-C: "):
            print(line, end="", flush=True)
        else:
            tail.append(line)


def score_scenes(backbone: torch.nn.Module, cfg: Config) -> dict:
    """The table of k-NN and dense probe beside raw pixels, colours and the untrained network."""
    hook = cfg.custom_hooks[hook_index(cfg, "KNNEvalHook")]
    table = representation_table(
        backbone,
        DATASETS.build(hook["train_source"]),
        DATASETS.build(hook["test_source"]),
        image_size=hook["image_size"],
        dense=True,
    )
    table.print(console)
    return table.to_dict()


def score_folder(backbone: torch.nn.Module, cfg: Config) -> dict:
    """Two-crop retrieval and effective rank: raw pixels, the untrained and the trained network."""
    hook = cfg.custom_hooks[hook_index(cfg, "RetrievalEvalHook")]
    source = DATASETS.build(hook["source"])
    views = [RandomViews(source, hook["image_size"], view, cache=True) for view in (0, 1)]
    features = {"raw pixels": [raw_pixels(view) for view in views]}
    for name, network in (
        ("random init, CLS", random_init_backbone(backbone)),
        ("trained, CLS", backbone),
    ):
        features[name] = [extract_features(network, view).cls for view in views]
    scores = {
        name: {
            "retrieval_top1": two_crop_retrieval(*pair),
            "effective_rank": effective_rank(pair[0]),
        }
        for name, pair in features.items()
    }
    console.print(f"two-crop retrieval over {len(source)} images:")
    for name, score in scores.items():
        console.print(
            f"  {name:<18} top-1 {score['retrieval_top1']:5.1f} %, "
            f"effective rank {score['effective_rank']:5.1f}"
        )
    return scores


def draw(backbone: torch.nn.Module, work_dirs: list[Path], cfg: Config, out: Path) -> list[Path]:
    """Loss curves of both stages, PCA of patch features, score against minutes."""
    pictures = []
    for work_dir in work_dirs:
        pictures.append(out / f"losses_{work_dir.name}.png")
        plot_curves(work_dir, pictures[-1], title=f"stage: {work_dir.name}")
    hook = next(hook for hook in cfg.custom_hooks if hook["type"].endswith("EvalHook"))
    source = DATASETS.build(hook.get("test_source") or hook["source"])
    # Twice the evaluation size: the PCA then has four times the patches to colour.
    images = ImageSet(source, 2 * hook["image_size"])
    shown = torch.utils.data.Subset(images, range(min(12, len(images))))
    networks = {"random init": random_init_backbone(backbone), "trained": backbone}
    patches = {
        name: extract_features(network, shown, patches=True).patches
        for name, network in networks.items()
    }
    pictures.append(out / "pca.png")
    save_pca_grid(pictures[-1], [shown[i] for i in range(len(shown))], patches)
    name = "knn" if hook["type"] == "KNNEvalHook" else "retrieval"
    if read_records(work_dirs[0] / "evaluations.jsonl", name):
        pictures.append(out / "score_vs_minutes.png")
        score = "cls_top1_k10" if name == "knn" else "cls_top1"
        points_vs_minutes(work_dirs[0], pictures[-1], evaluation=name, score=score)
    return pictures


def main() -> None:
    args = parse_args()
    # Small tensors: a second thread gains little, and costs much where the cores are shared.
    torch.set_num_threads(1)
    began = time.perf_counter()
    if args.images:
        console.print(f"{len(ImageFolder(args.images))} images in {args.images}")
    out = Path(args.out).resolve()
    if args.restart and out.exists():
        shutil.rmtree(out)
    out.mkdir(parents=True, exist_ok=True)
    first = train("pretrain", args)
    second = train("gram", args, earlier=first)
    weights = out / "dinov3_backbone.safetensors"
    for suffix in (".safetensors", ".json"):
        shutil.copyfile(second / f"exports/teacher_latest{suffix}", weights.with_suffix(suffix))
    backbone = dinov3_mm.build_backbone(str(weights))
    cfg = Config.fromfile(stage_config("pretrain", args))
    console.rule("result")
    if args.images:
        hook = cfg.custom_hooks[hook_index(cfg, "RetrievalEvalHook")]
        hook["source"]["source"]["root"] = args.images
        scores = score_folder(backbone, cfg)
    else:
        scores = score_scenes(backbone, cfg)
    (out / "scores.json").write_text(json.dumps(scores, indent=2))
    pictures = draw(backbone, [first, second], cfg, out)
    console.print("\nPictures: " + ", ".join(str(picture) for picture in pictures))
    console.print(f"Weights:  {weights}\n\nUse them:\n")
    print(
        "    import torch, dinov3_mm\n"
        f"    backbone = dinov3_mm.build_backbone({str(weights)!r})\n"
        "    tokens = backbone.forward_tokens(torch.rand(1, 3, 64, 64))  # .cls, .patches"
    )
    console.print(f"\nDone in {(time.perf_counter() - began) / 60:.1f} minutes.")


if __name__ == "__main__":
    run_tool(main, interrupted="interrupted; the same command goes on")
