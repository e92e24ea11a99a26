"""The codecs by name. A codec is a frozen pydantic model: its JSON is its configuration."""

from clapping_ds.codecs.protocol import COMPRESSIBLE_DTYPES, Codec, bits_per_value
from clapping_ds.codecs.quant import Quantizer
from clapping_ds.codecs.raw import Raw
from clapping_ds.codecs.sparse import TopK

CODECS: dict[str, type[Raw] | type[Quantizer] | type[TopK]] = {
    "none": Raw,
    "int8": Quantizer,
    "int4": Quantizer,
    "int3": Quantizer,
    "int2": Quantizer,
    "sign": Quantizer,
    "topk": TopK,
}

__all__ = ["CODECS", "COMPRESSIBLE_DTYPES", "Codec", "Quantizer", "Raw", "TopK", "bits_per_value"]
