"""The codecs by name. A codec is a frozen pydantic model: its JSON is its configuration. A list of them is a
`CodecSequence`."""

from clapping_ds.codecs.base import COMPRESSIBLE_DTYPES, Codec, Context, State, bits_per_value
from clapping_ds.codecs.eden import Eden
from clapping_ds.codecs.float8 import Float8
from clapping_ds.codecs.lowrank import LowRank
from clapping_ds.codecs.quant import Quantizer
from clapping_ds.codecs.randk import RandK
from clapping_ds.codecs.raw import Raw
from clapping_ds.codecs.sequence import CodecSequence
from clapping_ds.codecs.topk import TopK
from clapping_ds.codecs.transform import Transform

SimpleCodec = Raw | Quantizer | Eden | Float8 | TopK | RandK | LowRank | Transform
AnyCodec = SimpleCodec | CodecSequence

CODECS: dict[str, type[SimpleCodec]] = {
    "none": Raw,
    "int8": Quantizer,
    "int4": Quantizer,
    "int3": Quantizer,
    "int2": Quantizer,
    "sign": Quantizer,
    "eden4": Eden,
    "eden3": Eden,
    "eden2": Eden,
    "eden1": Eden,
    "fp8_e4m3": Float8,
    "fp8_e5m2": Float8,
    "topk": TopK,
    "randk": RandK,
    "lowrank": LowRank,
    "transform": Transform,
}

__all__ = [
    "CODECS",
    "COMPRESSIBLE_DTYPES",
    "AnyCodec",
    "Codec",
    "CodecSequence",
    "Context",
    "Eden",
    "Float8",
    "LowRank",
    "Quantizer",
    "RandK",
    "Raw",
    "SimpleCodec",
    "State",
    "TopK",
    "Transform",
    "bits_per_value",
]
