"""What a compiled kernel does, read from the compiler's output and the disassembly. No GPU needed.

Three sources, each for what it says best:

* Triton's IR: the shape of every load and store, hence how many bytes a program moves through which
  argument, each counted once however many lanes hold a copy of it;
* LLVM's IR: which argument a load or store instruction of which width belongs to;
* the disassembly (SASS, or AMD's assembly): registers, spills, the instructions themselves and, as a
  check on LLVM's, the widths that were issued.
"""

import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from math import prod
from pathlib import Path
from typing import Any, NamedTuple

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, CompiledKernel

from benchmarks.kernels.variants import Variant

TARGETS = (GPUTarget("cuda", 80, 32), GPUTarget("cuda", 90, 32), GPUTarget("hip", "gfx942", 64))
NVIDIA_TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
UNKNOWN = "?"

TRITON_ACCESS = re.compile(r"\btt\.(load|store) (%\w+).*? : (?:tensor<([\dx]+)x)?!tt\.ptr<[a-z]+(\d+)")
TRITON_DEFINITION = re.compile(r"^\s*(%\w+) = (?:arith\.select %\w+, |[\w.]+ )(%\w+)", re.M)

# The three ways in which Triton's backends write a global access: inline PTX, AMD's buffer
# instructions, and LLVM's own load and store.
PTX_ACCESS = re.compile(r"(ld|st)\.global(?:\.L\w+::\w+)*(?:\.v(\d))?\.[bsuf](\d+)")
BUFFER_ACCESS = re.compile(r"@llvm\.amdgcn\.raw\.ptr\.buffer\.(load|store)\.(?:v(\d+))?[a-z]+(\d+)")
LLVM_ACCESS = re.compile(r"\b(load|store) (?:<(\d+) x )?([a-z]+\d*)\b.*?, ptr addrspace\(1\)")
LLVM_BITS = {"half": 16, "float": 32, "double": 64, "bfloat": 16}
LLVM_POINTER = re.compile(r"ptr addrspace\([18]\) (?:\[ |(?:\w+ )*)(%[\w.]+)")
LLVM_DEFINITION = re.compile(r"^\s*(%[\w.]+) = ")

SASS = re.compile(r"^\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+ +)?([A-Z]\w*)(\S*)", re.M)
SASS_BYTES = {"U8": 1, "S8": 1, "U16": 2, "S16": 2, "64": 8, "128": 16}
AMD = re.compile(r"^\s+((?:s|v|ds|global|buffer|flat|scratch)_\w+)", re.M)
AMD_ACCESS = re.compile(r"(?:global|buffer|flat)_(load|store)_\w*?(byte|short|dword(?:x\d)?)")
AMD_BYTES = {"byte": 1, "short": 2, "dword": 4, "dwordx2": 8, "dwordx3": 12, "dwordx4": 16}
LABEL = re.compile(r"^(\.L\w+):")
BRANCH = re.compile(r"\b(?:BRA|s_c?branch)\w*\b.*?(\.L\w+)")
ALWAYS_LEAVES = re.compile(r"\*/\s+(?:EXIT|BRA `)|\b(?:s_branch|s_endpgm)\b")


class Width(NamedTuple):
    """A load or store instruction of one thread."""

    is_store: bool
    num_bytes: int


class Access(NamedTuple):
    """A load or store instruction of one thread, and the kernel's argument that it goes to."""

    argument: str
    width: Width


def compiled(variant: Variant, target: GPUTarget) -> CompiledKernel:
    """The kernel as Triton compiles it when the codec launches it."""
    names = variant.kernel.arg_names
    types = {name: variant.types.get(name, "constexpr") for name in names}
    constants = {(names.index(name),): value for name, value in variant.constants.items()}
    attributes: dict[tuple[int], list[list[Any]]] = {}
    for name in variant.aligned:
        attributes[(names.index(name),)] = [["tt.divisibility", 16]]
        if target.backend == "hip" and types[name].startswith("*"):
            # Tensors below 2 GiB: the AMD backend may then use its buffer instructions.
            attributes[(names.index(name),)].append(["tt.pointer_range", 32])
    source = ASTSource(variant.kernel, types, constants, attributes)
    # The launchers ask for as many threads whatever the warp size; recorded here with 32 lanes.
    num_warps = max(1, variant.options.get("num_warps", 4) * 32 // target.warp_size)
    return triton.compile(source, target=target, options={**variant.options, "num_warps": num_warps})


@dataclass(frozen=True)
class Code:
    """One variant compiled for one target."""

    variant: Variant
    target: GPUTarget
    kernel: CompiledKernel

    @property
    def is_amd(self) -> bool:
        return self.target.backend == "hip"

    @property
    def num_threads(self) -> int:
        """Of one program."""
        return self.kernel.metadata.num_warps * self.target.warp_size

    @property
    def shared_bytes(self) -> int:
        """Of one program."""
        return self.kernel.metadata.shared

    @cached_property
    def registers(self) -> int:
        """Of one thread; on AMD vector registers."""
        if self.is_amd:
            return self._amd_metadata("vgpr_count")
        usage = self._nvidia_tool("cuobjdump", "--dump-resource-usage")
        return int(re.findall(r"REG:(\d+)", usage)[0])

    @cached_property
    def spills(self) -> int:
        """Instructions that access local memory; on AMD registers that were spilled."""
        if self.is_amd:
            return self._amd_metadata("vgpr_spill_count") + self._amd_metadata("sgpr_spill_count")
        return self.instructions["LDL"] + self.instructions["STL"]

    @cached_property
    def disassembly(self) -> str:
        """Without what stands behind the kernel's last exit: padding, and functions that it calls only
        in rare cases, such as a division's slow path."""
        if self.is_amd:
            return self.kernel.asm["amdgcn"].split(".Lfunc_end", 1)[0]
        own = self._nvidia_tool("nvdisasm", "--print-code").split("\n$", 1)[0]
        return own[: own.rindex("EXIT") + len("EXIT")]

    @cached_property
    def instructions(self) -> Counter[str]:
        """Executed by one thread, by name: those of the loop once per trip."""
        found: Counter[str] = Counter()
        for block, lines in self._blocks[0].items():
            text = "\n".join(lines)
            names = AMD.findall(text) if self.is_amd else [name for name, _ in SASS.findall(text)]
            num_times = self.variant.num_trips if block in self.loop else 1
            for name in names:
                found[name] += num_times * (name != "NOP")
        return found

    @cached_property
    def loop(self) -> set[str]:
        """The blocks of the disassembly that can follow themselves."""
        edges = self._blocks[1]
        looped = set()
        for start in edges:
            seen: set[str] = set()
            waiting = list(edges[start])
            while waiting:
                block = waiting.pop()
                if block not in seen:
                    seen.add(block)
                    waiting.extend(edges[block])
            if start in seen:
                looped.add(start)
        return looped

    @cached_property
    def _blocks(self) -> tuple[dict[str, list[str]], dict[str, set[str]]]:
        """The lines of each block, by its label, and which blocks follow which."""
        lines: dict[str, list[str]] = {"": []}
        edges: dict[str, set[str]] = {"": set()}
        block, falls_through = "", True
        for line in self.disassembly.splitlines():
            label = LABEL.match(line)
            if label:
                if falls_through:
                    edges[block].add(label[1])
                block, falls_through = label[1], True
                lines[block], edges[block] = [], set()
            else:
                lines[block].append(line)
                if falls_through:
                    edges[block].update(BRANCH.findall(line))
                    falls_through = not ALWAYS_LEAVES.search(line)
        return lines, edges

    @cached_property
    def widths(self) -> Counter[Width]:
        """Global loads and stores of one thread, from the disassembly."""
        if self.is_amd:
            found = AMD_ACCESS.findall(self.disassembly)
            return Counter(Width(kind == "store", AMD_BYTES[size]) for kind, size in found)
        accesses = [line for line in SASS.findall(self.disassembly) if line[0] in ("LDG", "STG")]
        return Counter(Width(name == "STG", _sass_bytes(suffix)) for name, suffix in accesses)

    @cached_property
    def accesses(self) -> Counter[Access]:
        """The same from LLVM's IR, by argument; `a|b` where it is one of these."""
        origin = {f"%{index}": name for index, name in enumerate(self.variant.types)}
        found: Counter[Access] = Counter()
        definition_start = self.kernel.asm["llir"].index("define ")
        for line in self.kernel.asm["llir"][definition_start:].split("\n}", 1)[0].splitlines():
            pointer = LLVM_POINTER.search(line.rsplit('"(', 1)[-1])
            argument = origin.get(pointer[1], UNKNOWN) if pointer else UNKNOWN
            definition = LLVM_DEFINITION.match(line)
            if definition and pointer:
                origin.setdefault(definition[1], argument)
            width = _llvm_width(line)
            if width:
                found[Access(argument, width)] += 1
        # A pointer that changed threads through shared memory has lost its origin.
        for access in [access for access in found if access.argument == UNKNOWN]:
            rest = self._rest(found, access.width.is_store)
            found[access._replace(argument=rest)] += found.pop(access)
        return found

    @cached_property
    def tile_bytes(self) -> Counter[tuple[str, bool]]:
        """By argument and whether it is a store: bytes that one full program moves, lanes with copies
        counted once."""
        text = self.kernel.asm["ttir"]
        origin = dict(TRITON_DEFINITION.findall(text))
        found: Counter[tuple[str, bool]] = Counter()
        loop_end = ""
        for line in text.splitlines():
            if "scf.for " in line:
                loop_end = line[: len(line) - len(line.lstrip())] + "}"
            elif loop_end and line.startswith(loop_end):
                loop_end = ""
            for kind, pointer, shape, bits in TRITON_ACCESS.findall(line):
                while pointer in origin:
                    pointer = origin[pointer]
                num_elements = prod(int(size) for size in shape.split("x") if size)
                num_bytes = num_elements * int(bits) // 8 * (self.variant.num_trips if loop_end else 1)
                found[pointer.removeprefix("%"), kind == "store"] += num_bytes
        return found

    def _rest(self, found: Counter[Access], is_store: bool) -> str:
        """The arguments that the kernel does access so, but by none of `found`; joined by `|`."""
        seen = {access.argument for access in found if access.width.is_store == is_store}
        left = [name for name, store in self.tile_bytes if store == is_store and name not in seen]
        return "|".join(left) or UNKNOWN

    def _amd_metadata(self, name: str) -> int:
        return int(re.findall(rf"\.{name}:\s+(\d+)", self.kernel.asm["amdgcn"])[0])

    def _nvidia_tool(self, name: str, option: str) -> str:
        with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
            file.write(self.kernel.asm["cubin"])
            file.flush()
            command = [str(NVIDIA_TOOLS / name), option, file.name]
            return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def analysed(variants: list[Variant], targets: tuple[GPUTarget, ...] = TARGETS) -> Iterator[Code]:
    """Every variant compiled for every target."""
    for variant in variants:
        for target in targets:
            yield Code(variant, target, compiled(variant, target))


def _sass_bytes(suffix: str) -> int:
    """`.E.128` is 16 bytes, `.E` without a size 4."""
    return next((SASS_BYTES[part] for part in suffix.split(".") if part in SASS_BYTES), 4)


def _llvm_width(line: str) -> Width | None:
    """The global access in a line of LLVM's IR, if there is one."""
    match = PTX_ACCESS.search(line) or BUFFER_ACCESS.search(line)
    if match:
        kind, lanes, bits = match.groups()
        return Width(kind.startswith("st"), int(lanes or 1) * int(bits) // 8)
    match = LLVM_ACCESS.search(line)
    if match:
        kind, lanes, scalar = match.groups()
        bits = LLVM_BITS.get(scalar) or int(scalar.removeprefix("i"))
        return Width(kind == "store", int(lanes or 1) * int(bits) // 8)
    return None
