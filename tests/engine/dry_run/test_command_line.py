"""What users type wrong in ``tools/train.py --dry-run`` and ``tools/plan.py``: one clear line."""

import pytest

from dinov3_mm.engine import ConfigError
from tests.engine.dry_run.students import two_students
from tests.engine.dry_run.toys import toy_config
from tools.plan import main as plan
from tools.train import main as train


@pytest.fixture
def config(tmp_path):
    path = tmp_path / "toy_pretrain.py"
    toy_config().dump(path)
    return path


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--dry-run", "--world-size", "0"], "processes must be at least 1, got 0"),
        (["--dry-run", "--world-size", "3"], "global_batch_size=8 is not divisible"),
        (["--dry-run", "--num-images", "0"], "images must be at least 1"),
        (["--dry-run", "--gpu-memory", "0"], "more than 0 GiB"),
        (["--dry-run", "--launcher", "pytorch"], "--world-size N instead of a launcher"),
        (["--dry-run", "--cfg-options", "model.backbone.depth=3"], "has no 'depth'"),
        (["--dry-run", "--data", "no/such/folder"], "no/such/folder does not exist"),
        (["--world-size", "8"], "--world-size is for dry runs: add --dry-run"),
        (["--num-images", "100"], "--num-images is for dry runs"),
        (["--gpu-memory", "80"], "--gpu-memory is for dry runs"),
    ],
)
def test_train(config, options, message):
    with pytest.raises(ConfigError, match=message) as error:
        train([str(config), *options])
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--gpus", "0"], "processes must be at least 1, got 0"),
        (["--gpus", "3"], "global_batch_size=8 is not divisible"),
        (["--gpus", "8", "--gpu-memory", "0"], "more than 0 GiB"),
        (["--gpus", "8", "--gpus-per-node", "0"], "at least 1 GPU"),
        (["--gpus", "8", "--num-images", "-1"], "images must be at least 1"),
    ],
)
def test_plan(config, options, message):
    with pytest.raises(ConfigError, match=message) as error:
        plan([str(config), *options])
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "tool", [lambda path: train([path, "--dry-run"]), lambda path: plan([path, "--gpus", "1"])]
)
def test_a_config_that_is_not_there(config, tool):
    with pytest.raises(ConfigError, match=r"did you mean .*toy_pretrain\.py"):
        tool(str(config.with_name("toy_pretrian.py")))
    with pytest.raises(ConfigError, match="is a folder"):
        tool(str(config.parent))
    with pytest.raises(ConfigError, match="nor is there a folder"):
        tool("no/such/folder/config.py")


def test_plan_of_several_students_points_to_the_dry_run(tmp_path):
    two_students().dump(tmp_path / "students.py")
    with pytest.raises(ConfigError, match="--dry-run runs a step of several students"):
        plan([str(tmp_path / "students.py"), "--gpus", "1"])


def test_report_names_the_student_and_its_ranks(tmp_path, capsys):
    groups = dict(narrow=(0, 1), wide=(1, 4))
    two_students(ranks=groups, global_batch_size=12).dump(tmp_path / "students.py")
    train([str(tmp_path / "students.py"), "--dry-run", "--world-size", "4"])
    page = capsys.readouterr().out
    assert "student narrow on ranks 0 to 0" in page
    assert "student wide on ranks 1 to 3" in page
    assert "schedules of student wide" in page
