"""Check that the EMA teacher lies as the student does: its update then needs no communication."""

from collections.abc import Iterator

from torch import Tensor, nn
from torch.distributed.tensor import DTensor

_SHOWN = 4


def check_alignment(model: nn.Module) -> int:
    """Compare student and EMA teacher of the algorithm, and of every student of several.

    ``teacher = m * teacher + (1 - m) * student`` pairs the parameters by position and works on each
    rank's own shards: names, order, shapes and the placement of the shards must be equal.

    Args:
        model: the algorithm, sharded or not.

    Returns:
        Number of pairs of parameters.

    Raises:
        ValueError: with the first parameters that differ.
    """
    algorithms = dict(getattr(model, "students", {})) or {"": model}
    return sum(_check(name, algorithm) for name, algorithm in algorithms.items())


def _check(name: str, algorithm: nn.Module) -> int:
    student = dict(algorithm.student.named_parameters())
    teacher = dict(algorithm.teacher.named_parameters())
    findings = list(_differences(student, teacher))
    if findings:
        who = f"student {name!r} and its EMA teacher" if name else "student and EMA teacher"
        more = f" and {len(findings) - _SHOWN} more" if len(findings) > _SHOWN else ""
        raise ValueError(
            f"{who} are not aligned, so the teacher cannot follow on each rank's own shards: "
            f"{'; '.join(findings[:_SHOWN])}{more}. Build the teacher as a copy of the student, "
            "change both alike (adapters, frozen or replaced layers), and shard both over the same "
            "ranks"
        )
    return len(student)


def _differences(student: dict[str, Tensor], teacher: dict[str, Tensor]) -> Iterator[str]:
    for name in sorted(student.keys() - teacher.keys()):
        yield f"{name} is missing in the teacher"
    for name in sorted(teacher.keys() - student.keys()):
        yield f"{name} is missing in the student"
    if student.keys() == teacher.keys() and list(student) != list(teacher):
        first = next(pair for pair in zip(student, teacher) if pair[0] != pair[1])
        yield f"the student has {first[0]} where the teacher has {first[1]}"
    for name in student:
        if name in teacher:
            yield from _difference(name, student[name], teacher[name])


def _difference(name: str, student: Tensor, teacher: Tensor) -> Iterator[str]:
    if student.shape != teacher.shape:
        kinds = (tuple(student.shape), tuple(teacher.shape))
    elif student.dtype != teacher.dtype:
        kinds = (student.dtype, teacher.dtype)
    elif _layout(student) != _layout(teacher):
        kinds = (_words(student), _words(teacher))
    else:
        return
    yield f"{name} is {kinds[0]} in the student, {kinds[1]} in the teacher"


def _layout(tensor: Tensor) -> tuple | None:
    return (tensor.device_mesh, tensor.placements) if isinstance(tensor, DTensor) else None


def _words(tensor: Tensor) -> str:
    if not isinstance(tensor, DTensor):
        return "whole"
    placements = ", ".join(map(str, tensor.placements))
    return f"{placements} over ranks {tensor.device_mesh.mesh.flatten().tolist()}"
