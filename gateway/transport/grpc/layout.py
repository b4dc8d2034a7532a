"""Request messages met before: one that differs from them in the bytes of its raw tensors alone is not parsed.

Clients send the same message again and again with other data in it, and a message of equal length whose other
bytes are all equal has its tensors in the same places. Reading such a message takes a quarter of the time of parsing it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from gateway.transport.grpc.wire import RAW_TAG, length
from gateway.types import Buffer, DataType, InferRequest, RequestedOutput, Tensor

_REMEMBERED = 256
_SMALL = 4096  # bytes of a message from which its tensors are copied, which is quicker than making views


@dataclass(frozen=True, slots=True, eq=False)
class Layout:
    """Where the tensors of a message lie, and what the message says besides.

    `seams` are the stretches that are no tensor's data: where each begins and ends, and its bytes.
    """

    model_name: str
    model_version: str
    outputs: tuple[RequestedOutput, ...]
    seams: tuple[tuple[int, int, bytes], ...]
    cuts: tuple[tuple[str, DataType, tuple[int, ...], int, int], ...]
    form: object

    def request(self, payload: bytes) -> InferRequest | None:
        """The request in a message of this layout's length; None when it is of another layout."""
        for start, stop, seam in self.seams:
            if payload[start:stop] != seam:
                return None
        source = payload if len(payload) <= _SMALL else memoryview(payload)
        tensors = {
            name: Tensor(datatype, shape, source[start:stop]) for name, datatype, shape, start, stop in self.cuts
        }
        return InferRequest(self.model_name, tensors, self.model_version, "", self.outputs, form=self.form)


class Layouts:
    """The layouts of late, by the length of the message. For one event loop."""

    def __init__(self) -> None:
        self._layouts: dict[int, Layout] = {}

    def request(self, payload: bytes) -> InferRequest | None:
        """The request in a message whose like was remembered, else None."""
        layout = self._layouts.get(len(payload))
        return None if layout is None else layout.request(payload)

    def remember(self, payload: bytes, raw: Sequence[Buffer], request: InferRequest) -> None:
        """Remember how `payload` was read: `raw` are its raw tensors, which `request.inputs` has in the same order.

        To be called for a request without id and parameters, whose tensors are the last fields of its message.
        """
        seams: list[tuple[int, int, bytes]] = []
        cuts: list[tuple[str, DataType, tuple[int, ...], int, int]] = []
        stop = len(payload)
        # From the end, because a tensor's field ends where the next one's tag begins.
        for (name, tensor), data in zip(reversed(request.inputs.items()), reversed(raw), strict=True):
            start = stop - len(data)
            cuts.append((name, tensor.datatype, tensor.shape, start, stop))
            seam = RAW_TAG + length(len(data))
            stop = start - len(seam)
            if payload[stop:start] != seam:
                return  # a size in more bytes than it needs: allowed, and nobody's habit
            seams.append((stop, start, seam))
        seams.append((0, stop, payload[:stop]))
        if len(self._layouts) >= _REMEMBERED:
            self._layouts.clear()
        self._layouts[len(payload)] = Layout(
            request.model_name,
            request.model_version,
            request.outputs,
            tuple(reversed(seams)),
            tuple(reversed(cuts)),
            request.form,
        )
