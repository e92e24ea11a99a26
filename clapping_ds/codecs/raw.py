"""The codec `none`: the tensor itself, byte for byte.

It is the key codec of the strategy `fu`, the codec of everything that is not compressed, and with
`key` and `delta` both `none` the channel hands over exactly what it was given.
"""

from typing import ClassVar, Literal

import torch
from pydantic import BaseModel

from clapping_ds.codecs.base import STRICT, Context, pad_nbytes
from clapping_ds.codecs.reference import raw_reference


class Raw(BaseModel):
    """Sends values as they are. `memory`, where given, becomes the value, but for every run of 16
    values of which one is not finite.

    Wire: the tensor's bytes, then padding to 16 bytes. The receiver gets the value unrounded; the
    memory is rounded to its own dtype and saturates there.
    """

    model_config = STRICT
    carries_by_default: ClassVar[bool] = False

    name: Literal["none"] = "none"

    def nbytes(self, shape: tuple[int, ...], dtype: torch.dtype) -> int:
        return pad_nbytes(torch.Size(shape).numel() * dtype.itemsize)

    def new_state(self, width: int, device: torch.device) -> None:
        return None

    def encode_(self, value: torch.Tensor, payload: torch.Tensor, context: Context) -> None:
        num_bytes = value.numel() * value.element_size()
        _copy_(value.view(-1), payload[:num_bytes].view(value.dtype), context)
        payload[num_bytes:].zero_()

    def decode_(self, payload: torch.Tensor, out: torch.Tensor, context: Context) -> None:
        num_bytes = out.numel() * out.element_size()
        _copy_(payload[:num_bytes].view(out.dtype), out.view(-1), context)


def _copy_(source: torch.Tensor, target: torch.Tensor, context: Context) -> None:
    memory = context.memory
    if memory is None:
        target.copy_(source)
    elif source.is_cuda:
        from clapping_ds.codecs.kernels import raw_kernel

        raw_kernel.copy_(source, target, memory.view(-1))
    else:
        raw_reference.copy_(source, target, memory.view(-1))
