"""Every command of README and docs is in the list of those that are run, or says why it is not."""

import importlib.util
import re

import pytest

from tests.commands.documented import PAGES, ROOT, RULES, Elsewhere, Here, adapt, find_rule, list_commands
from tests.core.test_recipes import long_options, options_of

TARGETS = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
WITH_OPTIONS = re.compile(r"`python -m (?!pytest)([\w.]+)( [^`]*--[^`]*)`")
MENTIONED = re.compile(
    r"`(?:[A-Z_0-9]+=\S+ )*(?:python -m|make|torchrun .*? -m|deepspeed .*?--module) ([\w.-]+)"
)


COMMANDS = [command for page in PAGES for command in list_commands(page)]


def test_every_command_has_a_rule_and_every_rule_a_command():
    assert len(COMMANDS) > 80
    assert {find_rule(command) for command in COMMANDS} == set(RULES)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: f"{page.parent.name}/{page.stem}")
def test_what_a_page_mentions_exists(page):
    for name in MENTIONED.findall(page.read_text()):
        assert name in TARGETS or name == "pytest" or importlib.util.find_spec(name) is not None, name


def test_options_in_running_text_exist():
    found = [(name, text) for page in PAGES for name, text in WITH_OPTIONS.findall(page.read_text())]
    assert len(found) >= 3
    for module, text in found:
        assert long_options(text.split()) <= options_of(module), (module, text)


def test_what_is_changed_is_in_the_command():
    for command in COMMANDS:
        how = RULES[find_rule(command)]
        if isinstance(how, Here) and how.changes:
            assert adapt(command, how) != command, command


def test_what_is_recorded_is_there():
    names = [
        how.why.split()[-1] for how in RULES.values() if isinstance(how, Elsewhere) and "recorded" in how.why
    ]
    assert names and all((ROOT / "benchmarks" / "results" / name).exists() for name in names)


def test_nodes_run_beside_each_other():
    command = adapt("launch --node_rank 0", Here(num_nodes=2))
    assert command == (
        "launch --node_rank 0 & nodes+=($!); launch --node_rank 1 & nodes+=($!); "
        "wait ${nodes[0]} || failed=1; wait ${nodes[1]} || failed=1; exit ${failed:-0}"
    )
