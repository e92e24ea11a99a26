"""Data goes one way: which module may import which, and which host, is checked here."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "clapping_ds"
FILES = sorted(PACKAGE.rglob("*.py"))
MAY_IMPORT = {
    "codecs": {"codecs"},
    "config": {"codecs"},
    "sampling": set(),
    "transport": set(),
    "schedule": set(),
    "links": {"codecs", "config", "schedule", "telemetry"},
    "measurement": {"channel", "message", "codecs", "config", "links", "transport"},
    "telemetry": {"codecs", "config", "channel", "message"},
    "message": {"codecs"},
    "verification": {"codecs"},
    "channel": {"message", "verification", "codecs", "config", "sampling", "telemetry"},
    "engines": {
        *("__version__", "codecs", "config", "channel", "message", "sampling", "schedule", "telemetry"),
        *("transport", "links", "measurement", "engines"),
    },
    "run": {"enable"},
    "__init__": {"config", "engines"},
}


def imports(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports(path):
    part = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
    for name in imports(path):
        words = name.split(".")
        if words[0] == "clapping_ds":
            assert words[1] in MAY_IMPORT[part], f"{path.name} imports {name}"
        if name.startswith("torch.distributed.pipelining"):  # a host
            assert part == "engines"
        elif name.startswith("torch.distributed"):
            assert part == "transport"
        if words[0] in ("deepspeed", "megatron"):
            assert part == "engines" and path.name.startswith(words[0])
        if words[0] == "megatron":
            assert path.name == "megatron_host.py"


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_files_are_short(path):
    assert len(path.read_text().splitlines()) <= 300


def test_importing_the_package_imports_no_host():
    hosts = "{'deepspeed', 'megatron', 'torch.distributed.pipelining'}"
    code = f"import sys, clapping_ds; assert not {hosts} & sys.modules.keys()"
    subprocess.run([sys.executable, "-c", code], check=True)
