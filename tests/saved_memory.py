# SPDX-License-Identifier: Apache-2.0
"""What a forward pass leaves in memory for its backward pass, measured on real tensors."""

import contextlib
import gc
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed._functional_collectives import AsyncCollectiveTensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode


def kept_by_autograd(run: Callable[[], Any], model: nn.Module) -> int:
    """Bytes of the storages that ``saved_tensors_hooks`` are given while ``run`` runs.

    Parameters do not count, nor what autocast copies of them.
    """
    parameters = {p.untyped_storage().data_ptr() for p in model.parameters()}
    copies = {_numbers(p.detach().bfloat16()) for p in model.parameters() if p.ndim > 1}
    kept: list[Tensor] = []

    def pack(saved: Tensor) -> Tensor:
        tensor = saved
        if isinstance(saved, AsyncCollectiveTensor):  # from another process, memory is inside
            tensor = saved.trigger_wait()
        is_copy = tensor.dtype == torch.bfloat16 and _numbers(tensor) in copies
        if tensor.untyped_storage().data_ptr() not in parameters and not is_copy:
            kept.append(tensor)
        return saved

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        run()
    storages: dict[int, torch.UntypedStorage] = {
        t.untyped_storage().data_ptr(): t.untyped_storage() for t in kept
    }
    return sum(storage.nbytes() for storage in storages.values())


def alive_after(run: Callable[[], Any], model: nn.Module, *, given: Iterable[Tensor] = ()) -> int:
    """Bytes of the storages made while ``run`` runs that are there after it, but its result.

    Views of the ``given`` tensors are not made then, nor what autocast copies of parameters.
    """
    gc.disable()  # what is new stays in the youngest generation, which is quickly searched
    try:
        with _Births((*model.parameters(), *model.buffers(), *given)) as births:
            result = run()
        gc.collect(0)
    finally:
        gc.enable()
    left: int = births.alive(but=result if isinstance(result, tuple) else (result,))
    return left


def _numbers(tensor: Tensor) -> bytes:
    """All that its storage holds."""
    storage = tensor.untyped_storage()
    return bytes(torch.empty(0, dtype=torch.uint8).set_(storage).numpy())


class _Births(TorchDispatchMode):
    """Watches the memory of every tensor that an operation returns."""

    def __init__(self, old: Iterable[Tensor]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._weights: set[int] = set()
        self._old: set[int] = set()
        for tensor in old:
            self._old.add(_address(tensor))
            if isinstance(tensor, nn.Parameter):
                self._weights.add(_address(tensor))
        self._copies: list[Tensor] = []
        self._seen: dict[int, tuple[StorageWeakRef, int]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func is torch.ops.aten._to_copy.default and _address(args[0]) in self._weights:
            self._copies.append(result)  # a weight as autocast computes with it
            self._old.add(_address(result))
        for tensor in result if isinstance(result, tuple | list) else (result,):
            if isinstance(tensor, Tensor) and _address(tensor) not in self._old:
                storage = tensor.untyped_storage()
                self._seen[storage._cdata] = (StorageWeakRef(storage), storage.nbytes())
        return result

    def alive(self, *, but: Sequence[Tensor]) -> int:
        """Bytes of what is still there."""
        results = {_address(tensor) for tensor in but}
        return sum(
            size
            for address, (storage, size) in self._seen.items()
            if not storage.expired() and address not in results
        )


def _address(tensor: Tensor) -> int:
    address: int = tensor.untyped_storage()._cdata
    return address


@contextlib.contextmanager
def rules_of_gpus() -> Iterator[None]:
    """Norms as autocast for CUDA computes them, in float32, and the fused RMS norm.

    Both are torch's: the list of operations is AT_FORALL_FP32 in ATen/autocast_mode.h, and
    ``_fused_rms_norm`` keeps its input, the inverse root and the weights.
    """
    plain = F.layer_norm

    def layer_norm(x: Tensor, *arguments: Any, **options: Any) -> Tensor:
        return plain(x.float(), *arguments, **options)

    def rms_norm(x: Tensor, shape: Any, weight: Tensor, eps: float) -> Tensor:
        normed: Tensor = _FusedRmsNorm.apply(x.float(), weight, eps)  # type: ignore[no-untyped-call]
        return normed

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(F, "layer_norm", layer_norm)
        patch.setattr(F, "rms_norm", rms_norm)
        yield


class _FusedRmsNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        scale = torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps)
        ctx.save_for_backward(x, scale, weight)
        return x * scale * weight
