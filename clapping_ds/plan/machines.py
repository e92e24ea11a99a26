"""GPUs as their makers publish them, and links."""

from typing import NamedTuple

BUFFER_BYTES = 4 * 2**20
"""NCCL's default: a send is done for its sender when no more is still to go over."""


class Gpu(NamedTuple):
    """tflops: dense, of 16-bit matrices with sums in fp32. memory_gb: of 10^9 bytes. gb_per_s: of memory.
    inside_gb_per_s: to another GPU of the node, in each direction."""

    tflops: float
    memory_gb: float
    gb_per_s: float
    inside_gb_per_s: float = 20.0
    """As PCIe 4.0 x16 has it."""


GPUS = {
    "T4": Gpu(65, 16, 320, 10), "V100": Gpu(125, 32, 900, 150), "RTX 3090": Gpu(71, 24, 936),
    "RTX 4090": Gpu(165, 24, 1008), "RTX 5090": Gpu(210, 32, 1792, 40), "RTX A6000": Gpu(155, 48, 768),
    "RTX 6000 Ada": Gpu(364, 48, 960), "A10": Gpu(125, 24, 600), "L4": Gpu(121, 24, 300),
    "L40S": Gpu(362, 48, 864), "A100": Gpu(312, 80, 2039, 300), "A100 40GB": Gpu(312, 40, 1555, 300),
    "H100 PCIe": Gpu(756, 80, 2000, 40), "H100": Gpu(989, 80, 3350, 450), "H200": Gpu(989, 141, 4800, 450),
    "MI250X": Gpu(191, 64, 1638, 50), "MI300X": Gpu(1307, 192, 5300, 64),
}  # fmt: skip
"""Of data sheets. GeForce cards: the rate with sums in fp32, which is half of the one with sums in fp16.
MI250X: one of its two dies, which is what a rank has."""


class Machines(NamedTuple):
    """Nodes that are all alike."""

    gpu: Gpu
    num_nodes: int
    gpus_per_node: int
    bytes_per_s: float
    """That a node sends to others, and as much that it receives."""
    latency_s: float
    efficiency: float = 0.4
    """Share of the GPU's rate that is reached."""

    @property
    def num_gpus(self) -> int:
        return self.num_nodes * self.gpus_per_node

    @property
    def flop_per_s(self) -> float:
        return self.gpu.tflops * 1e12 * self.efficiency

    @property
    def inside_bytes_per_s(self) -> float:
        return self.gpu.inside_gb_per_s * 1e9
