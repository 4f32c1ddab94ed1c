"""FeatureExtractor: values against transformers, batching, threads, statistics, wrong arguments."""

import pytest
import torch
from PIL import Image
from transformers import DINOv3ViTConfig, DINOv3ViTModel

from dinov3_mm.apis import FeatureExtractor
from dinov3_mm.checkpoints import export_backbone, to_hf
from dinov3_mm.datasets import BrokenImageError
from dinov3_mm.features.tokens import four_even_blocks
from dinov3_mm.models.backbones import DINOv3ConvNeXt
from tests.apis.toys import (
    STATISTICS,
    MeanPatches,
    toy_extractor,
    toy_pictures,
    write_pictures,
)
from tests.checkpoints.toys import redraw, toy_backbone
from tests.golden import assert_parity


def transformers_twin(backbone) -> DINOv3ViTModel:
    config = DINOv3ViTConfig(
        patch_size=8,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=64,
        num_register_tokens=2,
    )
    state = to_hf(backbone.state_dict())
    return DINOv3ViTModel.from_pretrained(None, config=config, state_dict=state).eval()


def normalised(images) -> torch.Tensor:
    mean, std = (torch.tensor(STATISTICS[key]).view(3, 1, 1) for key in ("mean", "std"))
    return (torch.from_numpy(images).permute(0, 3, 1, 2) / 255 - mean) / std


@pytest.mark.parametrize("norm", [True, False])
def test_tokens_equal_those_of_transformers(norm):
    backbone = toy_backbone()
    images = toy_pictures(3, 32, 48)
    with torch.no_grad():
        peer = transformers_twin(backbone)
        output = peer(normalised(images), output_hidden_states=True)
        after = [peer.norm(h) if norm else h for h in output.hidden_states[1:3]]
    extractor = toy_extractor(backbone, image_size=(32, 48), layers=[1, 0], norm=norm)
    features = extractor(images)
    assert features.grid == (4, 6) and list(features.layers) == [0, 1] and len(features) == 3
    for tokens, expected in (
        (features, after[1]),
        (features.layers[0], after[0]),
        (features.layers[1], after[1]),
    ):
        assert_parity(tokens.cls, expected[:, 0])
        assert_parity(tokens.registers, expected[:, 1:3])
        assert_parity(tokens.patches, expected[:, 3:])
        assert_parity(tokens.pooled, expected[:, 3:].mean(1))
    maps = features.feature_maps
    assert maps.shape == (3, 32, 4, 6)
    assert torch.equal(maps[1, :, 2, 3], features.patches[1, 2 * 6 + 3])
    if norm:
        without = toy_extractor(backbone, image_size=(32, 48))(images)
        assert_parity(without.patches, features.patches)
        assert without.layers == {}


def test_convnext_has_no_registers_and_stages_of_their_own_stride():
    arch = {"depths": (1, 1, 1, 1), "dims": (8, 16, 24, 32)}
    backbone = DINOv3ConvNeXt(arch)
    backbone.init_weights()
    redraw(backbone)
    images = toy_pictures(2, 64, 96)
    extractor = toy_extractor(backbone, image_size=(64, 96), layers="four_even")
    features = extractor(images)
    with torch.no_grad():
        expected = backbone.forward_tokens(normalised(images))
        stages = backbone.get_intermediate_layers(normalised(images), n=4, return_class_token=True)
    assert_parity(features.cls, expected.cls)
    assert_parity(features.patches, expected.patches)
    assert features.registers.shape == (2, 0, 32) and features.grid == (2, 3)
    assert [features.layers[i].grid for i in range(4)] == [(16, 24), (8, 12), (4, 6), (2, 3)]
    for tokens, (patches, cls) in zip(features.layers.values(), stages):
        assert_parity(tokens.patches, patches)
        assert_parity(tokens.cls, cls)


def test_forms_and_batches_give_the_same(tmp_path):
    pictures = toy_pictures(5)
    paths = write_pictures(tmp_path, 5)
    extractor = toy_extractor()
    expected = extractor(list(pictures))
    assert expected.cls.shape == (5, 32) and not expected.cls.requires_grad
    for images in (
        paths,
        [Image.fromarray(picture) for picture in pictures],
        torch.from_numpy(pictures).permute(0, 3, 1, 2),
        [str(paths[0]), pictures[1], *paths[2:]],
    ):
        assert torch.equal(extractor(images).patches, expected.patches)
    assert torch.equal(extractor(paths, num_workers=2).patches, expected.patches)
    native = toy_extractor(image_size="native")
    assert_parity(native(paths, num_workers=1).patches, native(paths).patches)
    single = extractor(paths[3])
    assert single.cls.shape == (1, 32)
    assert_parity(single.cls[0], expected.cls[3])
    for options in ({"batch_size": 2}, {"max_tokens_per_batch": 20}, {"max_tokens_per_batch": 1}):
        assert_parity(toy_extractor(**options)(paths).patches, expected.patches)


def test_native_sizes_are_grouped_and_come_back_in_order():
    sizes = [(40, 56), (32, 32), (41, 57), (70, 24), (32, 32)]
    images = [toy_pictures(1, h // 8 * 8, w // 8 * 8, seed=h)[0] for h, w in sizes]
    backbone = MeanPatches()
    features = toy_extractor(backbone, image_size="native", batch_size=2)(images)
    assert features.grids == tuple((h // 8, w // 8) for h, w in sizes)
    assert [len(patches) for patches in features.patches] == [35, 16, 35, 24, 16]
    assert max(shape[0] for shape in backbone.passes) == 2
    for image, cls, patches in zip(images, features.cls, features.patches):
        mean = normalised(image[None]).mean((2, 3))[0]
        torch.testing.assert_close(cls, mean, atol=1e-5, rtol=0)
        torch.testing.assert_close(patches.mean(0), mean, atol=1e-5, rtol=0)
    assert features.pooled.shape == (5, 3)
    assert features.feature_maps[3].shape == (3, 8, 3)
    with pytest.raises(ValueError, match="different grids"):
        _ = features.grid


@pytest.mark.parametrize("batch_size, tokens, largest", [(3, 1000, 3), (8, 50, 3), (8, 1, 1)])
def test_passes_are_bounded_by_images_and_tokens(batch_size, tokens, largest):
    backbone = MeanPatches()
    extractor = toy_extractor(backbone, batch_size=batch_size, max_tokens_per_batch=tokens)
    assert extractor(toy_pictures(8)).cls.shape == (8, 3)
    passes = [shape[0] for shape in backbone.passes if shape[2:] == (32, 32)]
    assert max(passes) == largest and sum(passes) == 8


@pytest.mark.parametrize("dtype, tolerance", [("fp32", 1e-5), ("bf16", 1e-5)])
def test_threads_change_nothing(dtype, tolerance):
    images = toy_pictures(13)
    backbone = toy_backbone()
    alone = toy_extractor(backbone, dtype=dtype)(images)
    torch.set_num_threads(3)
    try:
        features = toy_extractor(backbone, dtype=dtype)(images)
        assert torch.get_num_threads() == 3
        with pytest.raises(RuntimeError, match="this pass fails"):
            toy_extractor(MeanPatches(fail_at=3))(images)
        assert torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(1)
    assert_parity(features.patches, alone.patches, tolerance)
    assert_parity(features.cls, alone.cls, tolerance)


def test_large_images_run_alone_on_all_threads():
    threads = []

    class Spy(MeanPatches):
        def forward_tokens(self, images):
            threads.append((images.shape[0], images.shape[2], torch.get_num_threads()))
            return super().forward_tokens(images)

    torch.set_num_threads(2)
    try:
        extractor = toy_extractor(Spy(), image_size="native", max_tokens_per_batch=40)
        images = [*toy_pictures(4, 32, 32), *toy_pictures(2, 64, 64)]
        assert extractor(images).cls.shape == (6, 3)
    finally:
        torch.set_num_threads(1)
    assert [entry for entry in threads if entry[1] == 64] == [(1, 64, 2), (1, 64, 2)]
    assert all(entry[2] == 1 for entry in threads if entry[1] == 32)


def test_bf16_is_autocast_and_the_module_stays_as_it_was(tmp_path):
    backbone = toy_backbone()
    images = toy_pictures(3)
    exact = toy_extractor(backbone)(images)
    half = toy_extractor(backbone, dtype="bf16")(images)
    assert half.cls.dtype == torch.float32
    assert 0 < (half.cls - exact.cls).abs().max() < 0.2
    assert all(parameter.dtype == torch.float32 for parameter in backbone.parameters())
    export_backbone(backbone, tmp_path / "w.safetensors", {"statistics": STATISTICS})
    stored = FeatureExtractor(tmp_path / "w.safetensors", image_size=32, dtype="bf16")
    assert torch.equal(stored(images).cls, half.cls)
    with pytest.raises(ValueError, match=r"parameters are torch.bfloat16, dtype is 'fp32'"):
        toy_extractor(toy_backbone().bfloat16(), dtype="fp32")
    assert toy_extractor(toy_backbone().bfloat16()).dtype == "bf16"


def test_bf16_is_near_fp32_in_direction_and_norms_stay_fp32(tmp_path):
    path = export_backbone(toy_backbone(), tmp_path / "w.safetensors", {"statistics": STATISTICS})
    exact, half = (FeatureExtractor(path, image_size=32, dtype=d) for d in ("fp32", "bf16"))
    images = toy_pictures(6)
    for name in ("cls", "patches", "registers"):
        pair = getattr(exact(images), name), getattr(half(images), name)
        cosine = torch.nn.functional.cosine_similarity(*pair, dim=-1)
        # Rounding to 8 bits in each of two blocks of redrawn weights; a wrong one is far below.
        assert cosine.min() > 0.999, (name, cosine.min())
    dtypes = {name: p.dtype for name, p in half.backbone.named_parameters()}
    assert dtypes["blocks.0.attn.qkv.weight"] == torch.bfloat16
    assert {d for name, d in dtypes.items() if "norm" in name} == {torch.float32}
    assert half.backbone.rope_embed.periods.dtype == torch.float32
    # The same weights: rounding them for the products is no other model.
    assert half.describe() == exact.describe()
    assert (half.options["dtype"], exact.options["dtype"]) == ("bf16", "fp32")


def test_auto_follows_the_device_and_fp16_is_refused():
    extractor = toy_extractor()
    assert extractor.dtype == extractor.options["dtype"] == "fp32"
    assert extractor.choice == "fp32 (auto: cpu)"
    with pytest.raises(ValueError, match=r"'fp16', which is refused: activations .* take 'bf16'"):
        toy_extractor(dtype="fp16")
    with pytest.raises(ValueError, match="did you mean 'bf16'"):
        toy_extractor(dtype="b16")


def test_modes_gradients_and_memory_are_left_alone():
    backbone = toy_backbone().train()
    backbone.blocks[0].eval()
    features = toy_extractor(backbone)(toy_pictures(2))
    assert backbone.training and not backbone.blocks[0].training
    assert all(parameter.grad is None for parameter in backbone.parameters())
    # A head can be trained on the result, and the parts share no memory.
    torch.nn.Linear(32, 2)(features.cls).sum().backward()
    assert features.cls.untyped_storage().nbytes() == features.cls.numel() * 4


def test_statistics_are_those_of_the_weights(tmp_path, monkeypatch):
    backbone = toy_backbone(patch_size=16)
    export_backbone(backbone, tmp_path / "ours.safetensors", {"statistics": STATISTICS})
    ours = FeatureExtractor(tmp_path / "ours.safetensors")
    assert ours.statistics[:2] == tuple(STATISTICS.values())
    torch.save(backbone.state_dict(), tmp_path / "x_sat493m.pth")
    assert FeatureExtractor(tmp_path / "x_sat493m.pth").statistics.name == "SAT-493M"
    torch.save(backbone.state_dict(), tmp_path / "x.pth")
    with pytest.raises(ValueError, match="nothing states the input normalisation"):
        FeatureExtractor(tmp_path / "x.pth")
    given = FeatureExtractor(tmp_path / "x.pth", mean=(0.430, 0.411, 0.296), std=(0.1, 0.2, 0.3))
    assert given.statistics == ((0.430, 0.411, 0.296), (0.1, 0.2, 0.3), "custom")
    with pytest.raises(ValueError, match="nothing states the input normalisation"):
        FeatureExtractor(backbone)


def test_names(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    name = "dinov3_vitt16"
    first, second = (FeatureExtractor(name, random_init=True, image_size=16) for _ in range(2))
    assert first.describe() == second.describe() and "random weights" in first.origin
    with pytest.raises(FileNotFoundError, match=r"08c60483\.pth.*random_init=True"):
        FeatureExtractor("dinov3_vits16")
    with pytest.raises(ValueError, match=r"did you mean 'dinov3_vits16'"):
        FeatureExtractor("dinov3_vits61")
    with pytest.raises(FileNotFoundError, match=r"nowhere\.pth"):
        FeatureExtractor(tmp_path / "nowhere.pth")
    with pytest.raises(FileNotFoundError, match=r"nowhere\.pth"):
        FeatureExtractor("dinov3_vits16", weights=tmp_path / "nowhere.pth")
    with pytest.raises(ValueError, match="belong to the name of an architecture"):
        FeatureExtractor(toy_backbone(), weights="x.pth")
    torch.save(first.backbone.state_dict(), tmp_path / "w.pth")
    loaded = FeatureExtractor(name, weights=tmp_path / "w.pth")
    assert loaded.describe()["fingerprint"] == first.describe()["fingerprint"]
    with torch.no_grad():
        loaded.backbone.blocks[3].mlp.fc1.weight[0, 0] += 1e-3
    assert loaded.describe()["fingerprint"] != first.describe()["fingerprint"]


@pytest.mark.parametrize(
    "options, message",
    [
        ({"image_size": 30}, "image_size 30 is not a multiple of the patch size 8; use 24 or 32"),
        ({"layers": [2]}, r"layers is \[2\]; expected .* from 0 to 1"),
        ({"layers": [-1]}, "from 0 to 1"),
        ({"layers": [1, 1]}, "distinct block indices"),
        ({"layers": 3}, "expected a number of blocks"),
        ({"layers": "four_even"}, "at least 4, the backbone has 2"),
        ({"layers": "last"}, "expected a number, block indices or 'four_even'"),
        ({"dtype": "fp16"}, "'fp16', which is refused"),
        ({"mean": (0.5,), "std": (0.5,)}, "takes 3 channels, mean and std have 1"),
        ({"std": None}, "pass both"),
        ({"std": (1, 1, 0)}, "std above 0"),
        ({"batch_size": 0}, "batch_size is 0"),
        ({"tile": 20}, "tile 20 is not a multiple of the patch size 8"),
        ({"tile": 32, "overlap": 32}, "less than tile 32"),
    ],
)
def test_wrong_arguments(options, message):
    with pytest.raises(ValueError, match=message):
        toy_extractor(**options)


def test_wrong_images(tmp_path):
    (tmp_path / "bad.jpg").write_bytes(b"no image")
    extractor = toy_extractor()
    with pytest.raises(BrokenImageError, match=r"bad\.jpg"):
        extractor([tmp_path / "bad.jpg"])
    with pytest.raises(BrokenImageError, match=r"bad\.jpg"):
        extractor([tmp_path / "bad.jpg"], num_workers=1)
    with pytest.raises(FileNotFoundError, match="no image at"):
        extractor([tmp_path / "absent.jpg"], num_workers=1)
    with pytest.raises(ValueError, match="the list is empty"):
        extractor([])
    with pytest.raises(FileNotFoundError, match="no image at"):
        extractor(tmp_path / "absent.jpg")


def test_four_even_blocks_are_those_of_the_evaluations():
    expected = {
        12: (2, 5, 8, 11),
        24: (4, 11, 17, 23),
        32: (7, 15, 23, 31),
        40: (9, 19, 29, 39),
        4: (0, 1, 2, 3),
    }
    assert {depth: four_even_blocks(depth) for depth in expected} == expected
