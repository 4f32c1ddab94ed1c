"""The optimizer of a pretraining model: parameter groups, construction, wrapper."""

import inspect
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from numbers import Real

import torch
from mmengine.logging import print_log
from mmengine.optim import OptimWrapper, OptimWrapperDict
from mmengine.registry import OPTIM_WRAPPER_CONSTRUCTORS, OPTIM_WRAPPERS, OPTIMIZERS
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn.utils import clip_grads_with_norm_, get_total_norm
from torch.optim import Optimizer

from dinov3_mm.checkpoints.load import shard_like
from dinov3_mm.errors import hint
from dinov3_mm.models.wrapping import unwrapped

# --- Parameter groups ---


# What activation checkpointing, compilation and sharding put into parameter names.
_WRAPPERS = re.compile(r"_checkpoint_wrapped_module\.|_orig_mod\.|_fsdp_wrapped_module\.")
_BLOCK = re.compile(r"blocks\.(\d+)\.")
_STEM = (
    "cls_token",
    "storage_tokens",
    "register_tokens",
    "mask_token",
    "pos_embed",
    "patch_embed.",
)
# The sub-module of the student that starts from trained weights when training is continued.
BACKBONE = "backbone"
_UNDECAYED = ("norm", "gamma", "fourier_w")


@dataclass(frozen=True)
class ParamMultipliers:
    """How one parameter's learning rate and weight decay follow the schedules.

    Attributes:
        lr_multiplier: Factor of the learning rate.
        wd_multiplier: Factor of the weight decay.
        is_last_layer: Whether the last-layer learning rate applies (a head's prototypes).
    """

    lr_multiplier: float
    wd_multiplier: float
    is_last_layer: bool


def plain_name(name: str) -> str:
    """Parameter name without what recomputation, compilation and sharding put into it."""
    return _WRAPPERS.sub("", name)


def param_multipliers(
    name: str,
    *,
    depth: int,
    layerwise_decay: float = 1.0,
    patch_embed_lr_mult: float = 1.0,
    lr_multiplier: float = 1.0,
    wd_multiplier: float = 1.0,
) -> ParamMultipliers:
    """Return the multipliers of a parameter from its name.

    The learning rate falls by ``layerwise_decay`` per layer below the final norm; tokens and patch
    embedding lie below the first block. Biases, norms and layer-scale gammas are not decayed;
    tokens and prototypes are.

    Args:
        name: Parameter name relative to the student's sub-module.
        depth: Number of blocks of the sub-module, 0 for heads and convolutional backbones.
        layerwise_decay: Factor per layer.
        patch_embed_lr_mult: Extra factor of the patch embedding.
        lr_multiplier: Factor of the whole sub-module.
        wd_multiplier: Weight-decay factor of what is decayed.
    """
    block = _BLOCK.match(name)
    if depth and name.startswith(_STEM):
        layer = 0
    elif depth and block:
        layer = int(block.group(1)) + 1
    else:
        layer = depth + 1
    lr_multiplier *= layerwise_decay ** (depth + 1 - layer)
    if name.startswith("patch_embed."):
        lr_multiplier *= patch_embed_lr_mult
    undecayed = name.endswith("bias") or any(part in name for part in _UNDECAYED)
    return ParamMultipliers(
        lr_multiplier, 0.0 if undecayed else wd_multiplier, "last_layer" in name
    )


def build_param_groups(module: nn.Module, submodule: str, **settings: float) -> list[dict]:
    """Collect the trainable parameters of one student sub-module into groups of equal multipliers.

    Args:
        module: The sub-module (backbone or head).
        submodule: Its name in the student; ``submodule`` of every group, by which gradients are
            clipped, and prefix of the parameter names.
        **settings: Arguments of :func:`param_multipliers` other than ``name`` and ``depth``.

    Returns:
        Optimizer groups in order of first appearance: ``params`` as ``(name, parameter)`` pairs,
        ``submodule``, ``lr_multiplier``, ``wd_multiplier``, ``is_last_layer``.
    """
    depth = len(getattr(module, "blocks", ()))
    groups: dict[ParamMultipliers, list] = {}
    for name, param in module.named_parameters():
        if param.requires_grad:
            name = plain_name(name)
            multipliers = param_multipliers(name, depth=depth, **settings)
            groups.setdefault(multipliers, []).append((f"{submodule}.{name}", param))
    return [
        {"params": params, "submodule": submodule, **vars(multipliers)}
        for multipliers, params in groups.items()
    ]


# --- From a config to the optimizer ---


class StudentOptimWrappers(OptimWrapperDict):
    """Optimizer wrappers by student; each steps, clips and skips on its own."""

    def initialize_count_status(self, model: nn.Module, cur_iter: int, max_iters: int) -> None:
        """Tell every wrapper where the run stands."""
        for wrapper in self.optim_wrappers.values():
            wrapper.initialize_count_status(model, cur_iter, max_iters)


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
        model = unwrapped(model)
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


# --- The wrapper: clips per sub-module, skips bad steps on the device ---


@OPTIM_WRAPPERS.register_module()
class PretrainOptimWrapper(OptimWrapper):
    """Steps the student without reading a value to the host.

    The gradient of each sub-module (``submodule`` of the parameter groups) is clipped to
    ``clip_grad`` on its own: the factor is ``min(1, clip_grad / (norm + 1e-6))``.

    A step is skipped when a loss or a gradient norm is not finite: parameters and optimizer state
    stay as they were. A non-finite loss sends NaN into its own backward pass, so that after the
    gradients are reduced every rank sees it in the norms and all ranks skip together.

    The parameters of a sub-module in :attr:`frozen` lose their gradient before the step, so that
    the optimizer passes over them: no update, no weight decay, no moments. The first step after a
    thaw therefore starts with fresh moments and bias correction.

    Args:
        optimizer: A torch optimizer with a fused kernel, built with ``fused=True``, which can be
            told on the device to leave everything as it is.
        accumulative_counts: Micro batches per step; each loss counts ``1 / accumulative_counts``.
            Gradients are reduced over ranks in the last of them.
        clip_grad: Largest gradient norm of a sub-module; ``None`` to clip nothing.

    Attributes:
        frozen: Names of the sub-modules that the coming steps leave alone.
        step_skipped: Whether the last step was skipped: a bool tensor on the parameters' device,
            or ``None`` before the first step.
        step_metrics: Of the last step, as device scalars: ``grad_norm/<submodule>`` before
            clipping, and ``step_skipped``.
        reduce_gradients: Called before each of several micro batches with whether it is the last of
            its step. ``FSDP2Strategy`` sets it; DDP is told through ``no_sync``.

    Raises:
        TypeError: An optimizer that cannot skip on the device, or ``clip_grad`` not a number.
        ValueError: ``clip_grad`` not positive.
    """

    def __init__(
        self, optimizer: Optimizer, accumulative_counts: int = 1, clip_grad: float | None = None
    ):
        if not getattr(optimizer, "_step_supports_amp_scaling", False):
            raise TypeError(
                f"PretrainOptimWrapper skips bad steps on the device, which "
                f"{type(optimizer).__name__} cannot do as built; use AdamW, Adam, SGD or Adagrad "
                "with fused=True"
            )
        if clip_grad is not None and (not isinstance(clip_grad, Real) or clip_grad is True):
            raise TypeError(f"clip_grad is a number or None, given {clip_grad!r}")
        if clip_grad is not None and clip_grad <= 0:
            raise ValueError(f"clip_grad must be positive or None, given {clip_grad}")
        super().__init__(optimizer, accumulative_counts=accumulative_counts)
        self.clip_grad = clip_grad
        self.frozen: frozenset[str] = frozenset()
        self.step_skipped: Tensor | None = None
        self.step_metrics: dict[str, Tensor] = {}
        self.reduce_gradients: Callable[[bool], None] | None = None
        self._params: dict[str, list[Tensor]] = {}
        for group in optimizer.param_groups:
            self._params.setdefault(group.get("submodule", "model"), []).extend(group["params"])

    @contextmanager
    def optim_context(self, model: nn.Module) -> Iterator[None]:
        """Context of a forward pass; settles whether the backward pass after it reduces."""
        if self.reduce_gradients is not None and self._accumulative_counts > 1:
            self.reduce_gradients(self.should_sync())
        with super().optim_context(model):
            yield

    def backward(self, loss: Tensor, **kwargs) -> None:
        """Back-propagate, from NaN instead of 1 when the loss is not finite."""
        seed = torch.where(torch.isfinite(loss.detach()), 1.0, torch.nan).to(loss.dtype)
        super().backward(loss, gradient=seed, **kwargs)

    def step(self, **kwargs) -> None:
        """Clip, and step unless a gradient norm is not finite."""
        norms = self._clip_gradients()
        for name in self.frozen:
            for param in self._params[name]:
                param.grad = None
        self.step_skipped = ~torch.stack(list(norms.values())).isfinite().all()
        skipped = self.step_skipped.to(torch.float32)
        self.optimizer.found_inf = skipped
        self.optimizer.step(**kwargs)
        del self.optimizer.found_inf
        self.step_metrics = {f"grad_norm/{name}": norm for name, norm in norms.items()}
        self.step_metrics["step_skipped"] = skipped

    @torch.no_grad()
    def _clip_gradients(self) -> dict[str, Tensor]:
        """Clip each sub-module and return its gradient norm from before."""
        norms = {}
        for name, params in self._params.items():
            params = [param for param in params if param.grad is not None]
            if not params:
                continue
            norms[name] = _over_ranks(get_total_norm([param.grad for param in params]))
            if self.clip_grad is not None and not _is_known_to_fit(norms[name], self.clip_grad):
                clip_grads_with_norm_(params, self.clip_grad, norms[name])
        return norms

    def state_dict(self) -> dict:
        """Return the optimizer's state, with ``param_names`` in its groups."""
        return self.optimizer.state_dict()

    def load_state_dict(self, state_dict: dict) -> None:
        """Load moments and step counts by parameter name; settings stay those of the config.

        A later stage may therefore group its parameters, or set betas, differently.

        Raises:
            ValueError: The state was saved without names, or for other parameters.
        """
        saved = _ids_by_name(state_dict)
        own = self.optimizer.state_dict()
        ids = _ids_by_name(own)
        if saved.keys() != ids.keys():
            raise ValueError(
                "the optimizer state is of other parameters: "
                f"missing {sorted(ids.keys() - saved.keys())[:5]}, "
                f"unexpected {sorted(saved.keys() - ids.keys())[:5]}; load the weights only"
            )
        params = {
            name: param
            for group in self.optimizer.param_groups
            for name, param in zip(group["param_names"], group["params"], strict=True)
        }
        states = state_dict["state"]
        own["state"] = {
            ids[name]: _state_like(states[saved_id], params[name])
            for name, saved_id in saved.items()
            if saved_id in states
        }
        self.optimizer.load_state_dict(own)


def _over_ranks(norm: Tensor) -> Tensor:
    """The norm of sharded gradients, from the norms of the shards."""
    return norm.full_tensor() if isinstance(norm, DTensor) else norm


def _state_like(state: dict, param: Tensor) -> dict:
    """Moments as whole tensors to what the parameter is; step counts stay."""
    return {
        key: shard_like(value, param) if getattr(value, "shape", None) == param.shape else value
        for key, value in state.items()
    }


def _is_known_to_fit(norm: Tensor, limit: float) -> bool:
    """Whether clipping would multiply by 1: asked on the CPU only, where reading does not wait."""
    return norm.device.type == "cpu" and norm.item() + 1e-6 <= limit


def _ids_by_name(state_dict: dict) -> dict[str, int]:
    """Which entry of an optimizer's state belongs to which parameter."""
    names = {}
    for group in state_dict["param_groups"]:
        if "param_names" not in group:
            raise ValueError(
                "the optimizer state has no param_names: PretrainOptimWrapper loads states of "
                "optimizers that PretrainOptimConstructor built; load the weights only"
            )
        names.update(zip(group["param_names"], group["params"], strict=True))
    return names
