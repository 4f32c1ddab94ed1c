"""When blocks and losses are compiled, and what is said about it."""

import pytest
import torch
from mmengine.config import Config

from dinov3_mm.engine.strategies.ddp import compile_obstacle, decide_compile
from dinov3_mm.models.backbones import DINOv3ViT
from tests.integration.toy_run import toy_config, train, write_images

CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)


@pytest.fixture
def machine(monkeypatch):
    """A machine with triton, compilers and a GPU, from which a test takes something away."""
    monkeypatch.setattr("dinov3_mm.engine.strategies.ddp.has_triton_package", lambda: True)
    monkeypatch.setattr("shutil.which", lambda name: f"/usr/bin/{name}")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    for variable in ("CC", "CXX"):
        monkeypatch.delenv(variable, raising=False)
    return monkeypatch


def test_auto_compiles_on_a_gpu_only(machine):
    assert decide_compile("auto", GPU) == (True, None)
    is_compiled, reason = decide_compile("auto", CPU)
    assert not is_compiled and "off on cpu" in reason
    assert decide_compile(True, CPU) == (True, None)
    assert decide_compile(False, GPU) == (False, None)
    with pytest.raises(ValueError, match="compile_blocks is 'always'; expected True, False or"):
        decide_compile("always", GPU)


@pytest.mark.parametrize(
    "missing, words",
    [
        ("triton", "needs triton, which is not installed"),
        ("compiler", "needs a C compiler, and there is no gcc or clang.*the variable CC"),
        ("named compiler", "needs a C compiler, and there is no CC=/opt/cc"),
        ("capability", "needs compute capability 7.0, and cuda:0 has 6.1"),
    ],
)
def test_what_is_missing_is_named(machine, missing, words):
    if missing == "triton":
        machine.setattr("dinov3_mm.engine.strategies.ddp.has_triton_package", lambda: False)
    elif missing == "capability":
        machine.setattr(torch.cuda, "get_device_capability", lambda device: (6, 1))
    else:
        machine.setattr("shutil.which", lambda name: None)
        if missing == "named compiler":
            machine.setenv("CC", "/opt/cc")
    is_compiled, reason = decide_compile("auto", GPU)
    assert not is_compiled and reason.startswith("off, the run is slower than it could be: ")
    with pytest.raises(RuntimeError, match=f"compile_blocks=True: .*{words}.*compile_blocks=False"):
        decide_compile(True, GPU)


def test_the_cpu_needs_a_cpp_compiler(machine):
    assert compile_obstacle(CPU) is None
    machine.setattr("shutil.which", lambda name: None)
    assert "needs a C++ compiler, and there is no g++ or clang++" in compile_obstacle(CPU)


AUTO = (
    "continue_vitl16",
    "distill_convnext_tiny",
    "distill_multi",
    "vits_pretrain",
    "vitl_high_res",
)


@pytest.mark.parametrize("name", [*AUTO, "continue_gram_vits16", "vitb_gram_anchor"])
def test_recipes_compile_by_default(name):
    assert Config.fromfile(f"configs/dinov3/{name}.py").strategy.compile_blocks == "auto"


def test_sets_of_crop_sizes_share_what_is_compiled():
    """The high-resolution stage draws one of five sets a step: torch finds that sizes vary, and
    compiles once more for all of them.
    """
    torch._dynamo.reset()
    arch = dict(embed_dims=32, num_layers=1, num_heads=2, layer_scale_init_value=1.0)
    plain, compiled = (DINOv3ViT(arch=arch, patch_size=8, with_cp=True).train() for _ in range(2))
    plain.init_weights()
    compiled.load_state_dict(plain.state_dict())
    # What it becomes of a graph is not the question: the compiler proper is left out.
    compiled.blocks[0].compile(backend="aot_eager", fullgraph=True)
    kinds = []
    for sizes in ((64, 16), (96, 16), (96, 24), (96, 32), (96, 48)):
        images = [torch.randn(2, 3, size, size) for size in sizes]
        grads = []
        for model in (plain, compiled):
            outputs = model.forward_tokens(images)
            loss = sum(out.patches.square().mean() for out in outputs)
            grads.append(torch.autograd.grad(loss, model.blocks[0].mlp.fc1.weight)[0])
        torch.testing.assert_close(grads[1], grads[0], rtol=1e-4, atol=1e-6)
        kinds.append(torch._dynamo.utils.counters["stats"]["unique_graphs"])
    assert kinds[-1] == kinds[2]


def test_the_log_says_whether_a_run_is_compiled(tmp_path):
    cfg = toy_config(write_images(tmp_path / "images"), tmp_path / "run", train_cfg__max_iters=1)
    cfg.strategy = dict(type="PretrainStrategy", compile_blocks="auto")
    train(cfg, tmp_path)
    (log,) = (tmp_path / "run").glob("*/*.log")
    assert "torch.compile: off on cpu (compile_blocks='auto' compiles on a GPU)" in log.read_text()
