"""A GPU that is not there: fake CUDA tensors that go through whole training steps on a CPU.

``FakeTensorMode`` knows CUDA: such tensors have the dispatch keys of CUDA (so its autocast rules),
a device that every operator checks, and ``is_cuda``. Three things keep them from a training step on
a machine without a driver, and each is answered here; the package is left alone.

- Autograd's engine asks the driver for the streams of its nodes' devices. It reads a device through
  C++ only. So C++ is told 'meta', which the engine runs on the calling thread, and Python CUDA.
  Autocast reads the device through C++ as well, to see whether a tensor is eligible: while it asks,
  and only then, C++ is told CUDA too.
- ``torch.cuda`` asks the driver. Its functions that training and FSDP2 call answer for one GPU.
- Which kernel attention takes is the driver's choice (by compute capability): here the flash kernel
  for 16 bits and the memory-efficient one for float32, as on every GPU since Ampere.

What this cannot see is what a kernel itself refuses while it runs on a GPU.
"""

import contextlib
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor
from torch._ops import OpOverload
from torch._subclasses import fake_tensor
from torch._subclasses.fake_tensor import (
    FakeTensor,
    FakeTensorMode,
    unset_fake_temporarily,
)
from torch.distributed import device_mesh
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

CUDA = torch.device("cuda", 0)
_META = torch.device("meta")
_aten = torch.ops.aten


class FakeCudaMode(FakeTensorMode):
    """``FakeTensorMode`` whose CUDA tensors can be differentiated where there is no driver.

    Attributes:
        autocast_asks: a function of torch runs under autocast, so that it may ask for devices.
        means_meta: that function was told 'meta' by its caller, or given such tensors.
    """

    # Never touch a driver, whether there is one or not.
    avoid_device_init = True

    def __init__(self) -> None:
        super().__init__(allow_non_fake_inputs=True, allow_fallback_kernels=False)
        self.allow_meta = True
        self.autocast_asks = False
        self.means_meta = False
        # Results of that function's operators, which autograd may record next, and their nodes
        # until then: in place an operator has one already.
        self._unrecorded: tuple[tuple[Tensor, Any], ...] = ()

    def dispatch(
        self, func: Any, types: Sequence[type], args: Sequence[Any] = (), kwargs: Any = None
    ) -> Any:
        """Run an operator; where C++ says 'meta' it means CUDA."""
        kwargs = kwargs or {}
        if func is torch.ops.prim.device.default:
            return self.device_for_cpp(args[0])
        if kwargs.get("device") == _META and not self.means_meta:
            kwargs = {**kwargs, "device": CUDA}
        if func is _aten._to_copy.default and _changes_nothing(args[0], kwargs):
            func, kwargs = _aten.alias.default, {}
        _refuse_mixed_devices(func, args, kwargs)
        if func._schema.name in _FUSED_STEPS:
            return None  # in place; torch has no shape function of SGD's and Adagrad's
        out = super().dispatch(func, types, args, kwargs)
        if self.autocast_asks:
            self._unrecorded += _awaiting_history(args, kwargs, out)
        return out

    def device_for_cpp(self, tensor: FakeTensor) -> torch.device:
        """What C++ is told of a tensor's device."""
        if self.in_kernel_invocation:
            return _META
        if tensor.fake_device.type != "cuda":
            return tensor.fake_device
        is_new = any(tensor is each and tensor.grad_fn is node for each, node in self._unrecorded)
        return tensor.fake_device if self.autocast_asks and not is_new else _META


def _changes_nothing(tensor: Any, kwargs: dict[str, Any]) -> bool:
    """Whether ``tensor.to(...)`` would return the tensor itself; C++ cannot tell, see _META."""
    device, dtype = kwargs.get("device"), kwargs.get("dtype")
    return (
        isinstance(tensor, FakeTensor)
        and tensor.fake_device.type == "cuda"
        and (device is None or device.type == "cuda")
        and dtype in (None, tensor.dtype)
        and kwargs.get("memory_format") in (None, torch.preserve_format)
    )


_FUSED_STEPS = {f"aten::_fused_{name}_" for name in ("adam", "adamw", "sgd", "adagrad")}
# Fake tensors let a single value on the CPU pass everywhere; these kernels do not.
_SINGLE_DEVICE = ("_fused_", "_scaled_", "cat", "stack")


def _refuse_mixed_devices(func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> None:
    if not func._schema.name.removeprefix("aten::").startswith(_SINGLE_DEVICE):
        return
    devices = {leaf.device for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, FakeTensor)}
    if len(devices) > 1:
        raise RuntimeError(
            f"Expected all tensors to be on the same device, but {func} was given tensors on "
            f"{', '.join(sorted(map(str, devices)))}"
        )


def _awaiting_history(args: Any, kwargs: Any, out: Any) -> tuple[tuple[Tensor, Any], ...]:
    """The results that autograd will record next, if it does, and their nodes so far."""
    if not torch.is_grad_enabled():
        return ()
    tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
    if not any(tensor.requires_grad for tensor in tensors):
        return ()
    return tuple((leaf, leaf.grad_fn) for leaf in tree_leaves(out) if isinstance(leaf, Tensor))


_run_backward = torch.autograd._engine_run_backward


class _Calls(TorchFunctionMode):
    """Context in which ``mode`` knows what Python has called."""

    def __init__(self, mode: FakeCudaMode) -> None:
        super().__init__()
        self.mode = mode
        # Autograd's nodes of parameters: once made, they never ask again.
        self._nodes: dict[int, Any] = {}

    def run_backward(self, *args: Any, **kwargs: Any) -> Any:
        """Autograd's engine; blocks that run again in the backward pass call functions too."""
        with self:
            return _run_backward(*args, **kwargs)

    def __torch_function__(
        self, func: Callable, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if isinstance(func, OpOverload):
            return func(*args, **kwargs)  # from within an operator: other modes call on
        if func in (Tensor.backward, torch.autograd.backward):
            return func(*args, **kwargs)
        if func is F.scaled_dot_product_attention and args[0].is_cuda:
            func = _attention
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        asks = torch.is_autocast_enabled("cuda")
        if asks and torch.is_grad_enabled():
            for leaf in tensors:
                if leaf.requires_grad and leaf.is_leaf and id(leaf) not in self._nodes:
                    self._nodes[id(leaf)] = torch.autograd.graph.get_gradient_edge(leaf)
        mode = self.mode
        before = mode.autocast_asks, mode.means_meta, mode._unrecorded
        mode.autocast_asks, mode._unrecorded = asks, ()
        mode.means_meta = _is_meta(kwargs.get("device")) or any(map(_is_meta_tensor, tensors))
        try:
            return func(*args, **kwargs)
        finally:
            mode.autocast_asks, mode.means_meta, mode._unrecorded = before


def _is_meta(device: Any) -> bool:
    return device is not None and torch.device(device).type == "meta"


def _is_meta_tensor(tensor: Tensor) -> bool:
    return tensor.device.type == "meta"


def _attention(
    query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, **settings: Any
) -> Tensor:
    """Attention by the kernel that a GPU takes."""
    heads = [query, key, value]
    if torch.is_autocast_enabled("cuda"):
        heads = [each.to(torch.get_autocast_dtype("cuda")) for each in heads]
    if attn_mask is None and heads[0].dtype in (torch.float16, torch.bfloat16):
        width = query.shape[-1]
        settings["scale"] = settings.get("scale") or width**-0.5
        if width % 8 == 0:
            return _aten._scaled_dot_product_flash_attention(*heads, **settings)[0]
        padded = [F.pad(each, (0, -width % 8)) for each in heads]
        return _aten._scaled_dot_product_flash_attention(*padded, **settings)[0][..., :width]
    needs_grad = torch.is_grad_enabled() and any(each.requires_grad for each in heads)
    kernel = _aten._scaled_dot_product_efficient_attention
    return kernel(*heads, attn_mask, needs_grad, **settings)[0]


class _Stream:
    """A CUDA stream or event: order is all that they are for, and one process has it."""

    def __init__(self, *_: Any, **__: Any) -> None:
        self.device = CUDA

    def __enter__(self) -> "_Stream":
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def record(self, *_: Any) -> "_Stream":
        """Return the event, as ``torch.cuda.Event`` does not: nothing reads it."""
        return self

    def wait_event(self, *_: Any) -> None:
        """Nothing runs behind."""

    wait_stream = wait = synchronize = wait_event
    record_event = record


_swap_tensors = torch.utils.swap_tensors


def swap_watched(one: Tensor, other: Tensor) -> None:
    """``swap_tensors``, which moves fake parameters, also where torch keeps a weak reference."""
    with patch.object(torch.utils.weakref, "getweakrefs", lambda tensor: []):
        _swap_tensors(one, other)


def _unfaked(function: Callable) -> Callable:
    """The function on real tensors: meshes keep their tables of ranks in tensors, and read them."""

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        with unset_fake_temporarily():
            return function(*args, **kwargs)

    return call


@contextlib.contextmanager
def fake_cuda() -> Iterator[FakeCudaMode]:
    """Context in which there is one GPU, whose tensors have no storage.

    Example:
        >>> with fake_cuda():
        ...     layer = torch.nn.Linear(4, 4).to("cuda")
        ...     layer(torch.ones(2, 4, device="cuda")).sum().backward()
        ...     layer.weight.grad.is_cuda
        True
    """
    mode = FakeCudaMode()
    with contextlib.ExitStack() as stack:
        for owner, name, value in _driver():
            stack.enter_context(patch.object(owner, name, value, create=True))
        calls = _Calls(mode)
        run_backward = patch.object(torch.autograd, "_engine_run_backward", calls.run_backward)
        stack.enter_context(run_backward)
        stack.enter_context(calls)
        yield stack.enter_context(mode)


def _driver() -> Iterator[tuple[Any, str, Any]]:
    """Owner, name and value of what asks a driver, or reads the device through C++."""
    answers = {
        "is_available": True,
        "is_bf16_supported": True,
        "is_initialized": True,
        "is_current_stream_capturing": False,
        "current_device": 0,
        "device_count": 1,
        "get_device_capability": (9, 0),
        "get_device_name": "a GPU that is not there",
        "set_device": None,
        "synchronize": None,
        "get_rng_state": torch.zeros(16, dtype=torch.uint8),
        "set_rng_state": None,
        "current_stream": _Stream(),
        "stream": contextlib.nullcontext(),
    }
    for name, answer in answers.items():
        yield torch.cuda, name, lambda *_, answer=answer, **__: answer
    yield torch.cuda, "Stream", _Stream
    yield torch.cuda, "Event", _Stream
    yield device_mesh, "init_device_mesh", _unfaked(device_mesh.init_device_mesh)
    for name in ("__init__", "__getitem__"):
        yield DeviceMesh, name, _unfaked(getattr(DeviceMesh, name))
    yield torch.utils, "swap_tensors", swap_watched
    yield fake_tensor, "init_gpu_context", lambda device: None
    yield DTensor, "device", property(lambda self: self._local_tensor.device)
    for kind in (FakeTensor, DTensor):
        yield kind, "is_cuda", property(lambda self: self.device.type == "cuda")
        yield kind, "is_meta", property(lambda self: self.device.type == "meta")
