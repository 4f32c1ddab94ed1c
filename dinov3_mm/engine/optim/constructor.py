"""Builds the optimizer of a pretraining model from its config."""

import inspect
from numbers import Real

from mmengine.logging import print_log
from mmengine.model import is_model_wrapper
from mmengine.registry import OPTIM_WRAPPER_CONSTRUCTORS, OPTIM_WRAPPERS, OPTIMIZERS
from torch import nn

from dinov3_mm.suggest import hint

from .param_groups import BACKBONE, build_param_groups
from .students import StudentOptimWrappers

PARAMWISE_KEYS = (
    "layerwise_decay",
    "patch_embed_lr_mult",
    "head_lr_mult",
    "dino_head_wd_multiplier",
)


@OPTIM_WRAPPER_CONSTRUCTORS.register_module()
class PretrainOptimConstructor:
    """Optimizer over the student's sub-modules with DINOv3's parameter groups.

    Every group carries ``submodule`` (the unit of gradient clipping), ``lr_multiplier``,
    ``wd_multiplier`` and ``is_last_layer``, which ``OptimScheduleHook`` reads, and ``param_names``.
    Groups of equal multipliers are one group, and the optimizer runs its fused kernel unless the
    config says otherwise.

    Args:
        optim_wrapper_cfg: ``dict(type='PretrainOptimWrapper', optimizer=dict(type='AdamW', ...))``.
        paramwise_cfg: ``layerwise_decay`` (1.0), ``patch_embed_lr_mult`` (1.0), ``head_lr_mult``
            (1.0; learning rate of everything but the backbone) and ``dino_head_wd_multiplier``
            (1.0; weight decay of the DINO head). For a model with several students also
            ``students``: by name the same settings where they differ, ``optimizer`` (e.g. betas)
            and ``optim_wrapper`` (e.g. ``clip_grad``).

    Raises:
        ValueError: An unknown or non-positive paramwise setting, no ``optimizer``, a model without
            ``student``, or a student with nothing to train.
    """

    def __init__(self, optim_wrapper_cfg: dict, paramwise_cfg: dict | None = None):
        if "optimizer" not in optim_wrapper_cfg:
            raise ValueError(
                f"optim_wrapper needs optimizer=dict(type='AdamW', ...), given {optim_wrapper_cfg}"
            )
        paramwise_cfg = dict(paramwise_cfg or {})
        self.students = paramwise_cfg.pop("students", {})
        self.given_paramwise = dict(paramwise_cfg)
        for key, value in paramwise_cfg.items():
            if key not in PARAMWISE_KEYS:
                raise ValueError(
                    f"paramwise_cfg has no setting {key!r}: {hint(key, PARAMWISE_KEYS)}"
                )
            if not isinstance(value, Real) or value < 0:
                raise ValueError(f"paramwise_cfg: {key} must be a number >= 0, given {value!r}")
        self.wrapper_cfg = {k: v for k, v in optim_wrapper_cfg.items() if k != "optimizer"}
        self.given_wrapper = dict(self.wrapper_cfg)
        self.optimizer_cfg = dict(optim_wrapper_cfg["optimizer"])
        self.head_wd_multiplier = paramwise_cfg.pop("dino_head_wd_multiplier", 1.0)
        self.head_lr_mult = paramwise_cfg.pop("head_lr_mult", 1.0)
        self.paramwise_cfg = paramwise_cfg

    def __call__(self, model: nn.Module):
        """Return the optimizer wrapper of ``model.student``, or those of all ``model.students``."""
        if is_model_wrapper(model):
            model = model.module
        if hasattr(model, "students"):
            return self._for_students(model)
        student = getattr(model, "student", None)
        if student is None:
            raise ValueError(
                f"PretrainOptimConstructor trains model.student, {type(model).__name__} has none; "
                "use the default constructor for other models"
            )
        groups = []
        for name, module in student.named_children():
            wd_multiplier = self.head_wd_multiplier if name == "dino_head" else 1.0
            lr_multiplier = 1.0 if name == BACKBONE else self.head_lr_mult
            groups += build_param_groups(
                module,
                name,
                lr_multiplier=lr_multiplier,
                wd_multiplier=wd_multiplier,
                **self.paramwise_cfg,
            )
        if not groups:
            raise ValueError("no parameter of the student requires a gradient: nothing to train")
        optimizer = self._build_optimizer(groups)
        wrapper_cfg = {"type": "PretrainOptimWrapper", **self.wrapper_cfg, "optimizer": optimizer}
        return OPTIM_WRAPPERS.build(wrapper_cfg)

    def _for_students(self, model: nn.Module) -> StudentOptimWrappers:
        unknown = [name for name in self.students if name not in model.student_names]
        if unknown:
            raise ValueError(
                f"paramwise_cfg.students: no student is called {unknown[0]!r}; "
                f"{hint(unknown[0], model.student_names)}"
            )
        wrappers = {}
        for name, student in model.students.items():
            changes = dict(self.students.get(name, {}))
            wrapper = {**self.given_wrapper, **changes.pop("optim_wrapper", {})}
            wrapper["optimizer"] = {**self.optimizer_cfg, **changes.pop("optimizer", {})}
            build = type(self)(wrapper, {**self.given_paramwise, **changes})
            wrappers[name] = build(student)
        return StudentOptimWrappers(**wrappers)

    def _build_optimizer(self, groups: list[dict]):
        cfg = dict(self.optimizer_cfg)
        optimizer_class = cfg["type"]
        if isinstance(optimizer_class, str):
            optimizer_class = OPTIMIZERS.get(optimizer_class)
        if optimizer_class and "fused" in inspect.signature(optimizer_class).parameters:
            cfg.setdefault("fused", True)
        optimizer = OPTIMIZERS.build({**cfg, "params": groups})
        count = sum(param.numel() for group in optimizer.param_groups for param in group["params"])
        print_log(
            f"{type(optimizer).__name__}: {count / 1e6:.2f} M parameters in {len(groups)} groups: "
            f"{', '.join(dict.fromkeys(group['submodule'] for group in groups))}",
            logger="current",
        )
        return optimizer
