"""The figures of ``docs/architecture.md``: which function calls which, written from the code.

    python tools/dev/journeys.py              # write the figures and tables into the page
    python tools/dev/journeys.py --trace      # run, and say which of the calls do not happen

The calls are listed below; the rest of a figure (files, what a function does) is read from the
source, without importing it. A call must stand in the source of its caller, or pass through a
library that is named; ``--trace`` shows that it happens. ``tests/tools/test_journeys.py`` holds the
page to what this script writes.
"""

import argparse
import ast
import contextlib
import io
import re
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = ROOT / "dinov3_mm"
PAGE = ROOT / "docs" / "architecture.md"
# Colours of a figure by folder of the package; they must be readable on white and on black.
COLOURS = {
    "datasets": "#cfe8cf",
    "engine": "#d5dcf5",
    "features": "#f5e6c4",
    "checkpoints": "#f3d3d3",
    "models": "#e4d3f0",
}

Call = tuple[str, str, str]


@dataclass(frozen=True)
class Journey:
    """A way through the package.

    Attributes:
        run: how ``--trace`` walks it, a key of :func:`runs`.
        calls: a function with those that it calls below it, indented, in their order: ``-> CALLEE``
            for a call that stands in the caller's source, ``=WORD=> CALLEE`` for one that a library
            makes, or that goes through another name there. A name is that of a module below
            ``dinov3_mm`` with a function or a method, where it is defined.
    """

    run: str
    calls: str

    def parsed(self) -> list[Call]:
        """Caller, callee and word (or '') of every call, in their order."""
        found, above = [], []
        for line in self.calls.strip().splitlines():
            indent, word, name = re.fullmatch(
                r"( *)(?:->|=(\w+)=>)? ?(\S+)", line.rstrip()
            ).groups()
            above = above[: len(indent) // 2]
            if above:
                found.append((above[-1], name, word or ""))
            above.append(name)
        return found

    def stations(self) -> list[str]:
        """Functions in the order in which they first appear."""
        return list(dict.fromkeys(name for call in self.parsed() for name in call[:2]))


LOSS = """
engine.launch.run_training
  =mmengine=> engine.loop.PretrainLoop.run
    -> engine.loop.PretrainLoop._run_step
      -> engine.loop.PretrainLoop._next_batch
        =next=> datasets.loader.PretrainDataLoader.__iter__
          =torch=> datasets.order.PositionBatchSampler.__iter__
          =torch=> datasets.loader.MultiCropDataset.__getitem__
            -> datasets.loader.MultiCropDataset._load
              -> datasets.loader.MultiCropDataset.source_index
                =_order=> datasets.order.EpochOrder.__call__
                  =_cycles=> datasets.order.ShuffledCycles.__call__
                    =_permutations=> datasets.order.Permutation.__call__
              -> datasets.evaluation_images.HeldOutSplit.load_image
                -> datasets.sources.files.FileSource.load_image
                  -> datasets.multiband.PixelFormat.read
                    -> datasets.multiband.PixelFormat.decode
                      -> datasets.images.decode_image
            -> datasets.order.sample_generator
            =transform=> datasets.transforms.multi_crop.MultiCrop.__call__
              -> datasets.transforms.multi_crop.MultiCrop.draw
              -> datasets.transforms.multi_crop.MultiCrop.apply
          =torch=> datasets.collate.MultiCropCollate.__call__
            =planners=> datasets.collate.MaskPlanner.__call__
              -> datasets.collate.block_mask
      =mmengine=> engine.hooks.schedule.OptimScheduleHook.before_train_iter
      =mmengine=> engine.hooks.schedule.TeacherEMAHook.before_train_iter
      -> engine.loop.PretrainLoop._seed_model_noise
        -> datasets.order.torch_seed
      =mmengine=> models.pretraining.preprocessor.MultiCropPreprocessor.forward
      =mmengine=> models.pretraining.dinov3.DINOv3.forward
        -> models.pretraining.dinov3.DINOv3.loss
          -> models.pretraining.dinov3.DINOv3._run_teacher
            -> models.pretraining.student.WholeComparison.assignments
              -> models.losses.sinkhorn.sinkhorn_knopp
          -> models.pretraining.dinov3.DINOv3._run_student
            -> models.backbones.vit.ViTInterface.forward_tokens
              -> models.backbones.vit_trunk.ViTTrunk._embed
              -> models.backbones.vit_trunk.ViTTrunk._run_blocks_in_chunks
                -> models.backbones.vit_trunk.ViTTrunk._run_blocks
                  =torch=> models.layers.block.Block.forward
            -> models.pretraining.student.WholeComparison.scores
              =torch=> models.pretraining.student.DINOv3Head.forward
          -> models.pretraining.terms.image_terms
            -> models.pretraining.student.WholeComparison.dino
              -> models.losses.prototypes.dino_loss
            -> models.pretraining.student.WholeComparison.ibot
              -> models.losses.prototypes.ibot_loss
            -> models.pretraining.terms._koleo_term
              -> models.losses.koleo.koleo_loss
      =mmengine=> engine.optim.optimizer.PretrainOptimWrapper.backward
      =mmengine=> engine.optim.optimizer.PretrainOptimWrapper.step
      =mmengine=> engine.hooks.schedule.TeacherEMAHook.after_train_iter
        -> models.pretraining.dinov3.DINOv3.update_teacher
          -> models.pretraining.student.follow
"""
BACKBONE = """
checkpoints.build.build_backbone
  -> models.backbones.zoo.zoo_row
  -> checkpoints.load.load_weights
    -> checkpoints.locate.located
    -> checkpoints.locate.local_path
    -> checkpoints.containers.open_checkpoint
      -> checkpoints.containers.open_torch_file
    -> checkpoints.locate.check_released
    -> checkpoints.load._convert
      -> checkpoints.load.select_backbone
        -> checkpoints.load._find_layouts
      -> checkpoints.load._read_finite
      =to_official=> checkpoints.formats.conversion.official_to_official
      -> checkpoints.locate.find_statistics
  -> checkpoints.load.ForeignCheckpoint.arch
    =infer_arch=> checkpoints.formats.architecture.infer_vit_arch
  -> checkpoints.build.build_from_checkpoint
    -> checkpoints.build._build
      =mmengine=> models.backbones.vit.DINOv3ViT.__init__
        -> models.backbones.zoo.resolve_vit_arch
        =super=> models.backbones.vit.ViTInterface.__init__
          =super=> models.backbones.vit_trunk.ViTTrunk.__init__
            -> models.backbones.vit_trunk.ViTTrunk._build_modules
    -> checkpoints.install.install_weights
      -> checkpoints.install.inflate_first_layer
      -> checkpoints.install._compare
      -> checkpoints.load.shard_state
      =report=> checkpoints.load.LoadReport.__str__
"""
FROZEN = """
engine.build.build_runner
  -> engine.config.host.settle_host
    -> checkpoints.locate.find_statistics
  -> engine.hooks.downstream_checkpoint.write_aside
  =mmengine=> models.segmentation.linear.DINOv3PaddedEncoderDecoder.__init__
    =mmseg=> models.backbones.vit.DINOv3ViT.__init__
      =super=> models.backbones.vit.ViTInterface.__init__
        -> models.backbones.vit.ViTInterface._freeze_stages
    =mmseg=> models.segmentation.linear.DINOv3LinearSegHead.__init__
engine.launch.run_training
  =mmengine=> models.backbones.vit_trunk.ViTTrunk.init_weights
    =mmengine=> checkpoints.install.DINOv3Pretrained.__call__
      -> checkpoints.install.load_backbone_weights
        -> checkpoints.load.load_weights
        -> checkpoints.install.install_weights
  =mmengine=> engine.hooks.downstream_checkpoint.FrozenBackboneHook.before_train
    -> checkpoints.frozen.make_record
      -> checkpoints.frozen.fingerprint
  =mmseg=> models.backbones.vit.ViTInterface.forward
  =mmseg=> models.segmentation.linear.DINOv3LinearSegHead.forward
  =mmengine=> engine.hooks.downstream_checkpoint.HostCheckpointHook.after_train_iter
    =mmengine=> engine.hooks.downstream_checkpoint.HostCheckpointHook._save_checkpoint_with_step
      -> engine.hooks.downstream_checkpoint.HostCheckpointHook._write
        =mmengine=> engine.hooks.downstream_checkpoint.FrozenBackboneHook.before_save_checkpoint
          -> checkpoints.frozen.record_to_tensor
  =mmengine=> models.backbones.outputs.RecordedWeights._load_from_state_dict
    =DINOv3Recorded=> checkpoints.frozen.DINOv3Recorded.__call__
      -> checkpoints.install.load_backbone_weights
      -> checkpoints.frozen.fingerprint
engine.feature_cache.training.use_feature_cache
  -> engine.feature_cache.views.build_cached_model
    -> engine.feature_cache.views.frozen_part
  -> engine.feature_cache.training._cache
    -> engine.feature_cache.compute.compute_features
      -> engine.feature_cache.compute._run
engine.launch.run_training
  =mmengine=> engine.feature_cache.training.CachedFeaturesHook.before_run
    -> engine.feature_cache.views.detour
  =torch=> engine.feature_cache.training.CachedFeatures.__getitem__
    -> engine.feature_cache.training.CachedFeatures._sample
      -> engine.feature_cache.store.FeatureStore.read
"""
JOURNEYS = {
    "loss": Journey("continue", LOSS),
    "backbone": Journey("build", BACKBONE),
    "frozen": Journey("frozen", FROZEN),
}
# Whose calls cannot be read in our source.
LIBRARIES = ("torch", "mmengine", "mmseg")


@dataclass(frozen=True)
class Function:
    """A function or method, as its source says.

    Attributes:
        file: below the package.
        qualname: as Python gives it.
        summary: first line of its docstring, or of that of its class for a special method.
        words: names, attributes and strings in its source.
    """

    file: str
    qualname: str
    summary: str
    words: frozenset[str]


def find(name: str) -> Function:
    """Read a function from its source.

    Raises:
        LookupError: If there is no such module, or no such function in it.
    """
    parts = name.split(".")
    for length in range(len(parts) - 1, 0, -1):
        path = PACKAGE.joinpath(*parts[:length]).with_suffix(".py")
        if path.is_file():
            break
    else:
        raise LookupError(f"{name}: no such module below {PACKAGE.name}")
    node: ast.AST = _tree(path)
    above = node
    for part in parts[length:]:
        kinds = (ast.ClassDef, ast.FunctionDef)
        inside = {each.name: each for each in node.body if isinstance(each, kinds)}
        if part not in inside:
            raise LookupError(f"{name}: {path.relative_to(ROOT)} defines no {part}")
        above, node = node, inside[part]
    says = ast.get_docstring(node) or ""
    if not says and parts[-1].startswith("__") and isinstance(above, ast.ClassDef):
        says = ast.get_docstring(above) or ""
    file = str(path.relative_to(PACKAGE))
    return Function(file, ".".join(parts[length:]), says.split("\n")[0], frozenset(_words(node)))


_TREES: dict[Path, ast.Module] = {}


def _tree(path: Path) -> ast.Module:
    if path not in _TREES:
        _TREES[path] = ast.parse(path.read_text(encoding="utf-8"))
    return _TREES[path]


def _words(node: ast.AST) -> Iterator[str]:
    for each in ast.walk(node):
        if isinstance(each, ast.Name):
            yield each.id
        elif isinstance(each, ast.Attribute):
            yield each.attr
        elif isinstance(each, ast.Constant) and isinstance(each.value, str):
            yield each.value


def faults(journey: Journey) -> list[str]:
    """Calls that do not stand in the source of their caller."""
    found = []
    for caller, callee, word in journey.parsed():
        function, called = find(caller), find(callee).qualname.split(".")
        # Special methods are called by the name of their class.
        stated = word or (called[-2] if called[-1].startswith("__") else called[-1])
        if word not in LIBRARIES and stated not in function.words:
            found.append(f"{caller} does not name {stated}, by which it calls {callee}")
    return found


def figure(journey: Journey) -> str:
    """A flow chart in Mermaid, and a table of its stations in their order."""
    names = journey.stations()
    functions = {name: find(name) for name in names}
    place = {name: f"s{number}" for number, name in enumerate(names, 1)}
    lines = ["```mermaid", "flowchart LR"]
    for name, function in functions.items():
        room = function.file.split("/")[0]
        text = f"{place[name][1:]} {function.qualname}<br>{function.file}"
        lines.append(f'    {place[name]}["{text}"]:::{room}')
    for caller, callee, word in journey.parsed():
        label = f'|"{word}"|' if word else ""
        lines.append(f"    {place[caller]} -->{label} {place[callee]}")
    rooms = {function.file.split("/")[0] for function in functions.values()}
    for room, colour in COLOURS.items():
        if room in rooms:
            lines.append(f"    classDef {room} fill:{colour},stroke:#555,color:#111")
    lines += ["```", "", "| | function | file | what it does |", "|--:|---|---|---|"]
    for name, function in functions.items():
        link = f"[{function.file}](../{PACKAGE.name}/{function.file})"
        row = (place[name][1:], f"`{function.qualname}`", link, _plain(function.summary))
        lines.append(f"| {' | '.join(row)} |")
    return "\n".join(lines)


def _plain(text: str) -> str:
    """A line of a docstring as Markdown in a table."""
    text = re.sub(r":\w+:`~?(?:[\w.]+\.)?(\w+)`", r"`\1`", text).replace("``", "`")
    return text.replace("|", "\\|").replace("<", "&lt;")


def written(page: str) -> str:
    """The page with its figures between their markers as they are now.

    Raises:
        ValueError: If the page has no place for a figure.
    """
    for name, journey in JOURNEYS.items():
        start, end = f"<!-- journey {name}: tools/dev/journeys.py -->", f"<!-- end of {name} -->"
        if page.count(start) != 1 or page.count(end) != 1:
            raise ValueError(f"the page has no place {start} ... {end}")
        before, _, rest = page.partition(start)
        after = rest.partition(end)[2]
        page = f"{before}{start}\n\n{figure(journey)}\n\n{end}{after}"
    return page


@contextlib.contextmanager
def happening() -> Iterator[set[tuple[str, str]]]:
    """Collect calls as (caller, callee), frames of libraries between them left out."""
    seen: set[tuple[str, str]] = set()
    start = f"{PACKAGE}/"

    def station(frame: FrameType | None) -> str:
        if frame is None or not frame.f_code.co_filename.startswith(start):
            return ""
        code = frame.f_code
        file = Path(code.co_filename).relative_to(PACKAGE).with_suffix("")
        return f"{'.'.join(file.parts)}.{code.co_qualname}".removesuffix(".<genexpr>")

    def note(frame: FrameType, event: str, _: object) -> None:
        name = station(frame) if event == "call" else ""
        if name and "<" not in name:
            above = frame.f_back
            while above is not None and (not station(above) or "<" in station(above)):
                above = above.f_back
            seen.add((station(above), name))

    threading.setprofile(note)
    sys.setprofile(note)
    try:
        yield seen
    finally:
        sys.setprofile(None)
        threading.setprofile(None)


def runs() -> dict[str, Callable[[Path], Callable[[], object]]]:
    """How a journey is walked: from an empty folder to what is run."""
    sys.path.insert(0, str(ROOT))
    from tools.dev.trace_modules import RUNS, frozen_head

    return {**RUNS, "frozen": frozen_head}


def missing(journey: Journey) -> list[str]:
    """Calls that do not happen in a run."""
    with tempfile.TemporaryDirectory() as name, contextlib.redirect_stdout(io.StringIO()):
        run = runs()[journey.run](Path(name))
        with happening() as calls:
            run()
    pairs = [(caller, callee) for caller, callee, _ in journey.parsed()]
    return [f"{pair[0]} does not call {pair[1]}" for pair in pairs if pair not in calls]


def main() -> None:
    """Write the page, or run."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--trace", action="store_true", help="run, and compare")
    args = parser.parse_args()
    check = missing if args.trace else faults
    found = [f"{name}: {fault}" for name, each in JOURNEYS.items() for fault in check(each)]
    if found:
        sys.exit("\n".join(found))
    if not args.trace:
        PAGE.write_text(written(PAGE.read_text(encoding="utf-8")), encoding="utf-8")


if __name__ == "__main__":
    main()
