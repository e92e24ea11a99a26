"""What the README says of the code is so."""

import ast
import json
import re
from pathlib import Path

from clapping_ds import ClappingConfig

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()


def functions(path):
    """Lines of every function and class of a file, decorators included, by name."""
    found = {}
    for node in ast.parse(path.read_text()).body:
        for inner, name in [(node, "")] + [(child, f"{node.name}.") for child in getattr(node, "body", [])
                                           if isinstance(node, ast.ClassDef)]:  # fmt: skip
            if isinstance(inner, ast.ClassDef | ast.FunctionDef):
                first = min([inner.lineno, *(decorator.lineno for decorator in inner.decorator_list)])
                found[name + inner.name] = inner.end_lineno - first + 1
    return found


def test_the_path_of_a_tensor_is_as_long_as_it_says():
    (path,) = re.findall(r"```path\n(.*?)```", README, re.DOTALL)
    total, files = 0, path.strip().splitlines()
    for line in files:
        file, rest = line.split(maxsplit=1)
        found = functions(ROOT / "clapping_ds" / file)
        for name, number in (item.rsplit(" ", 1) for item in rest.split(", ")):
            assert found[name] == int(number), f"{file}: {name} has {found[name]} lines"
            total += found[name]
    assert len(files) <= 7
    assert total <= 400


def test_the_block_is_the_default():
    (block,) = re.findall(r"```json\n(.*?)```", README, re.DOTALL)
    config = ClappingConfig.from_ds_config(json.loads(f"{{{block}}}"))
    assert config.plans == ClappingConfig.from_ds_config({"clapping": {}}).plans


def test_links_lead_somewhere():
    for page in (
        ROOT / "README.md",
        ROOT / "CONTRIBUTING.md",
        *ROOT.glob("docs/*.md"),
        *ROOT.glob("patches/*.md"),
    ):
        for target in re.findall(r"\]\(([^)#]+)[^)]*\)", page.read_text()):
            if not target.startswith("http"):
                assert (page.parent / target).exists(), f"{page.name}: {target}"
