"""Which files and functions of the package a run passes through: what a reader has to open.

    python tools/dev/trace_modules.py {continue,build,segmentation} [--functions]

``continue`` is two iterations of ``configs/dinov3/continue_vits16.py`` at the toy size of the
integration tests; ``build`` is ``build_backbone(FILE)``; ``segmentation`` is two iterations of the
segmentation quickstart from cached features. Calls of all threads of this process are counted;
bodies of modules and classes, lambdas and comprehensions are not, nor what an import runs.
"""

import argparse
import contextlib
import io
import sys
import tempfile
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from types import CodeType, FrameType
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from mmengine.config import Config

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = ROOT / "dinov3_mm"
sys.path.insert(0, str(ROOT))


@contextlib.contextmanager
def entered() -> Iterator[set[CodeType]]:
    """Collect the code of all functions of the package that are entered."""
    seen: set[CodeType] = set()
    start = f"{PACKAGE}/"

    def note(frame: FrameType, event: str, _: object) -> None:
        code = frame.f_code
        if event == "call" and code not in seen and code.co_filename.startswith(start):
            # A module that is imported on demand calls decorators and tables of its own.
            if code.co_name.startswith("<") or _is_importing(frame):
                return
            seen.add(code)

    threading.setprofile(note)
    sys.setprofile(note)
    try:
        yield seen
    finally:
        sys.setprofile(None)
        threading.setprofile(None)


def _is_importing(frame: FrameType | None) -> bool:
    while frame is not None:
        if frame.f_code.co_name == "<module>" and frame.f_code.co_filename.startswith(str(PACKAGE)):
            return True
        frame = frame.f_back
    return False


def continue_pretraining(folder: Path) -> Callable[[], object]:
    """Two iterations on scenes, from a weight file, by ``tools/train.py``."""
    from tests.integration.continue_run import random_released_like, toy_continue, write_scenes
    from tests.integration.toy_run import train

    images = write_scenes(folder / "images", 60)
    weights = random_released_like(folder / "toy_pretrain_lvd1689m-00000000.pth")
    cfg = toy_continue(
        "continue_vits16",
        folder / "run",
        train_cfg__max_iters=2,
        train_cfg__global_batch_size=4,
    )
    return lambda: train(cfg, folder, "--data", str(images), "--weights", str(weights))


def build_from_file(folder: Path) -> Callable[[], object]:
    """A backbone from a weight file under official names."""
    import dinov3_mm
    from tests.integration.continue_run import random_released_like

    path = random_released_like(folder / "toy_pretrain_lvd1689m-00000000.pth")
    return lambda: dinov3_mm.build_backbone(str(path))


def toy_segmentation(folder: Path, iterations: int) -> "tuple[Config, list[str]]":
    """Config of the segmentation quickstart on four images, and options of ``tools/train.py``."""
    from mmengine.config import Config

    from dinov3_mm.checkpoints import export_backbone
    from tests.checkpoints.toys import quickstart_backbone

    weights = export_backbone(quickstart_backbone(), folder / "toy.safetensors")
    cfg = Config.fromfile(ROOT / "configs/quickstart/segmentation.py")
    cfg.work_dir = str(folder / "run")
    data = cfg.train_dataloader.dataset
    data.length = 4
    data.pipeline = [step for step in data.pipeline if "Random" not in step["type"]]
    cfg.train_dataloader.update(batch_size=2, num_workers=0, persistent_workers=False)
    cfg.train_cfg = dict(type="IterBasedTrainLoop", max_iters=iterations, val_interval=100)
    for name in ("val_dataloader", "val_cfg", "val_evaluator"):
        cfg[name] = None
    for name in ("test_dataloader", "test_cfg", "test_evaluator"):
        cfg[name] = None
    cfg.param_scheduler = []
    return cfg, ["--weights", str(weights)]


def segmentation_from_cache(folder: Path) -> Callable[[], object]:
    """Two iterations of the segmentation quickstart from cached features, by ``tools/train.py``."""
    from tests.integration.toy_run import train

    cfg, options = toy_segmentation(folder, 2)
    cache = str(folder / "cache")
    return lambda: train(cfg, folder, *options, "--cache-features", cache)


def frozen_head(folder: Path) -> Callable[[], object]:
    """The same, then two more iterations of the resumed run on the images themselves."""
    from tests.integration.toy_run import train

    first = segmentation_from_cache(folder)
    cfg, options = toy_segmentation(folder, 4)

    def run() -> None:
        first()
        train(cfg, folder, *options, "--resume")

    return run


RUNS = {
    "continue": continue_pretraining,
    "build": build_from_file,
    "segmentation": segmentation_from_cache,
}


def main() -> None:
    """Run, and print what was entered."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run", choices=RUNS)
    parser.add_argument("--functions", action="store_true", help="print the functions too")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as name, contextlib.redirect_stdout(io.StringIO()):
        run = RUNS[args.run](Path(name))
        with entered() as codes:
            run()
    files = Counter(str(Path(code.co_filename).relative_to(ROOT)) for code in codes)
    for file in sorted(files):
        print(f"{files[file]:4d}  {file}")
        if args.functions:
            of_file = (code for code in codes if code.co_filename.endswith(f"/{file}"))
            for code in sorted(of_file, key=lambda code: code.co_firstlineno):
                print(f"          {code.co_firstlineno:4d}  {code.co_qualname}")
    print(f"{args.run}: {len(codes)} functions in {len(files)} files")


if __name__ == "__main__":
    main()
