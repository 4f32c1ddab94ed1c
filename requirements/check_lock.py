"""Check lock.txt for each supported Python: python requirements/check_lock.py [3.11 3.12 3.13]

pip looks up every pin for that Python on this platform and installs nothing. A pin needs a wheel
there, or is one of the sources below. The closure must be complete: what the package and every
pinned distribution require, with markers evaluated for that Python, is a fitting pin of the same
lane (see tools/setup_env.sh), or is left out on purpose.
"""

import json
import subprocess
import sys
import tempfile
import tomllib
from pathlib import Path

from packaging.markers import default_environment
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

FOLDER = Path(__file__).resolve().parent
PYTHONS = ("3.11", "3.12", "3.13")
LANES = {"core": ["core"], "test": ["core", "test"], "ops": ["core", "test", "ops"]}
# Released as source, without compiled parts; mmcv's operators are compiled by tools/setup_env.sh.
SOURCES = {
    *("mat4py", "model-index", "modelindex", "terminaltables"),
    *("onedl-mmcv", "onedl-mmdetection", "onedl-mmpretrain", "onedl-mmsegmentation"),
}
# Why: the head of lock.txt and of ops.txt.
LEFT_OUT = {"opencv-python", "imagecorruptions-imaug"}


def look_up(python: str) -> dict[str, dict]:
    """What pip would install for ``python``, by name."""
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.json"
        subprocess.run(
            [sys.executable, "-m", "pip", "install", "--dry-run", "--ignore-installed", "--quiet"]
            + ["--no-deps", "--python-version", python, "--target", folder]
            + ["--report", str(report), "--requirement", str(FOLDER / "lock.txt")],
            check=True,
        )
        items = json.loads(report.read_text())["install"]
    return {canonicalize_name(item["metadata"]["name"]): item for item in items}


def read_lane(lane: str, environment: dict[str, str]) -> set[str]:
    """Names that a lane installs."""
    lines = "".join((FOLDER / f"{name}.txt").read_text() for name in LANES[lane]).splitlines()
    wanted = [Requirement(line) for line in lines if not line.startswith("#")]
    return {
        canonicalize_name(each.name)
        for each in wanted
        if each.marker is None or each.marker.evaluate(environment)
    }


def faults(python: str) -> list[str]:
    """What is wrong with the lock on ``python``."""
    pins = look_up(python)
    found = [
        f"{name} has no wheel"
        for name, item in pins.items()
        if not item["download_info"]["url"].endswith(".whl") and name not in SOURCES
    ]
    environment = {**default_environment(), "python_version": python}
    environment["python_full_version"] = f"{python}.0"
    project = tomllib.loads((FOLDER.parent / "pyproject.toml").read_text())["project"]
    for lane in LANES:
        names = read_lane(lane, environment) | ({"onedl-mmcv"} if lane == "ops" else set())
        found += [f"{lane}.txt: {name} has no pin" for name in sorted(names - pins.keys())]
        needs = [("dinov3_mm", text, frozenset()) for text in project["dependencies"]]
        for name in names & pins.keys():
            needs += [(name, text, frozenset()) for text in requirements_of(pins[name])]
        while needs:
            owner, text, extras = needs.pop()
            need = Requirement(text)
            asked = [{**environment, "extra": extra} for extra in extras or {""}]
            if need.marker and not any(map(need.marker.evaluate, asked)):
                continue
            name = canonicalize_name(need.name)
            if name in names & pins.keys():
                version = pins[name]["metadata"]["version"]
                if not need.specifier.contains(version, prereleases=True):
                    found.append(f"{lane}: {owner} wants {text}, the lock has {version}")
                extras = frozenset(need.extras)
                needs += [(name, each, extras) for each in requirements_of(pins[name]) if extras]
            elif name not in LEFT_OUT:
                found.append(f"{lane}: {owner} wants {text}, which is not in the lane")
    return sorted(set(found))


def requirements_of(item: dict) -> list[str]:
    """What a distribution asks for."""
    return item["metadata"].get("requires_dist", [])


def main() -> None:
    """Print the faults of each Python and end with 1 if there is one."""
    wrong = False
    for python in sys.argv[1:] or PYTHONS:
        found = faults(python)
        wrong |= bool(found)
        print(f"Python {python}: {len(found)} faults", *found, sep="\n  ", flush=True)
    sys.exit(wrong)


if __name__ == "__main__":
    main()
