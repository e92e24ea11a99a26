"""8-bit floats: `clapping_ds.codecs.float8` in plain torch."""

import torch

from clapping_ds.codecs.reference.grouped import Constants, Functions


def encoded(
    y_GS: torch.Tensor, count_G: torch.Tensor, noise_GS: torch.Tensor, constants: Constants
) -> tuple[torch.Tensor, torch.Tensor]:
    dtype, largest = (torch.float8_e4m3fn if constants[0] == 3 else torch.float8_e5m2), constants[2]
    scale_G = (y_GS.abs().amax(1) * (1.0 / largest)).bfloat16().float()
    inverse_G = torch.where(scale_G > 0, 1.0 / scale_G, 0.0)
    float_GS = (y_GS * inverse_G[:, None]).clamp(-largest, largest).to(dtype)
    return float_GS.view(torch.uint8), scale_G


def level(code_GS: torch.Tensor, constants: Constants) -> torch.Tensor:
    dtype = torch.float8_e4m3fn if constants[0] == 3 else torch.float8_e5m2
    return code_GS.view(dtype).float()


FLOAT8 = Functions(encoded, level)
