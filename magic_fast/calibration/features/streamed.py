"""Weights of a run that come from checkpoints, one station at a time."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from magic_fast.calibration.features.sites import Part, Station

Take = Callable[[int], Tensor]  # bytes → a buffer of so many
Read = Callable[[int, str, Take, "slice | None"], Tensor]
MERGED, BASE, FIRST_EXPERT = 0, 1, 2


class AbsentError(RuntimeError):
    """A weight was used while it was not there: outside of its module's own call."""


class Absent(nn.Parameter):
    """A parameter without its values, of which dtype, device and shape may be asked.

    It raises where it is used: PyTorch gives arbitrary numbers for some products of real tensors
    with ones on the meta device.
    """

    _TOLD = frozenset({"__get__", "size", "dim", "numel", "is_floating_point", "requires_grad_"})

    @classmethod
    def like(cls, parameter: torch.Tensor) -> Absent:
        made = torch.Tensor._make_subclass(cls, parameter.detach().to("meta"), False)
        assert isinstance(made, Absent)
        return made

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if getattr(func, "__name__", "") not in cls._TOLD:
            raise AbsentError("weights are used outside of their layer's own call")
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **(kwargs or {}))


def forbid_weights(model: nn.Module) -> None:
    """Makes every parameter of a model :class:`Absent`; tied ones stay tied."""
    made: dict[int, Absent] = {}
    for module in model.modules():
        for name, own in module._parameters.items():
            if own is not None:
                if id(own) not in made:
                    made[id(own)] = Absent.like(own)
                module._parameters[name] = made[id(own)]


class Workspace:
    """Buffers that stay: what comes and goes with every layer would leave holes of all sizes in the
    heap, and cost a page fault for every 4 KiB."""

    def __init__(self) -> None:
        self._buffers: dict[object, Tensor] = {}

    def take(self, key: object, nbytes: int, device: torch.device) -> Tensor:
        """The buffer of that key, uint8 [nbytes]; it grows to the largest that was asked for."""
        found = self._buffers.get((key, device))
        if found is None or found.numel() < nbytes:
            self._buffers.pop((key, device), None)  # first: both would be there together
            found = self._buffers[key, device] = torch.empty(
                nbytes, dtype=torch.uint8, device=device
            )
        return found[:nbytes]

    def tensor(
        self, key: object, shape: torch.Size, dtype: torch.dtype, device: torch.device
    ) -> Tensor:
        nbytes = shape.numel() * dtype.itemsize
        return self.take(key, nbytes, device).view(dtype).view(shape)


class StreamedWeights:
    """While a station is looked at and run, the merged weights of it are in the model, and of the
    other models those that were asked for are held; then all of them go.

    Args:
        read: (0 merged, 1 base, 2 … experts; name in the model; where to get a buffer; rows or
            None) → the stored tensor.
        device: where it runs.
        resident: the merged weights are in the model already, and stay.
    """

    streamed = True

    def __init__(self, read: Read, device: str = "cpu", *, resident: bool = False) -> None:
        self._read, self._device, self.resident = read, torch.device(device), resident
        self._held: dict[tuple[int, str], Tensor] = {}
        self._space = Workspace()
        self._meta: list[tuple[nn.Module, str, nn.Parameter | None]] = []

    def base(self, name: str) -> Tensor:
        return self._hold(BASE, name)

    def merged(self, name: str) -> Tensor:
        return self._hold(MERGED, name)

    def expert(self, number: int, name: str, rows: slice | None = None) -> Tensor:
        # asked for once a task: held, the experts would all be there together
        return self._fetch(FIRST_EXPERT + number, name, name.rpartition(".")[2], rows)

    def scratch(self, key: object, like: Tensor, dtype: torch.dtype) -> Tensor:
        return self._space.tensor(("made", key), like.shape, dtype, self._device)

    def _fetch(self, which: int, name: str, key: object, rows: slice | None = None) -> Tensor:
        def take(nbytes: int) -> Tensor:
            return self._space.take(("stored", key), nbytes, torch.device("cpu"))

        return self._read(which, name, take, rows).to(self._device)

    def _hold(self, which: int, name: str) -> Tensor:
        found = self._held.get((which, name))
        if found is None:
            found = self._held[which, name] = self._fetch(which, name, (which, len(self._held)))
        return found

    def enter(self, station: Station) -> None:
        if self.resident:
            return
        for prefix, module in station.module.named_modules():
            for local, own in list(module._parameters.items()):
                if own is not None:
                    name = ".".join(filter(None, (station.name, prefix, local)))
                    stored = self.merged(name)
                    key = ("own", prefix, local)
                    value = self.scratch(key, stored, torch.float32).copy_(stored)
                    self._meta.append((module, local, own))
                    module._parameters[local] = nn.Parameter(value, requires_grad=False)

    def leave(self, station: Station) -> None:
        for module, local, own in self._meta:
            module._parameters[local] = own
        self._meta.clear()
        self._held.clear()

    def put(self, station: Station, part: Part, value: Tensor) -> None:
        part.cut(station.module.get_parameter(part.local)).copy_(value)
