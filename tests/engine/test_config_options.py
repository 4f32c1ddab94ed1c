"""``--cfg-options``: values as written, paths that exist."""

import pytest
from mmengine.config import Config

import dinov3_mm.engine  # noqa: F401
from dinov3_mm.engine.config import ConfigError, apply_options, parse_options


def config() -> Config:
    return Config(
        dict(
            runner_type="FlexibleRunner",
            train_cfg=dict(type="PretrainLoop", max_iters=10),
            train_dataloader=dict(masking=dict(patch_size=16, mask_ratio=[0.1, 0.5])),
            custom_hooks=[dict(type="TeacherEMAHook", momentum=0.99)],
            max_iters=10,
        )
    )


@pytest.mark.parametrize(
    "text, value",
    [
        ("3", 3),
        ("1e-4", 1e-4),
        ("none", "none"),
        ("None", None),
        ("true", True),
        ("False", False),
        ("[1, 2]", [1, 2]),
        ("(0.9, 0.95)", (0.9, 0.95)),
        ("dict", "dict"),
        ("{'a': 1}", {"a": 1}),
        ("a,b", ["a", "b"]),
        ("[a,b]", ["a", "b"]),
        ("/data/my images/with=sign", "/data/my images/with=sign"),
    ],
)
def test_value(text, value):
    parsed = parse_options([f"a.b={text}"])
    assert parsed == {"a.b": value}
    assert type(parsed["a.b"]) is type(value)


@pytest.mark.parametrize("word", ["a.b", "=3"])
def test_word_without_key_or_value(word):
    with pytest.raises(ConfigError, match="KEY=VALUE"):
        parse_options([word])


def test_merge_reaches_dicts_lists_and_new_arguments():
    cfg = config()
    apply_options(
        cfg,
        {
            "train_cfg.max_iters": 3,
            "custom_hooks.0.momentum": 0.5,
            "custom_hooks.0.teacher_temp": 0.07,  # not in the config, but the hook takes it
            "train_dataloader.masking.mask_ratio.1": 0.3,
            "train_dataloader.num_workers": 2,  # not in the config, but the loader takes it
            "load_from": "x.pth",  # a Runner key
        },
    )
    assert cfg.train_cfg.max_iters == 3
    assert cfg.custom_hooks[0] == dict(type="TeacherEMAHook", momentum=0.5, teacher_temp=0.07)
    assert cfg.train_dataloader.masking.mask_ratio == [0.1, 0.3]
    assert cfg.train_dataloader.num_workers == 2
    assert cfg.load_from == "x.pth"


@pytest.mark.parametrize(
    "path, message",
    [
        ("train_cfg.max_iter", "train_cfg has no 'max_iter'; did you mean 'max_iters'"),
        ("train_cgf.max_iters", "the config has no 'train_cgf'; did you mean 'train_cfg'"),
        ("custom_hooks.1.momentum", "custom_hooks has no '1'"),
        ("custom_hooks.0.momentun", "custom_hooks.0 has no 'momentun'; did you mean 'momentum'"),
        ("train_dataloader.masking.patchsize", "did you mean 'patch_size'"),
        ("train_dataloader.masking.mask_ratio.1.a", "mask_ratio.1 has no 'a'"),
        ("max_iters", "'max_iters' is a helper variable, which nobody reads"),
        ("load_form", "the config has no 'load_form'; did you mean 'load_from'"),
    ],
)
def test_path_that_leads_nowhere(path, message):
    cfg = config()
    before = cfg.to_dict()
    with pytest.raises(ConfigError) as caught:
        apply_options(cfg, {path: 1})
    assert message in str(caught.value)
    assert cfg.to_dict() == before
