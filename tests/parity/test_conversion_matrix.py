"""Every format to every other, compared with the libraries; mutants of the conversions fail."""

import pytest
import torch

from dinov3_mm.checkpoints import convert as foreign_models
from dinov3_mm.checkpoints import targets
from dinov3_mm.checkpoints.containers import open_checkpoint
from dinov3_mm.checkpoints.convert import convert_checkpoint
from dinov3_mm.checkpoints.formats.conversion import PERIODS_KEY
from dinov3_mm.models.backbones import DINOv3ConvNeXt
from tests.checkpoints.toys import assert_same_tensors, redraw, tensors_of, toy_backbone

pytest.importorskip("transformers")
pytest.importorskip("timm")

NAMES = {"official": "w_lvd1689m.pth", "mm": "w.safetensors", "hf": "hf", "timm": "timm"}
KINDS = ("mlp", "swiglu", "convnext")


def toy(kind):
    """A toy backbone as released files are: K biases 0, periods rounded to bf16."""
    if kind == "convnext":
        backbone = DINOv3ConvNeXt({"depths": [1, 1, 2, 1], "dims": [8, 16, 24, 32]})
        backbone.init_weights()
        return redraw(backbone, 1)
    ratio = 3.0 if kind == "swiglu" else 2.0
    backbone = toy_backbone(1, patch_size=16, num_registers=4, ffn_layer=kind, ffn_ratio=ratio)
    with torch.no_grad():
        for block in backbone.blocks:
            block.attn.qkv.bias.mul_(block.attn.qkv.bias_mask)
        periods = backbone.rope_embed.periods
        periods.copy_(periods.bfloat16())
    return backbone


def save_official(backbone, path):
    state = tensors_of(backbone)
    if PERIODS_KEY in state:
        state[PERIODS_KEY] = state[PERIODS_KEY].bfloat16()
    torch.save(state, path)
    return path


def stored(path):
    opened = open_checkpoint(path)
    return opened.read(opened.names)


@pytest.fixture(scope="module", params=KINDS)
def sources(request, tmp_path_factory):
    """One toy in all four formats."""
    folder = tmp_path_factory.mktemp(request.param)
    official = save_official(toy(request.param), folder / NAMES["official"])
    paths = {"official": official}
    for to in ("hf", "timm", "mm"):
        paths[to] = folder / NAMES[to]
        report = convert_checkpoint(official, paths[to], to=to)
        assert set(report.differences) == {"cls", "patches"}
        assert max(report.differences.values()) < 2e-6
    return paths


@pytest.mark.parametrize("via", NAMES)
@pytest.mark.parametrize("start", NAMES)
def test_there_and_back_is_exact_to_the_bit(start, via, sources, tmp_path):
    there, back = tmp_path / "there" / NAMES[via], tmp_path / "back" / NAMES[start]
    for source, path, to in ((sources[start], there, via), (there, back, start)):
        report = convert_checkpoint(source, path, to=to)
        assert max(report.differences.values()) < 2e-6
    expected = stored(sources[start])
    for name in ("mask_token", "embeddings.mask_token"):
        if name in expected and via == "timm":
            expected[name] = torch.zeros_like(expected[name])
    assert_same_tensors(stored(back), expected)


@pytest.mark.parametrize("to", NAMES)
def test_the_statistics_travel(to, sources, tmp_path):
    report = convert_checkpoint(
        sources["mm"], tmp_path / f"plain_{NAMES[to][1:]}", to=to, statistics="SAT-493M"
    )
    lost = [entry for entry in report.dropped if entry.startswith("input statistics")]
    # A bare file of torch.save has no place for them, and its name is that of other data.
    assert len(lost) == (to == "official")


def swap(first, second):
    """A mutation of converted names."""

    def mutate(tensors):
        exchanged = {}
        for name, tensor in tensors.items():
            for a, b in ((first, second), (second, first)):
                if a in name:
                    name = name.replace(a, b)
                    break
            exchanged[name] = tensor
        return exchanged

    return mutate


MUTANTS = {
    "w1 and w2 swapped (hf)": ("swiglu", "hf", swap("gate_proj", "up_proj")),
    "w1 and w2 swapped (timm)": ("swiglu", "timm", swap("fc1_g", "fc1_x")),
    "q and k swapped": ("mlp", "hf", swap("q_proj.weight", "k_proj.weight")),
    "q and v biases swapped": ("mlp", "timm", swap("q_bias", "v_bias")),
    "layer scales swapped": ("mlp", "timm", swap("gamma_1", "gamma_2")),
    "norms swapped": ("mlp", "hf", swap("norm1", "norm2")),
    "registers scaled": (
        "mlp",
        "hf",
        lambda tensors: {n: t * 1.05 if "register" in n else t for n, t in tensors.items()},
    ),
    "depthwise kernels mirrored": (
        "convnext",
        "hf",
        lambda tensors: {
            n: t.flip(-1) if n.endswith("depthwise_conv.weight") else t for n, t in tensors.items()
        },
    ),
    "gamma left out": (
        "convnext",
        "timm",
        lambda tensors: {n: torch.ones_like(t) if "gamma" in n else t for n, t in tensors.items()},
    ),
}


def refuse(source, tmp_path, to, reason="computes other features"):
    files = set(tmp_path.rglob("*"))
    with pytest.raises(ValueError, match=reason):
        convert_checkpoint(source, tmp_path / "mutant", to=to)
    assert set(tmp_path.rglob("*")) == files


@pytest.mark.parametrize("mutant", MUTANTS)
def test_mutants_of_the_conversion_leave_nothing(mutant, tmp_path, monkeypatch):
    kind, to, mutate = MUTANTS[mutant]
    table = {"hf": targets._HF, "timm": targets._TIMM}[to]
    backbone = toy(kind)
    convert, *rest = table[type(backbone).__name__]
    mutated = (lambda state: mutate(convert(state)), *rest)
    monkeypatch.setitem(table, type(backbone).__name__, mutated)
    refuse(save_official(backbone, tmp_path / "w.pth"), tmp_path, to)


def test_a_bias_mask_that_is_not_folded_is_noticed(tmp_path, monkeypatch):
    convert, config = targets._HF["DINOv3ViT"]

    def unfolded(state):
        ones = {n: torch.ones_like(t) for n, t in state.items() if n.endswith("bias_mask")}
        return convert({**state, **ones})

    # The K biases of this one are masked and not 0.
    source = toy_backbone(1, patch_size=16, num_registers=4)
    path = save_official(source, tmp_path / "w.pth")
    assert convert_checkpoint(path, tmp_path / "sound", to="hf").differences["cls"] < 2e-6
    monkeypatch.setitem(targets._HF, "DINOv3ViT", (unfolded, config))
    refuse(path, tmp_path, "hf")


def test_a_wrong_configuration_is_noticed(tmp_path, monkeypatch):
    convert, config = targets._HF["DINOv3ViT"]
    path = save_official(toy("mlp"), tmp_path / "w.pth")
    for change in ({"rope_theta": 50.0}, {"hidden_act": "relu"}):

        def wrong(*arguments, change=change):
            return {**config(*arguments), **change}

        monkeypatch.setitem(targets._HF, "DINOv3ViT", (convert, wrong))
        refuse(path, tmp_path, "hf")


def test_a_library_that_is_missing_is_said(tmp_path, monkeypatch):
    reader = foreign_models.Reader("a_library_that_is_not_there", None)
    monkeypatch.setitem(foreign_models.READERS, "timm", reader)
    path = save_official(toy("mlp"), tmp_path / "w.pth")
    report = convert_checkpoint(path, tmp_path / "timm", to="timm")
    assert report.differences == {} and "not compared" in str(report)


@pytest.mark.parametrize("to", ["hf", "timm"])
@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
def test_rounded_weights_are_compared_with_rounded_weights(dtype, to, tmp_path):
    path = save_official(toy("mlp"), tmp_path / "w.pth")
    report = convert_checkpoint(path, tmp_path / "rounded", to=to, dtype=dtype)
    assert max(report.differences.values()) < 1e-5
    kinds = {tensor.dtype for tensor in stored(tmp_path / "rounded").values()}
    assert kinds == {{"bf16": torch.bfloat16, "fp16": torch.float16}[dtype]}
