"""What docs/recipes tells a user to type is there: modules, options, files, keys."""

import ast
import importlib.util
import json
import re
import shlex
import subprocess
import sys
from dataclasses import fields
from functools import cache
from itertools import pairwise
from pathlib import Path

import pytest
import yaml

from clapping_ds import ClappingConfig
from launch.finetuning import Finetuning

ROOT = Path(__file__).parents[2]
PAGES = sorted((ROOT / "docs" / "recipes").glob("*.md"))
LAUNCHERS = {"deepspeed": "deepspeed.launcher.runner", "torchrun": "torch.distributed.run"}
OPTION = re.compile(r"--[a-z][\w-]*")
OURS = re.compile(r"`((?:launch|patches|clapping_ds|docs|tests)/[\w./-]+)`")
CONFIGS = ("--deepspeed_config", "--config", "--clapping-config")
SCRIPT_PATCHED = "patches.megatron_lm"
every_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)


def blocks(page, language):
    return re.findall(rf"^```{language}\n(.*?)^```$", page.read_text(), re.MULTILINE | re.DOTALL)


def documents(page):
    """Of its YAML."""
    return [document for block in blocks(page, "yaml") for document in yaml.safe_load_all(block)]


def scalars(node):
    """All strings in a YAML document."""
    if isinstance(node, str):
        yield node
    children = node.values() if isinstance(node, dict) else node if isinstance(node, list) else ()
    for child in children:
        yield from scalars(child)


def commands(page):
    """Of every shell block, and of the scripts in YAML: words of each command of ours or of a launcher."""
    texts = blocks(page, "sh") + [text for node in documents(page) for text in scalars(node) if "\n" in text]
    for text in texts:
        text = re.sub(r"^ *#.*$", "", text.replace("\\\n", " "), flags=re.MULTILINE)
        text = text.replace("bash -c '", "\n").replace("$((", "(").replace("exec python", "\npython")
        for line in text.splitlines():
            found = re.search(r"(?:^|\s|')((?:deepspeed|torchrun|python(?: -m)?) .*)", line)
            if found and "venv" not in line:
                yield shlex.split(found[1].strip().rstrip("'"))


@cache
def options_of(module):
    """Long options that a module's `--help` names, with hyphens."""
    run = subprocess.run(
        [sys.executable, "-m", module, "--help"], capture_output=True, text=True, cwd=ROOT, timeout=120
    )
    assert run.returncode == 0, run.stderr[-2000:]
    return {with_hyphens(option) for option in OPTION.findall(run.stdout)}


def with_hyphens(option):
    return option.split("=")[0].replace("_", "-")


def options_of_script(page, name):
    """Of a script that stands on a page: fields of its Options, and those of `launch.finetune`."""
    (source,) = (block for block in blocks(page, "python") if "torch.distributed" in block)
    assert name in page.read_text()
    found = {item.name for item in fields(Finetuning)}
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ClassDef):
            found |= {
                item.target.id
                for item in node.body
                if isinstance(item, ast.AnnAssign) and isinstance(item.target, ast.Name)
            }
    return {f"--{name.replace('_', '-')}" for name in found}


def long_options(words):
    return {with_hyphens(word) for word in words if OPTION.match(word)}


def split(words):
    """(options of the launcher, module or None, script or None, options of it) of a command."""
    launcher, rest = words[0], words[1:]
    at = next(
        (i for i, word in enumerate(rest) if word in ("-m", "--module") or word.endswith(".py")), len(rest)
    )
    if at == len(rest):
        return launcher, long_options(rest), None, None, set()
    is_script = rest[at].endswith(".py")
    module, script = (None, rest[at]) if is_script else (rest[at + 1], None)
    return (
        launcher,
        long_options(rest[:at]),
        module,
        script,
        long_options(rest[at + (1 if is_script else 2) :]),
    )


def home_of(script):
    """The page on which a script stands."""
    return next(page for page in PAGES if f"`{script}`, in" in page.read_text())


def test_there_are_recipes():
    assert [page.stem for page in PAGES] == ["kubernetes", "megatron-lm", "skypilot", "slurm", "two-pcs"]
    assert all(list(commands(page)) for page in PAGES)


@every_page
def test_modules_and_their_options_exist(page):
    for words in commands(page):
        launcher, before, module, script, given = split(words)
        if launcher in LAUNCHERS:
            assert before <= options_of(LAUNCHERS[launcher]), words
        if script is not None:
            assert given <= options_of_script(home_of(script), script), words
        elif module == SCRIPT_PATCHED:  # what follows is Megatron-LM's
            assert "--clapping-config" in given
        elif module is not None:
            assert importlib.util.find_spec(module) is not None, module
            assert given <= options_of(module), (module, given - options_of(module))


@every_page
def test_json_is_accepted(page):
    texts = blocks(page, "json") + [
        text for node in documents(page) for text in scalars(node) if text[0] == "{"
    ]
    for text in texts:
        config = json.loads(text)
        assert ClappingConfig.from_ds_config(config).enabled
    assert texts or page.stem == "slurm"


@every_page
def test_yaml_and_python_can_be_read(page):
    for document in documents(page):
        assert isinstance(document, dict)
    for source in blocks(page, "python"):
        compile(source, page.name, "exec")


@every_page
def test_files_exist(page):
    text = page.read_text()
    for target in re.findall(r"\]\(([^)#]+)[^)]*\)", text):
        assert target.startswith("http") or (page.parent / target).exists(), target
    for name in OURS.findall(text):
        assert (ROOT / name).exists(), name
    for words in commands(page):
        for option, name in pairwise(words):
            if option in CONFIGS:
                is_told = f"`{Path(name).name}`" in text or f"{Path(name).name}: |" in text
                assert (ROOT / name).exists() or is_told, name


@every_page
def test_anchors_exist(page):
    for target, anchor in re.findall(r"\]\(([^)#]*)#([^)]+)\)", page.read_text()):
        titles = re.findall(r"^#+ (.*)$", (page.parent / target).read_text(), re.MULTILINE)
        assert anchor in {re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in titles}, anchor


@every_page
def test_a_page_says_first_for_whom_it_is_and_what_has_not_run(page):
    title, whom, about, *_ = page.read_text().split("\n\n")
    assert title.startswith("# ") and whom.startswith("For ")
    assert about.startswith("**Run:**") and "nothing has run on a GPU" in about


def test_the_job_and_the_service_fit_together():
    (page,) = (page for page in PAGES if page.stem == "kubernetes")
    found = {document["kind"]: document for document in documents(page)}
    service, job = found["Service"], found["Job"]["spec"]
    pod = job["template"]["spec"]
    (container,) = pod["containers"]
    values = {item["name"]: item["value"] for item in container["env"]}
    name = found["Job"]["metadata"]["name"]
    assert service["spec"]["clusterIP"] == "None" and service["spec"]["selector"] == {"job-name": name}
    assert pod["subdomain"] == service["metadata"]["name"]
    assert values["MASTER_ADDR"] == f"{name}-0.{pod['subdomain']}"
    assert job["completions"] == job["parallelism"] == int(values["NUM_NODES"])
    assert {mount["name"] for mount in container["volumeMounts"]} == {each["name"] for each in pod["volumes"]}
    (config,) = (each["configMap"]["name"] for each in pod["volumes"] if "configMap" in each)
    assert config == found["ConfigMap"]["metadata"]["name"]
