"""8-bit floats: `clapping_ds.codecs.float8` in plain torch."""

from typing import NamedTuple

import torch


class Constants(NamedTuple):
    """What both implementations are told of the format."""

    mantissa_bits: int
    bias: int
    """Of the exponent."""
    largest: float
    """Finite float."""

    @property
    def dtype(self) -> torch.dtype:
        return torch.float8_e4m3fn if self.mantissa_bits == 3 else torch.float8_e5m2


def encode_groups(
    y_GS: torch.Tensor, count_G: torch.Tensor, noise_GS: torch.Tensor, constants: Constants
) -> tuple[torch.Tensor, torch.Tensor]:
    largest = constants.largest
    scale_G = (y_GS.abs().amax(1) * (1.0 / largest)).bfloat16().float()
    inverse_G = torch.where(scale_G > 0, 1.0 / scale_G, 0.0)
    float_GS = (y_GS * inverse_G[:, None]).clamp(-largest, largest).to(constants.dtype)
    return float_GS.view(torch.uint8), scale_G


def decode_level(code_GS: torch.Tensor, constants: Constants) -> torch.Tensor:
    return code_GS.view(constants.dtype).float()
