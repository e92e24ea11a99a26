"""Compiles every kernel for three GPUs, without one: `python -m tests.compile_kernels`.

Prints a line per kernel, variant and target, and exits non-zero where registers spill. Not run under
pytest itself, where Triton interprets its kernels.
"""

import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.compiler import get_ptxas
from triton.compiler import ASTSource, CompiledKernel

from clapping_ds.codecs import Quantizer, TopK, quant, raw, sparse

TARGETS = (GPUTarget("cuda", 80, 32), GPUTarget("cuda", 90, 32), GPUTarget("hip", "gfx942", 64))
LIMIT = torch.finfo(torch.bfloat16).max
MEMORY = {"CARRY": True, "HAS_MEMORY": True, "LIMIT": LIMIT}
DIRECT = {"CARRY": False, "HAS_MEMORY": False, "LIMIT": LIMIT}
BF16, FP32, INT16, UINT8 = "*bf16", "*fp32", "*i16", "*u8"


def variants() -> list[tuple[str, Any, dict[str, str], dict[str, Any]]]:
    """(label, kernel, types of its arguments, constants)."""
    found = [
        ("none", raw.copy_kernel, {"source": BF16, "target": BF16, "memory": BF16},
         {"HAS_MEMORY": True, "LIMIT": LIMIT, "BLOCK": raw.BLOCK}),
    ]  # fmt: skip
    for name in ("int8", "int4", "int3", "int2", "sign"):
        codec = Quantizer(name=name)
        _, shape = quant._launch_options(codec, 1)
        for label, state, kind in (
            ("memory", MEMORY, BF16),
            ("fp32", MEMORY, FP32),
            ("direct", DIRECT, BF16),
        ):
            encode = {"value": kind, "memory": kind, "codes": UINT8, "scales": INT16}
            decode = {"codes": UINT8, "scales": INT16, "memory": kind, "out": kind}
            mean = {"MEAN": name == "sign"}
            found.append((f"{name} {label}", quant.encode_kernel, encode, {**shape, **state, **mean}))
            found.append((f"{name} {label}", quant.decode_kernel, decode, {**shape, **state}))
    topk = TopK()
    shape = {"K": topk.k, "BLOCK": topk.block}
    power = {"K_POWER": triton.next_power_of_2(topk.k)}
    for label, state in (("memory", MEMORY), ("direct", DIRECT)):
        encode = {"value": BF16, "memory": BF16, "values": INT16, "indexes": INT16}
        decode = {"values": INT16, "indexes": INT16, "memory": BF16, "out": BF16}
        found.append((f"topk {label}", sparse.encode_kernel, encode, {**shape, **state}))
        found.append((f"topk {label}", sparse.decode_kernel, decode, {**shape, **power, **state}))
    return found


def compiled(
    kernel: Any, types: dict[str, str], constants: dict[str, Any], target: GPUTarget
) -> CompiledKernel:
    names = kernel.arg_names
    signature = {**types, "num_values": "i64", **dict.fromkeys(constants, "constexpr")}
    aligned = {(names.index(name),): [["tt.divisibility", 16]] for name in types}
    constant_values = {(names.index(name),): value for name, value in constants.items()}
    ordered = {name: signature[name] for name in names}
    return triton.compile(ASTSource(kernel, ordered, constant_values, aligned), target=target)


def num_spills(kernel: CompiledKernel, target: GPUTarget) -> int:
    """Spilled registers, as the assembler or the compiler's own metadata counts them."""
    if target.backend == "hip":
        return sum(map(int, re.findall(r"[sv]gpr_spill_count:\s+(\d+)", kernel.asm["amdgcn"])))
    ptxas = get_ptxas(target.arch).path
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "kernel.ptx"
        source.write_text(kernel.asm["ptx"])
        suffix = "a" if target.arch >= 90 else ""
        command = [
            ptxas,
            "-v",
            f"--gpu-name=sm_{target.arch}{suffix}",
            source,
            "-o",
            f"{folder}/kernel.cubin",
        ]
        log = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    found = re.findall(r"(\d+) bytes spill (?:stores|loads)", log)
    if not found:
        raise RuntimeError(f"ptxas reported no spills, not even zero:\n{log}")
    return sum(map(int, found))


def main() -> int:
    total = 0
    for label, kernel, types, constants in variants():
        for target in TARGETS:
            spills = num_spills(compiled(kernel, types, constants, target), target)
            total += spills
            print(f"{label} {kernel.__name__} {target.arch}: {spills} spills", flush=True)
    return int(total > 0)


if __name__ == "__main__":
    sys.exit(main())
