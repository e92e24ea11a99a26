"""Data goes one way: which module may import which, and which host, is checked here."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "clapping_ds"
FILES = sorted(PACKAGE.rglob("*.py"))

LAYERS = (
    *("version", "streams", "codecs/base", "codecs/reference", "codecs/kernels", "codecs", "config", "crnet"),
    *(
        "link",
        "bilevel",
        "report",
        "gradients",
        "stage",
        "autotune",
        "plan",
        "hosts",
        "__init__",
        "run",
        "doctor",
    ),
)
"""From the bottom to the top: each may import itself and those before it. A tensor goes the other way, from
the host through stage and channel to codec and wire."""
OPTIONAL = {"triton": "codecs/kernels", "deepspeed": "hosts/deepspeed", "megatron": "hosts/megatron/core"}
"""What may be missing on a user's machine, and the one place that imports it."""
HOST_OF_TORCH = tuple(
    f"torch.distributed.{part}" for part in ("pipelining", "algorithms.ddp_comm_hooks", "GradBucket")
)
TORCH_DISTRIBUTED = ("link/wire", "link/groups", "link/collective")


def name_of(path):
    return path.relative_to(PACKAGE).with_suffix("").as_posix()


def layer_of(name):
    """The longest layer that a module is of; modules of the root are layers of their own."""
    return max((layer for layer in LAYERS if f"{name}/".startswith(f"{layer}/")), key=len)


def imported(path):
    """All that a file imports, also inside functions, by full name."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def of_package(path):
    """The modules of the package that a file imports."""
    modules = {name_of(file) for file in FILES}
    for name in imported(path):
        found = name.replace(".", "/").removeprefix("clapping_ds/")
        if name.startswith("clapping_ds."):
            parts = found.split("/")
            candidates = ["/".join(parts[:n]) for n in range(len(parts), 0, -1)]
            yield next(
                (
                    module
                    for candidate in candidates
                    for module in (candidate, f"{candidate}/__init__")
                    if module in modules
                ),
                "__init__",
            )


def circle(graph):
    """The modules of a circle, or None."""
    done, path = set(), []

    def visit(module):
        if module in path:
            return path[path.index(module) :]
        if module not in done:
            path.append(module)
            for other in graph[module]:
                found = visit(other)
                if found:
                    return found
            done.add(path.pop())
        return None

    return next(filter(None, map(visit, graph)), None)


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_a_layer_imports_itself_and_those_below(path):
    mine = LAYERS.index(layer_of(name_of(path)))
    for module in of_package(path):
        assert LAYERS.index(layer_of(module)) <= mine, f"{name_of(path)} imports {module}"


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_what_may_be_missing_is_imported_in_one_place(path):
    name = name_of(path)
    for target in imported(path):
        for package, place in OPTIONAL.items():
            if target.split(".")[0] == package:
                assert f"{name}/".startswith(f"{place}/"), f"{name} imports {target}"
        if target.startswith(HOST_OF_TORCH):
            assert name.startswith("hosts/torch/")
        elif target.startswith("torch.distributed"):
            assert name in TORCH_DISTRIBUTED, f"{name} imports {target}"
    for host in ("deepspeed", "megatron", "torch"):
        for module in of_package(path):
            if module.startswith(f"hosts/{host}/"):
                assert name.startswith((f"hosts/{host}/", "__init__")), f"{name} imports {module}"


def test_there_is_no_circle():
    graph = {name_of(path): sorted(set(of_package(path)) - {name_of(path)}) for path in FILES}
    assert circle(graph) is None


def test_a_circle_would_be_found():
    assert circle({"a": ["b"], "b": ["c"], "c": ["b"], "d": []}) == ["b", "c"]
    assert circle({"a": ["b", "c"], "b": ["c"], "c": []}) is None


def test_no_two_files_of_codecs_have_one_name():
    names = [path.name for path in (PACKAGE / "codecs").rglob("*.py") if path.name != "__init__.py"]
    assert len(names) == len(set(names))


def test_importing_the_package_imports_no_host_and_no_triton():
    missing = "{'deepspeed', 'megatron', 'torch.distributed.pipelining', 'triton'}"
    code = f"import sys, clapping_ds; clapping_ds.ClappingConfig; assert not {missing} & sys.modules.keys()"
    subprocess.run([sys.executable, "-c", code], check=True)
