"""Label and depth maps of users before the first iteration: what is refused, warned of, or fine.

The table is that of ``tests.acceptance.label_cases``, which trains on each.
"""

import logging
from types import SimpleNamespace

import pytest
import torch
from mmengine.config import Config
from mmengine.dataset import Compose, ConcatDataset, RepeatDataset
from mmengine.registry import DATASETS, METRICS, DefaultScope

from dinov3_mm.datasets import LoadLabelMap
from dinov3_mm.datasets.label_audit import step_of
from tests.acceptance.label_cases import (
    CASES,
    CONFIGS,
    config_of,
    is_right,
    logged,
    outcome,
    write_folder,
)
from tests.hosts.lane import require_hosts

require_hosts()
import dinov3_mm.datasets.depth  # noqa: E402
import dinov3_mm.datasets.segmentation  # noqa: E402
import dinov3_mm.evaluation.depth_metric  # noqa: E402, F401
from dinov3_mm.engine.config.host import set_data_root  # noqa: E402
from dinov3_mm.engine.hooks import DepthCheckHook, LabelCheckHook  # noqa: E402
from dinov3_mm.engine.hooks.data_checks import on_first_rank  # noqa: E402

HOOKS = {"segmentation": LabelCheckHook, "depth": DepthCheckHook}


def head_of(cfg):
    """What the hooks ask of a head."""
    head = dict(cfg.model.decode_head)
    if "num_bins" in head:
        facts = {name: head[name] for name in ("min_depth", "max_depth")}
        return SimpleNamespace(bins=1, zero_is_valid=False, losses=[object()], **facts)
    return SimpleNamespace(num_classes=head["num_classes"], ignore_index=255)


def runner_of(cfg, root):
    """A runner with the data sets of a config, and nothing else."""
    set_data_root(cfg, str(root))
    with DefaultScope.overwrite_default_scope("mmseg"):
        sets = {key: DATASETS.build(cfg[f"{key}_dataloader"].dataset) for key in ("train", "val")}
        metric = METRICS.build(cfg.val_evaluator)
    loops = {
        name: SimpleNamespace(
            dataloader=SimpleNamespace(dataset=sets["val"]),
            evaluator=SimpleNamespace(metrics=[metric]),
        )
        for name in ("val_loop", "test_loop")
    }
    return SimpleNamespace(
        model=SimpleNamespace(decode_head=head_of(cfg)),
        train_dataloader=SimpleNamespace(dataset=sets["train"]),
        logger=logging.getLogger("map_checks"),
        **loops,
    )


def check(job, case, folder, *, method="before_train", **options):
    """What a hook makes of a case."""
    root, cfg = write_folder(job, case, folder / "data"), config_of(job, case)
    message = ""
    logging.getLogger("map_checks").setLevel(logging.INFO)
    with logged() as lines:
        try:
            for option in case.options:
                cfg.merge_from_dict(dict([_parsed(option)]))
            getattr(HOOKS[job](**options), method)(runner_of(cfg, root))
        except (ValueError, OSError) as error:
            message = str(error)
    what, line = outcome(case, message, lines)
    return what, line.replace(f"{root}/", "")


def _parsed(option):
    name, value = option.split("=")
    return name, float(value)


EVERY = [pytest.param(job, case, id=f"{job}: {case.name}") for job in CASES for case in CASES[job]]


@pytest.mark.parametrize(("job", "case"), EVERY)
def test_before_the_first_iteration(job, case, tmp_path):
    what, line = check(job, case, tmp_path)
    assert is_right(case, what, line), f"{what}: {line}"


@pytest.mark.parametrize("job", CASES)
def test_test_data_are_looked_at(job, tmp_path):
    bad = {"segmentation": "0 and 255 in validation", "depth": "all zero in validation"}[job]
    case = next(case for case in CASES[job] if case.name == bad)
    what, line = check(job, case, tmp_path, method="before_test")
    assert what == "refused" and line.startswith("test: all 2 maps hold"), line


def test_a_sample_is_stated_and_enough_for_what_all_maps_have(tmp_path):
    case = next(case for case in CASES["segmentation"] if case.name == "0 and 255")
    what, line = check("segmentation", case, tmp_path, max_maps=2)
    assert what == "refused" and line.startswith("training: 2 of 4 maps, drawn at random, hold")


def test_a_sample_of_one_class_is_no_proof(tmp_path):
    case = next(case for case in CASES["segmentation"] if case.name == "one class alone")
    what, line = check("segmentation", case, tmp_path, max_maps=2)
    assert what == "warned" and "the only class is 0" in line


def test_time_ends_a_look(tmp_path):
    case = CASES["segmentation"][0]
    _, line = check("segmentation", case, tmp_path, max_seconds=1e-9)
    assert "labels of training: 1 of 4 maps, drawn at random, looked at" in line


def test_other_options():
    with pytest.raises(ValueError, match="max_maps is 0; expected more than 0"):
        LabelCheckHook(max_maps=0)


def test_maps_missing_from_a_data_set_of_mmseg(tmp_path):
    """mmseg's own data sets list every image."""
    root = write_folder("segmentation", CASES["segmentation"][0], tmp_path / "data")
    (root / "labels/val/1.png").unlink()
    cfg = config_of("segmentation", CASES["segmentation"][0])
    for split in ("train", "val"):
        cfg[f"{split}_dataloader"].dataset = dict(
            type="BaseSegDataset",
            metainfo=dict(classes=("ground", "object")),
            data_root=str(root),
            data_prefix=dict(img_path=f"images/{split}", seg_map_path=f"labels/{split}"),
            pipeline=cfg[f"{split}_dataloader"].dataset.pipeline,
        )
    with pytest.raises(ValueError, match=r"validation: 1 of 2 maps cannot be read, first .*1\.png"):
        LabelCheckHook().before_train(runner_of(cfg, root))


def test_loading_steps_of_augmented_tests_are_found():
    cfg = Config.fromfile(CONFIGS / "segmentation/mask2former_vitb16_coco-stuff.py")
    with DefaultScope.overwrite_default_scope("mmseg"):
        dataset = SimpleNamespace(pipeline=Compose(cfg.tta_pipeline))
    # Not one with the defaults, whose None follows the data set.
    assert step_of(dataset, LoadLabelMap).reduce_zero_label is False
    assert step_of(SimpleNamespace(pipeline=None), LoadLabelMap).reduce_zero_label is None


def test_data_sets_in_wrappers(tmp_path):
    case = next(case for case in CASES["segmentation"] if case.name == "0 and 255")
    root = write_folder("segmentation", case, tmp_path / "data")
    runner = runner_of(config_of("segmentation", case), root)
    data = runner.train_dataloader.dataset
    for wrapper, count in ((ConcatDataset([data, data]), 8), (RepeatDataset(data, times=3), 4)):
        runner.train_dataloader.dataset = wrapper
        with pytest.raises(ValueError, match=f"training: all {count} maps hold the values 0"):
            LabelCheckHook().before_train(runner)


def test_a_height_of_zero_is_not_what_was_not_measured(tmp_path):
    """65535 as 0 would be bare ground."""
    case = next(case for case in CASES["depth"] if case.name == "65535 for nothing")
    root, cfg = write_folder("depth", case, tmp_path / "data"), config_of("depth", case)
    runner = runner_of(cfg, root)
    runner.model.decode_head.zero_is_valid = True
    with pytest.raises(ValueError, match="count as a depth of 0: set nodata_depth=-1"):
        DepthCheckHook().before_train(runner)


def test_units_of_relative_depth_do_not_matter(tmp_path):
    case = next(case for case in CASES["depth"] if case.name == "millimetres read as metres")
    root, cfg = write_folder("depth", case, tmp_path / "data"), config_of("depth", case)
    cfg.val_dataloader.dataset.depth_scale = 1000.0
    runner = runner_of(cfg, root)
    runner.model.decode_head.losses = [SimpleNamespace(space="disparity")]
    DepthCheckHook().before_train(runner)


def test_labels_beyond_the_classes_are_named_in_validation_batches():
    sample = SimpleNamespace(
        gt_sem_seg=SimpleNamespace(data=torch.tensor([2])), get=lambda key, default: "street.png"
    )
    runner = SimpleNamespace(model=SimpleNamespace(decode_head=SimpleNamespace(num_classes=2)))
    batch = {"data_samples": [[SimpleNamespace(), sample]]}
    for method in ("before_val_iter", "before_test_iter"):
        with pytest.raises(ValueError, match=r"street\.png holds \[2\]"):
            getattr(LabelCheckHook(), method)(runner, 0, batch)


def test_errors_of_the_check_itself_are_raised():
    def broken():
        raise KeyError("seg_map_path")

    with pytest.raises(KeyError):
        on_first_rank(broken)
