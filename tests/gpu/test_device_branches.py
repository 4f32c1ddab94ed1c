"""Every branch of the package on a device, and the test that executes its GPU side.

:func:`device_branches` collects them from the source: who reads ``is_cuda``, the type of a device,
or whether there is a GPU, other than to hand the type to autocast. A function that begins to do so
fails :func:`test_every_branch_has_a_test` until the table names its test.
"""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

import dinov3_mm
from tests.gpu_check.items import ITEMS

PACKAGE = Path(dinov3_mm.__file__).parent
ROOT = PACKAGE.parent

# What no CPU can execute is an item of tools/gpu_check.sh.
GPU_CHECK = "gpu_check:"
FAKE, SECOND = "tests/gpu/test_fake_cuda.py", "tests/gpu/test_second_device.py"
FIRST_STEP = f"{FAKE}::test_the_first_step_of_a_strategy"
DRY_RUN = "tests/engine/dry_run"
COMPILE = "tests/engine/test_compile.py"
PRECISION = "tests/engine/test_precision.py::test_the_device_decides_unless_asked"

# File of the package and function: the test, or the item, that executes its GPU side.
BRANCHES = {
    "apis/deployment/request.py::_check_backbone": (
        f"{SECOND}::test_only_backbones_on_the_cpu_are_exported"
    ),
    # Threads that forward, to which no fake mode reaches; pinned memory.
    "features/extraction.py::ExtractionRun.extract": f"{GPU_CHECK}extraction",
    "features/extractor.py::FeatureExtractor._place": f"{GPU_CHECK}extraction",
    "features/extractor.py::FeatureExtractor.run": f"{GPU_CHECK}extraction",
    "apis/prediction/model.py::load_model": f"{GPU_CHECK}extraction",
    "engine/feature_cache/views.py::build_cached_model": f"{GPU_CHECK}extraction",
    "datasets/loader.py::build_pretrain_dataloader": f"{GPU_CHECK}recipe-step",
    "engine/config/auto.py::gpu_gib": f"{SECOND}::test_memory_is_that_of_the_gpu",
    "engine/capture.py::random_state": f"{SECOND}::test_the_generator_of_the_gpu_is_captured",
    "engine/capture.py::replay_capture": f"{GPU_CHECK}fsdp2-resume",
    "engine/console.py::_device": f"{SECOND}::test_the_first_screen_names_the_gpu",
    "engine/strategies/ddp.py::check_device": (
        "tests/engine/test_cuda_graphs.py::test_a_cpu_is_refused_before_anything_is_built"
    ),
    "engine/dry_run/memory.py::MemoryLedger._counts": (
        f"{DRY_RUN}/test_run.py::test_memory_by_kind_adds_up"
    ),
    "engine/strategies/fsdp2.py::FSDP2Strategy._mesh": FIRST_STEP,
    "engine/strategies/fsdp2.py::_words": FIRST_STEP,
    "engine/hooks/progress.py::memory_text": f"{SECOND}::test_memory_is_that_of_the_gpu",
    "engine/hooks/guards.py::_PendingFlag.__init__": (
        f"{SECOND}::test_a_flag_comes_late_from_a_gpu"
    ),
    "engine/hooks/schedule.py::TeacherEMAHook.after_train_iter": (
        f"{DRY_RUN}/test_run.py::test_memory_by_kind_adds_up"
    ),
    "engine/hooks/evaluation.py::FrozenFeatureHook.before_train": f"{GPU_CHECK}knn",
    "engine/strategies/ddp.py::compile_obstacle": f"{COMPILE}::test_what_is_missing_is_named",
    "engine/strategies/ddp.py::decide_compile": f"{COMPILE}::test_auto_compiles_on_a_gpu_only",
    "models/precision.py::choose_dtype": PRECISION,
    "models/precision.py::describe_choice": PRECISION,
    "engine/strategies/ddp.py::PretrainStrategy._accelerated": FIRST_STEP,
    "features/frozen.py::_own_rows": f"{GPU_CHECK}knn",
    "engine/config/host.py::for_cpu_ranks": (
        f"{SECOND}::test_ranks_without_gpus_wrap_their_model_without_an_index"
    ),
    "engine/config/host.py::settle_host": (
        "tests/engine/test_host_config.py::test_batch_norms_are_not_synchronised_without_a_gpu"
    ),
    "engine/optim/optimizer.py::_is_known_to_fit": FIRST_STEP,
    "engine/launch.py::device_index": f"{SECOND}::test_a_rank_takes_the_gpu_of_its_number",
    "engine/launch.py::sees_one_of_several": (f"{SECOND}::test_a_rank_takes_the_gpu_of_its_number"),
    # NCCL meets for real.
    "engine/launch.py::start_processes": f"{GPU_CHECK}fsdp2-resume",
    "engine/strategies/ddp.py::PretrainDDPStrategy._wrap_model": FIRST_STEP,
    "engine/strategies/ddp.py::training_device": FIRST_STEP,
    "engine/strategies/students.py::MultiDistillationStrategy._wrap_model": (
        f"{DRY_RUN}/test_students.py::test_a_dry_run_for_each_group"
    ),
    # mmcv's CUDA operator has no shape function.
    "models/adapters/vit_adapter.py::DINOv3ViTAdapter._run_backbone": (f"{GPU_CHECK}downstream"),
    "models/adapters/vit_adapter.py::DeformableAttention.attend": (f"{GPU_CHECK}downstream"),
    "models/backbones/vit_trunk.py::ViTTrunk._run_blocks": FIRST_STEP,
    "models/backbones/vit_trunk.py::ViTTrunk._max_chunk_rows": (
        f"{SECOND}::test_inference_of_backbones"
    ),
    "models/layers/convnext_block.py::ConvNeXtBlock._max_chunk_rows": (
        f"{SECOND}::test_inference_of_backbones"
    ),
    "models/layers/attention.py::SelfAttention.pack": (
        f"{SECOND}::test_packed_attention_is_for_several_sequences_on_a_gpu"
    ),
    "models/layers/attention.py::_is_present": FIRST_STEP,
    "models/layers/attention.py::varlen_obstacle": (
        f"{SECOND}::test_packed_attention_is_for_several_sequences_on_a_gpu"
    ),
    "models/layers/attention.py::prefers_dense_attention": FIRST_STEP,
    "models/layers/fp8.py::_scaled_product": f"{FAKE}::test_gradients_of_float8_products",
    "models/layers/attention.py::_suits_onednn": FIRST_STEP,
    "models/losses/prototypes.py::_compute_dtype": FIRST_STEP,
    "models/losses/prototypes.py::_row_slices": FIRST_STEP,
    "models/pretraining/distillation.py::DistillationTeacher.project": (
        f"{DRY_RUN}/test_students.py::test_a_dry_run_for_each_group"
    ),
    "models/pretraining/student.py::DINOv3Head.project_and_prototypes": FIRST_STEP,
}
# It is the GPU.
NO_BRANCHES = "engine/dry_run/fake_cuda.py"


def test_every_branch_has_a_test():
    found = {
        branch
        for path in PACKAGE.rglob("*.py")
        if ".mim" not in path.parts and not path.as_posix().endswith(NO_BRANCHES)
        for branch in device_branches(path)
    }
    assert found - BRANCHES.keys() == set(), "name the test that executes it in BRANCHES"
    assert BRANCHES.keys() - found == set(), "no longer branches: take them out of BRANCHES"


@pytest.mark.parametrize("test", sorted(set(BRANCHES.values())))
def test_the_named_tests_exist(test):
    if test.startswith(GPU_CHECK):
        assert test.removeprefix(GPU_CHECK) in ITEMS
        return
    path, _, name = test.partition("::")
    tree = ast.parse((ROOT / path).read_text())
    assert name in {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}


def test_a_new_branch_is_found():
    path = PACKAGE / "new.py"
    source = """
class A:
    def f(self, x):
        return 1 if x.is_cuda else 0

def g(x):
    with torch.autocast(x.device.type):
        return x.device.type == "cpu"

def h(x):
    with torch.autocast(x.device.type):
        return x
"""
    assert set(_branches(source, path)) == {"new.py::A.f", "new.py::g"}


def device_branches(path: Path) -> Iterator[str]:
    """Names of the functions of a file that read what kind of device there is."""
    yield from _branches(path.read_text(), path)


def _branches(source: str, path: Path) -> Iterator[str]:
    tree = ast.parse(source)
    parents = {child: node for node in ast.walk(tree) for child in ast.iter_child_nodes(node)}
    for node in ast.walk(tree):
        if (
            isinstance(node, ast.Attribute)
            and _reads_kind(node)
            and not _is_handed_on(node, parents)
        ):
            yield f"{path.relative_to(PACKAGE).as_posix()}::{_owner(node, parents)}"


def _reads_kind(node: ast.Attribute) -> bool:
    source = ast.unparse(node)
    return (
        node.attr in ("is_cuda", "device_type")
        or (node.attr == "type" and "device" in ast.unparse(node.value))
        or source.endswith(("cuda.is_available", "accelerator.is_available", "cuda.device_count"))
    )


def _is_handed_on(node: ast.AST, parents: dict[ast.AST, ast.AST]) -> bool:
    """Whether the type is but the first argument of ``torch.autocast``."""
    call = parents[node]
    return isinstance(call, ast.Call) and ast.unparse(call.func) == "torch.autocast"


def _owner(node: ast.AST, parents: dict[ast.AST, ast.AST]) -> str:
    names = []
    while node in parents:
        node = parents[node]
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            names.append(node.name)
    return ".".join(reversed(names)) or "<module>"
