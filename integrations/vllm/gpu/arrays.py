"""torch's tensors and stream as Numba sees them: the same memory, the same queue."""

from __future__ import annotations

from typing import Any

from numba import cuda


def as_array(tensor: Any) -> Any:
    """The tensor's own memory as an array that kernels take.

    Through the CUDA array interface. Under the simulator there is no device, and the tensor is one of the CPU.
    """
    if tensor.device.type == "cpu":
        return tensor.numpy()
    return cuda.as_cuda_array(tensor, sync=False)


class Streams:
    """torch's streams of one device as Numba's; made once each, since torch has few."""

    def __init__(self, device: Any) -> None:
        self._device = device
        self._known: dict[int, Any] = {0: 0}

    def handle(self) -> int:
        """Of the stream that torch launches on now."""
        if self._device.type == "cpu":
            return 0
        import torch

        return int(torch.cuda.current_stream(self._device).cuda_stream)

    def current(self) -> Any:
        """The stream that torch launches on now."""
        pointer = self.handle()
        stream = self._known.get(pointer)
        if stream is None:
            stream = self._known[pointer] = cuda.external_stream(pointer)
        return stream


def select_device(device: Any) -> None:
    """Make torch's device Numba's in this thread; the two share CUDA's primary context."""
    if device.type != "cpu":
        import torch

        cuda.select_device(torch.cuda.current_device() if device.index is None else device.index)
