"""The pages for developers say what the code says: figures of calls, names, files."""

import ast
import re
from functools import cache

import pytest

from tests.hosts.lane import require_hosts
from tests.test_architecture import ORDER
from tools.dev.journeys import JOURNEYS, PACKAGE, PAGE, ROOT, Journey, faults, missing, written

PAGES = ("architecture", "contributing")
# What pages name beside our own code.
LIBRARIES = {
    "DATASETS",
    "METRICS",
    "MODELS",
    "FlexibleRunner",
    "Runner",
    "timm",
    "torch",
    "transformers",
    "mmpretrain",
    "mmseg",
    "mmdet",
    "mmengine",
    "mmcv",
}
FILE = re.compile(r"[\w.*/-]*[\w*]/?")


@cache
def own_names() -> frozenset[str]:
    """What the package and its tools define, or take as an argument, and their modules."""
    names = set(LIBRARIES)
    for folder in (PACKAGE, ROOT / "tools"):
        for path in folder.rglob("*.py"):
            names |= {path.stem, path.parent.name}
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
                    names.add(node.name)
                elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
                    names.add(node.id)
                elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
                    names.add(node.attr)
                elif isinstance(node, ast.arg):
                    names.add(node.arg)
    return frozenset(names)


def exists(code: str) -> bool:
    """Whether code in a page names something that is there; True for what is no name."""
    if FILE.fullmatch(code) and ("/" in code or code.endswith((".py", ".md", ".sh", ".toml"))):
        places = (ROOT, PACKAGE, ROOT / "docs")
        return any(any(place.glob(code.removesuffix("/"))) for place in places)
    name = re.sub(r"\(.*\)$", "", code)
    if not re.fullmatch(r"[A-Za-z_]\w*(\.\w+)*", name):
        return True
    parts = name.split(".")
    return parts[0] in LIBRARIES or own_names().issuperset(parts)


def test_figures_are_those_of_the_code():
    page = PAGE.read_text(encoding="utf-8")
    assert written(page) == page, "run python tools/dev/journeys.py"


@pytest.mark.parametrize("name", JOURNEYS)
def test_calls_stand_in_the_source_of_their_callers(name):
    assert faults(JOURNEYS[name]) == []


def test_a_call_that_is_gone_is_a_fault():
    gone = "models.losses.koleo.koleo_loss\n  -> models.losses.gram.gram_loss"
    (fault,) = faults(Journey("build", gone))
    assert "gram_loss" in fault
    with pytest.raises(LookupError, match="bridge"):
        faults(
            Journey("build", "engine.loop.PretrainLoop.run\n  -> engine.loop.PretrainLoop.bridge")
        )


def test_building_from_a_file_takes_the_journey():
    assert missing(JOURNEYS["backbone"]) == []
    elsewhere = "checkpoints.build.build_backbone\n  -> checkpoints.build._from_name"
    assert len(missing(Journey("build", elsewhere))) == 1


@pytest.mark.slow
@pytest.mark.parametrize("name", ["loss", "frozen"])
def test_training_takes_the_journey(name):
    if name == "frozen":
        require_hosts()
    assert missing(JOURNEYS[name]) == []


def test_the_table_of_rooms_has_the_order_that_is_held():
    rows = re.findall(r"^\| (`\w[^|]*`) \|", PAGE.read_text(encoding="utf-8"), re.M)
    rooms = [room.replace("/", ".") for row in rows for room in re.findall(r"`(.*?)`", row)]
    assert tuple(rooms[: len(ORDER)]) == ORDER


@pytest.mark.parametrize("page", PAGES)
def test_what_pages_for_developers_name_is_there(page):
    text = (ROOT / "docs" / f"{page}.md").read_text(encoding="utf-8")
    prose = re.sub(r"<!-- journey.*?<!-- end|```.*?```", "", text, flags=re.S)
    codes = set(re.findall(r"`([^`\n]+)`", prose))
    assert len(codes) > 50
    assert sorted(code for code in codes if not exists(code)) == []


def test_a_name_that_is_gone_is_found():
    assert exists("engine/loop.py") and exists("PretrainLoop.run") and exists("knn_classify(...)")
    assert not exists("engine/loops.py")
    assert not exists("PretrainLoop.sprint")
