"""What a person sees of a training that starts, is refused, and is ended with Ctrl-C, as text.

    python -m tests.acceptance.first_screens [--only pretraining downstream] [--out FILE]

Each screen is that of a real process, ``tools/train.py`` or ``tools/dist_train.sh`` with two ranks,
for a toy pretraining and for ``configs/quickstart/classification.py`` (shrunk). Ends with status 1
if a screen has a traceback, another exit status than it should, or more lines than a screen.
About two minutes on two cores.
"""

import argparse
import os
import signal
import subprocess
import sys
import tempfile
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

from dinov3_mm.command_line import INTERRUPTED
from tests.integration.toy_run import REPOSITORY, toy_config, write_images

DOWNSTREAM = "configs/quickstart/classification.py"
MOST_LINES = {"training": 30, "refused": 4}
MOST_SECONDS = 180


@dataclass(frozen=True)
class Screen:
    """A command, and what its screen has to be.

    Attributes:
        title: what it shows.
        command: words after ``tools/train.py`` or ``tools/dist_train.sh``; the config first.
        ranks: 0 is ``tools/train.py``.
        stop_at: text after which Ctrl-C is pressed.
        words: texts that must be on the screen.
    """

    title: str
    command: list[str]
    ranks: int
    stop_at: str | None = None
    words: tuple[str, ...] = field(default=())

    @property
    def shell(self) -> str:
        """The command as a person types it."""
        config, *rest = self.command
        start = ["bash", "tools/dist_train.sh", config, str(self.ranks)]
        words = [*(start if self.ranks else ["python", "tools/train.py", config]), *rest]
        return " ".join(words)


def screens(folder: Path) -> dict[str, list[Screen]]:
    """The screens of each job."""
    images, toy = write_images(folder / "images"), folder / "pretrain.py"
    toy_config(images, folder / "pretraining", train_cfg__max_iters=100000).dump(toy)
    slow = ["--cfg-options", "default_hooks.logger.interval=5", "train_dataloader.num_workers=1"]
    (folder / "notes.pth").write_text("these are no weights")
    small = [
        "train_dataloader.batch_size=8",
        "val_dataloader.dataset.length=32",
        "default_hooks.logger.interval=5",
        "train_dataloader.num_workers=1",
    ]
    untrained = ["--cfg-options", "model.backbone.init_cfg=None", *small]
    kinds = {
        "pretraining": (
            ([str(toy), *slow], "iter 10/"),
            {
                "no data": ([str(toy), "--data", str(folder / "photos")], "does not exist"),
                "a typo": ([str(toy), "--cfg-options", "train_cfg.max_iter=5"], "'max_iters'"),
                "wrong weights": (
                    [str(toy), "--cfg-options", f"load_from={folder / 'notes.pth'}"],
                    "notes.pth",
                ),
            },
        ),
        "downstream": (
            ([DOWNSTREAM, *untrained], "[1][ 10/"),
            {
                "no weights": ([DOWNSTREAM], "--weights FILE"),
                "a typo": (
                    [DOWNSTREAM, *untrained, "model.head.type=DINOv3LinearClsHaed"],
                    "'DINOv3LinearClsHead'",
                ),
                "wrong weights": ([DOWNSTREAM, "--weights", str(folder / "notes.pth")], "notes"),
            },
        ),
    }
    found: dict[str, list[Screen]] = {}
    for job, ((command, mark), refused) in kinds.items():
        found[job] = []
        for ranks in (0, 2):
            how = f"{ranks} ranks" if ranks else "one process"
            work_dir = ["--work-dir", str(folder / f"{job}_{ranks}")]
            config, *rest = command
            words = ("job  ", "data  ", "to stop  ", "stopped by Ctrl-C", "Ctrl-C: saving")
            title = f"{job}, {how}: a training, and Ctrl-C"
            found[job].append(Screen(title, [config, *work_dir, *rest], ranks, mark, words))
            for kind, ((config, *rest), word) in refused.items():
                title = f"{job}, {how}: refused, {kind}"
                found[job].append(Screen(title, [config, *work_dir, *rest], ranks, None, (word,)))
    return found


def show(screen: Screen) -> tuple[str, list[str]]:
    """The screen as text, and what is wrong with it."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    environment |= {"PYTHONPATH": str(REPOSITORY), "PYTHON": sys.executable}
    command = screen.shell.split()
    command[0] = sys.executable if command[0] == "python" else command[0]
    lines = []
    with subprocess.Popen(
        command,
        cwd=REPOSITORY,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    ) as process:
        alarm = threading.Timer(MOST_SECONDS, os.killpg, (process.pid, signal.SIGKILL))
        alarm.start()
        for line in process.stdout:
            lines.append(line.rstrip())
            if screen.stop_at is not None and screen.stop_at in line:
                os.killpg(process.pid, signal.SIGINT)  # as a terminal does
        alarm.cancel()
    text = "\n".join(lines)
    expected = 1 if screen.stop_at is None else INTERRUPTED
    most = MOST_LINES["refused" if screen.stop_at is None else "training"]
    wrong = [f"has no {word!r}" for word in screen.words if word not in text]
    wrong += ["has a traceback"] if "Traceback" in text else []
    wrong += [f"has {len(lines)} lines, more than {most}"] if len(lines) > most else []
    if process.returncode != expected:
        wrong.append(f"ends with status {process.returncode}, not {expected}")
    return f"$ {screen.shell}\n{text}\n[exit status {process.returncode}]", wrong


def main() -> int:
    """Print all screens; the exit status."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="+", choices=("pretraining", "downstream"))
    parser.add_argument("--out", type=Path, help="file for the text too")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        found = screens(Path(folder))
        chosen = [each for job in args.only or found for each in found[job]]
        with ThreadPoolExecutor(2) as pool:
            shown = list(pool.map(show, chosen))
        pages, faults = [], []
        for screen, (text, wrong) in zip(chosen, shown, strict=True):
            pages.append(f"=== {screen.title}\n{text.replace(folder, '/data')}\n")
            faults += [f"{screen.title}: {each}" for each in wrong]
    text = "\n".join([*pages, *(faults or ["all screens are as they should be"])])
    print(text)
    if args.out is not None:
        args.out.write_text(text + "\n")
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
