"""Which room imports which: one direction, without circles (docs/contributing.md)."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parent.parent / "dinov3_mm"

# A room imports from itself and from those before it; a module is in the room of longest name.
ORDER = (
    "errors",
    "command_line",
    "hosts",
    "models.layers",
    "models.losses",
    "models.backbones",
    "checkpoints",
    "models",
    "datasets",
    "features",
    "evaluation",
    "visualization",
    "engine",
    "apis",
    "commands",
    "__main__",
)
# Rooms that are read and tested with torch alone.
PURE = ("models.layers", "models.losses")


def name_of(path: Path) -> str:
    """Module below the package, '' for the package itself."""
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(part for part in parts if part != "__init__")


MODULES = {
    name_of(path): path
    for path in sorted(PACKAGE.rglob("*.py"))
    if ".mim" not in path.relative_to(PACKAGE).parts
}


def room_of(module: str) -> str | None:
    rooms = [room for room in ORDER if f"{module}.".startswith(f"{room}.")]
    return max(rooms, key=len, default=None)


def imported_by(module: str) -> Iterator[tuple[str, int]]:
    """Absolute names that a module imports anywhere, also inside functions, with their lines."""
    path = MODULES[module]
    package = ["dinov3_mm", *module.split(".")] if module else ["dinov3_mm"]
    if path.name != "__init__.py":
        package.pop()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from ((alias.name, node.lineno) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = package[: len(package) - node.level + 1] if node.level else []
            base = ".".join([*above, *([node.module] if node.module else [])])
            for alias in node.names:
                of_package = f"{base}.{alias.name}".removeprefix("dinov3_mm.")
                yield (f"dinov3_mm.{of_package}" if of_package in MODULES else base), node.lineno


def ours(module: str) -> Iterator[tuple[str, int]]:
    for name, line in imported_by(module):
        if name.startswith("dinov3_mm."):
            yield name.removeprefix("dinov3_mm."), line


def test_every_module_has_a_room():
    assert [name for name in MODULES if name and room_of(name) is None] == []


def test_rooms_import_from_rooms_before_them():
    upwards = [
        f"{module}:{line} imports {name}"
        # ``models`` names backbones and adapters, so that they are registered.
        for module in MODULES
        if module not in ("", "models")
        for name, line in ours(module)
        if ORDER.index(room_of(name)) > ORDER.index(room_of(module))
    ]
    assert upwards == []


def test_modules_import_each_other_in_one_direction():
    edges = {
        module: {name for name, _ in ours(module) if MODULES[name].name != "__init__.py"}
        for module in MODULES
    }
    done: set[str] = set()

    def follow(module: str, path: tuple[str, ...]) -> None:
        if module in path:
            pytest.fail("circle of imports: " + " -> ".join((*path[path.index(module) :], module)))
        if module not in done:
            for name in edges[module]:
                follow(name, (*path, module))
            done.add(module)

    for module in MODULES:
        follow(module, ())


@pytest.mark.parametrize("room", PURE)
def test_pure_rooms_know_torch_alone(room):
    foreign = [
        f"{module}:{line} imports {name}"
        for module in MODULES
        if room_of(module) == room
        for name, line in imported_by(module)
        if name.split(".")[0] in {"mmengine", "mmcv", "mmpretrain", "mmseg", "mmdet"}
    ]
    assert foreign == []
