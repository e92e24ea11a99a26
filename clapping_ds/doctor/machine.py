"""What one process sees of its machine, without the other ranks."""

import json
import os
import platform
import shutil
import socket
import tempfile
import time
from collections.abc import Iterator, Sequence
from importlib.metadata import PackageNotFoundError, metadata, version
from pathlib import Path
from typing import Any

import torch
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

import clapping_ds
from clapping_ds.codecs import bits_per_value
from clapping_ds.config import BLOCK_NAME, ClappingConfig
from clapping_ds.doctor.visit import Finding, Visit, fail, ok, skip, sum_up, warn
from clapping_ds.stage.handshake import PACKAGES

GIB = 1 << 30
SHARED_MEMORY = Path("/dev/shm")
LEAST_SHARED_MEMORY_GIB = 0.25
"""Docker's default is 0.06, of which NCCL's buffers between the GPUs of a machine need more."""

STALE_S = 1800
"""After which a build's lock is most likely of one that was interrupted: DeepSpeed's take minutes."""


# Versions


def check_versions(visit: Visit) -> Finding:
    """Of what the package stands on, against what it accepts. Facts: each version by name."""
    found = {"Python": platform.python_version(), "clapping_ds": clapping_ds.__version__}
    found |= {package: _find_version(package) for package in PACKAGES}
    build = _find_build()
    builds = {"torch": f" ({build or 'a CPU build'})"}
    text = ", ".join(f"{name} {number}{builds.get(name, '')}" for name, number in found.items())
    problems = [*_find_unmet(found), *_find_refused()]
    return sum_up(text, problems, {**found, "build of torch": build})


def _find_build() -> str | None:
    cuda, hip = torch.version.cuda, torch.version.hip
    return f"CUDA {cuda}" if cuda else f"HIP {hip}" if hip else None


def _find_version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


def _find_unmet(found: dict[str, str]) -> Iterator[Finding]:
    try:
        declared = metadata("clapping_ds")
    except PackageNotFoundError:
        yield warn("clapping_ds is not installed, so nothing says what it accepts", "pip install it")
        return
    accepted = declared["Requires-Python"]
    if not SpecifierSet(accepted).contains(found["Python"], prereleases=True):
        yield fail(f"Python {found['Python']}", f"accepted: {accepted}")
    for requirement in map(Requirement, declared.get_all("Requires-Dist") or []):
        has = _find_version(requirement.name)
        is_met = has != "not installed" and requirement.specifier.contains(has, prereleases=True)
        if is_met or requirement.name == "clapping_ds":
            continue
        if requirement.marker is None or requirement.marker.evaluate({"extra": ""}):
            yield fail(f"{requirement.name} {has}", f"accepted: {requirement.specifier}")
        elif requirement.name in PACKAGES and has != "not installed":
            yield warn(f"{requirement.name} {has}", f"its host accepts {requirement.specifier}")


def _find_refused() -> Iterator[Finding]:
    """The host whose limits are tighter than those of the package."""
    try:
        _ = clapping_ds.ClappingStage
    except ImportError as error:
        yield warn(str(error), "the other hosts are not concerned")


def compare_versions(facts: Sequence[dict[str, Any]]) -> Finding | None:
    differing = [name for name in facts[0] if len({str(found[name]) for found in facts}) > 1]
    if not differing:
        return None
    texts = [f"{name}: {', '.join(sorted({str(found[name]) for found in facts}))}" for name in differing]
    return fail(f"the ranks differ in {'; '.join(texts)}", "install the same on every machine")


# Devices


def check_device(visit: Visit) -> Finding:
    """Takes the GPU of this rank, before any process group is made. Facts: (host, GPU), or (host, None)."""
    host, num_gpus, local_rank = socket.gethostname(), torch.cuda.device_count(), visit.launch.local_rank
    if num_gpus == 0:
        return warn("no GPU", "this is a check of CPU ranks", (host, None))
    index = 0 if num_gpus == 1 else local_rank  # a launcher may show each rank its own GPU alone
    if index >= num_gpus:
        return fail(
            f"LOCAL_RANK = {local_rank} on {host}, where {num_gpus} GPUs are seen "
            f"(CUDA_VISIBLE_DEVICES = {os.environ.get('CUDA_VISIBLE_DEVICES')!r})",
            "start as many ranks on a machine as it has GPUs",
        )
    visit.device = torch.device("cuda", index)
    torch.cuda.set_device(visit.device)
    properties = torch.cuda.get_device_properties(visit.device)
    free_gib, total_gib = (num_bytes / GIB for num_bytes in torch.cuda.mem_get_info(visit.device))
    text = (
        f"{num_gpus} GPUs on {host}, {properties.name}, compute capability "
        f"{properties.major}.{properties.minor}, {free_gib:.0f} of {total_gib:.0f} GiB free"
    )
    return ok(text, (host, str(getattr(properties, "uuid", index))))


def compare_devices(facts: Sequence[tuple[str, str | None]]) -> Finding | None:
    """Each rank has a GPU of its own, or none has one."""
    ranks: dict[tuple[str, str | None], list[int]] = {}
    for number, place in enumerate(facts):
        ranks.setdefault(place, []).append(number)
    without = [host for host, gpu in ranks if gpu is None]
    if without and len(without) < len(ranks):
        return fail(f"no GPU on {', '.join(without)}, but on other hosts", "all ranks need one, or none")
    shared = [f"{users} on {host}" for (host, gpu), users in ranks.items() if gpu is not None and users[1:]]
    if not shared:
        return None
    return fail(
        f"one GPU is used by the ranks {'; '.join(shared)}",
        "start them with a launcher that sets LOCAL_RANK, and let each see all GPUs of its machine",
    )


# Environment


def check_connections(visit: Visit) -> Finding:
    """CUDA's queues from host to GPU."""
    value = os.environ.get("CUDA_DEVICE_MAX_CONNECTIONS")
    if visit.device.type == "cpu":
        return skip("CPU ranks do not use CUDA_DEVICE_MAX_CONNECTIONS")
    if value is None:
        return ok("CUDA_DEVICE_MAX_CONNECTIONS is not set, which is fine")
    if value != "1":
        return ok(f"CUDA_DEVICE_MAX_CONNECTIONS = {value}")
    return warn(
        "CUDA_DEVICE_MAX_CONNECTIONS = 1: work on side streams can be queued behind other work, which is "
        "correct but loses overlap",
        "do not set it, unless what you train with needs it",
    )


def check_threads(visit: Visit) -> Finding:
    """Of CPU ranks, whose codecs are computed by them."""
    if visit.device.type != "cpu":
        return skip("only CPU ranks compute codecs in threads")
    num_cores, num_ranks = len(os.sched_getaffinity(0)), visit.hosts.count(socket.gethostname())
    value, most = os.environ.get("OMP_NUM_THREADS", ""), max(1, num_cores // num_ranks)
    here = f"{num_cores} cores for {num_ranks} of the ranks"
    if not value.isdecimal():
        return warn(f"OMP_NUM_THREADS is not set, {here}", f"set it to {most} or less")
    if int(value) > most:
        return warn(f"OMP_NUM_THREADS = {value}, {here}", f"set it to {most} or less")
    return ok(f"OMP_NUM_THREADS = {value}, {here}")


# The block and what it needs


def check_block(visit: Visit) -> Finding:
    """The user's JSON, and what its block will cost. Facts: what the block means, as JSON."""
    path = visit.config_path
    if path is None:
        return skip("no --config")
    accepted = f'accepted: a JSON file with {{"{BLOCK_NAME}": {{...}}}}'
    try:
        told = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        return fail(f"{path} cannot be read ({error})", accepted)
    if not isinstance(told, dict):
        return fail(f"{path} is no JSON object", accepted)
    try:
        visit.config = config = ClappingConfig.from_ds_config(told)
    except ValueError as error:
        return fail("; ".join(str(error).splitlines()), "docs/configuration.md has all keys")
    if not config.enabled:
        why = '"enabled" is false' if BLOCK_NAME in told else f'{path} has no "{BLOCK_NAME}" block'
        return warn(f"nothing is compressed: {why}", "this is the stock engine", config.model_dump_json())
    return ok(_describe_cost(config, _find_dtype(told)), config.model_dump_json())


def _find_dtype(ds_config: dict[str, Any]) -> torch.dtype:
    """What stages send, by DeepSpeed's keys."""
    on = [name for name in ("fp16", "bf16") if (ds_config.get(name) or {}).get("enabled")]
    return {"fp16": torch.float16, "bf16": torch.bfloat16}[on[0]] if on else torch.float32


def _describe_cost(config: ClappingConfig, dtype: torch.dtype) -> str:
    raw_bits, costs = dtype.itemsize * 8, []
    for direction, plan in config.plans.items():
        mean = plan.mean_bits_per_value(dtype)
        start = ""
        if plan.start is not None:
            bits = bits_per_value(plan.start, dtype)
            start = f" after {plan.start_steps} steps with {bits:.4g}"
        costs.append(
            f"{direction} {mean:.4g} of {raw_bits} bits per value ({raw_bits / mean:.3g}x less){start}"
        )
    if config.data_parallel is not None:
        legs = config.data_parallel.scatter, config.data_parallel.gather
        both = " and ".join(f"{bits_per_value(codec, torch.float32):.4g}" for codec in legs)
        costs.append(f"gradients of replicas {both} of 32")
    return f"strategy {config.strategy}: {', '.join(costs)}"


def compare_blocks(facts: Sequence[str | None]) -> Finding | None:
    if len(set(facts)) == 1:
        return None
    return fail("the ranks have different blocks", "give the same file to every rank")


def check_files(visit: Visit) -> Finding:
    """Folders in which kernels are kept, shared memory, a compiler where the block wants one, and builds of
    extensions (DeepSpeed's, for one) that were interrupted: every later process waits for their lock."""
    on_gpu, compiles = visit.device.type != "cpu", visit.config is not None and visit.config.compile
    home = Path(os.environ.get("TRITON_HOME") or Path.home())
    kernels = Path(os.environ.get("TRITON_CACHE_DIR") or home / ".triton" / "cache")
    folders = [*([kernels] if on_gpu else []), Path(tempfile.gettempdir())]
    compiler = os.environ.get("CXX", "g++")
    problems = [
        fail(f"{folder} cannot be written", "set TRITON_CACHE_DIR or TMPDIR to a folder that can")
        for folder in folders
        if not _is_writable(folder)
    ]
    problems += [
        warn(f"{lock} is old", "delete it, unless a build is running: what needs it waits without a word")
        for lock in _list_stale_locks()
    ]
    if compiles and shutil.which(compiler) is None:
        problems.append(fail(f"no C++ compiler {compiler!r}", 'install one, or leave "compile" out'))
    texts = [f"{', '.join(map(str, folders))} can be written"] if not problems else []
    if on_gpu and SHARED_MEMORY.exists():
        free_gib = shutil.disk_usage(SHARED_MEMORY).free / GIB
        texts.append(f"{free_gib:.1f} GiB of {SHARED_MEMORY} free")
        if free_gib < LEAST_SHARED_MEMORY_GIB:
            problems.append(warn("NCCL may lack shared memory", "docker run --shm-size=1g, or --ipc=host"))
    if compiles:
        texts.append(f"C++ compiler {shutil.which(compiler)}")
    return sum_up("; ".join(texts), problems)


def _list_stale_locks() -> list[Path]:
    """Of torch's folder of extensions for this Python, where each build has one while it runs."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    folder = Path(os.environ.get("TORCH_EXTENSIONS_DIR") or cache / "torch_extensions")
    major, minor, _ = platform.python_version_tuple()
    locks = [*folder.glob("*/lock"), *folder.glob(f"py{major}{minor}_*/*/lock")]
    return sorted(lock for lock in locks if _find_age_s(lock) > STALE_S)


def _find_age_s(path: Path) -> float:
    """Of a file; 0 of one that is gone."""
    try:
        return time.time() - path.stat().st_mtime
    except OSError:
        return 0.0


def _is_writable(folder: Path) -> bool:
    """Whether a file can be made there, or the folder can."""
    try:
        existing = next(place for place in (folder, *folder.parents) if place.exists())
        with tempfile.TemporaryFile(dir=existing):
            return True
    except OSError:
        return False
