"""The console command ``dinov3-mm``.

A package of its own: importing ``dinov3_mm`` registers all of its modules, which takes seconds,
and help needs none of them. What a command does is imported when it is given.
"""

import argparse
import difflib
import importlib
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import NoReturn

PROGRAM = "dinov3-mm"
USAGE = 2


@dataclass(frozen=True)
class Command:
    """A command.

    Attributes:
        target: ``module:function`` below ``dinov3_mm.commands``.
        line: what it does.
        words: first arguments of the function.
    """

    target: str
    line: str
    words: tuple[str, ...] = ()


# By what one wants to do; within a group in the order in which one comes to them.
GROUPS: dict[str, dict[str, Command]] = {
    "Adapt: pretrain a backbone, or go on with one, on your images": {
        "configs": Command("configs:configs", "names of the configs, of all jobs"),
        "statistics": Command("configs:statistics", "mean and std of your images, by channel"),
        "plan": Command("configs:plan", "memory, work and traffic of a config on N GPUs"),
        "train": Command("train:main", "train a config, or try it out with --dry-run"),
        "replay": Command("train:replay", "run a step again whose loss was not finite"),
    },
    "Use: backbones and their features": {
        "backbones": Command("weights:backbones", "table of the backbones"),
        "extract": Command("extract:main", "features of images, into files"),
    },
    "Heads: classes, segments, boxes and depth on a frozen backbone": {
        "sweep": Command("heads:sweep_command", "train a head for every combination of values"),
        "test": Command("heads:test_command", "score a model on its validation data"),
    },
    "Predict: images, folders and videos": {
        "demo classify": Command("demo:run_demo", "classes of images", ("classification",)),
        "demo segment": Command("demo:run_demo", "class of every pixel", ("segmentation",)),
        "demo detect": Command("demo:run_demo", "objects in images", ("detection",)),
        "demo depth": Command("demo:run_demo", "depth of every pixel", ("depth",)),
    },
    "Deploy: leave this package": {
        "convert": Command("weights:convert", "official, Hugging Face, timm and our formats"),
        "export onnx": Command("weights:onnx", "ONNX, checked against PyTorch"),
        "export torch": Command("weights:torch_export", "torch.export, checked against PyTorch"),
    },
    "Several GPUs and clusters": {
        "dist_train": Command("train:launch", "CONFIG GPUS [ARGS of train]", ("dist_train",)),
        "dist_test": Command("train:launch", "CONFIG CHECKPOINT GPUS [ARGS]", ("dist_test",)),
        "slurm_train": Command(
            "train:launch", "PARTITION JOB CONFIG WORK_DIR [ARGS]", ("slurm_train",)
        ),
        "slurm_test": Command(
            "train:launch", "PARTITION JOB CONFIG CHECKPOINT [ARGS]", ("slurm_test",)
        ),
    },
}
COMMANDS = {name: command for group in GROUPS.values() for name, command in group.items()}
EXAMPLE = f"{PROGRAM} train dinov3/continue_vits16 --data DIR --weights FILE"


def overview() -> str:
    """The commands in their groups."""
    width = max(map(len, COMMANDS)) + 2
    lines = []
    for title, group in GROUPS.items():
        lines += [f"{title}:", *(f"  {name:<{width}}{each.line}" for name, each in group.items())]
        lines.append("")
    lines.append(f"{PROGRAM} COMMAND --help says more; a config is a file or a name:")
    lines.append(f"  {EXAMPLE}")
    return "\n".join(lines)


def split(words: Sequence[str]) -> tuple[str | None, list[str]]:
    """The command with which a command line begins, None if it is none, and the rest of it."""
    for count in (2, 1):
        if (name := " ".join(words[:count])) in COMMANDS:
            return name, list(words[count:])
    return None, list(words)


def refuse(parser: argparse.ArgumentParser, words: Sequence[str]) -> NoReturn:
    """End with what may have been meant."""
    given = words[0]
    inside = [name for name in COMMANDS if name.split()[0] == given]
    if inside and (len(words) == 1 or words[1] in ("-h", "--help")):
        print("\n".join(f"{PROGRAM} {name:<16}{COMMANDS[name].line}" for name in inside))
        sys.exit(USAGE if len(words) == 1 else 0)
    given = " ".join(words[: 1 + bool(inside)])
    near = difflib.get_close_matches(given, COMMANDS, n=1)
    meant = inside or near
    hint = f"did you mean {' or '.join(map(repr, meant))}?" if meant else "see --help"
    parser.error(f"there is no command {given!r}; {hint}")


def main(argv: Sequence[str] | None = None) -> None:
    """Run a command; default: of the command line."""
    words = list(sys.argv[1:] if argv is None else argv)
    name, rest = split(words)
    if name is None:
        parser = argparse.ArgumentParser(
            prog=PROGRAM,
            usage=f"{PROGRAM} COMMAND [ARGS]",
            description="DINOv3: adapt backbones to your images, and use them.",
            epilog=overview(),
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        parser.add_argument("--version", action="store_true", help="print the version")
        if words and not words[0].startswith("-"):
            refuse(parser, words)
        args = parser.parse_args(words)
        if args.version:
            print(f"{PROGRAM} {importlib.import_module('dinov3_mm').__version__}")
        else:
            parser.print_help()
        return
    # What a command says of itself and of its arguments begins with its name.
    sys.argv = [f"{PROGRAM} {name}", *rest]
    command = COMMANDS[name]
    from dinov3_mm.command_line import run_tool

    module_name, function = command.target.split(":")
    module = importlib.import_module(f"dinov3_mm.commands.{module_name}")
    interrupted = getattr(module, "ON_INTERRUPT", "interrupted")
    run_tool(partial(getattr(module, function), *command.words), interrupted=interrupted)
