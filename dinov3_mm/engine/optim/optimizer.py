"""Optimizer wrapper of pretraining: clips per sub-module and skips bad steps on the device."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from numbers import Real

import torch
from mmengine.optim import OptimWrapper
from mmengine.registry import OPTIM_WRAPPERS
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn.utils import clip_grads_with_norm_, get_total_norm
from torch.optim import Optimizer

from dinov3_mm.checkpoints.sharding import shard_like


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
