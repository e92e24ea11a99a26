"""Every message that a user can see has a row in docs/troubleshooting.md, and every row has a message."""

import ast
import re
from functools import cache
from pathlib import Path
from typing import NamedTuple

import pytest

from clapping_ds import ClappingConfig
from clapping_ds.gradients import averaging
from clapping_ds.run import USAGE
from clapping_ds.stage import endpoints

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "clapping_ds"
PAGE = ROOT / "docs" / "troubleshooting.md"
GAP = "\N{WHITE SQUARE}"
"""In a message, what varies."""
ANY = "..."
"""In a row, what varies."""
SAID = ("say", "report.say", "warnings.warn")
FOUND = ("fail", "warn")
"""In the doctor: of a text, and of what to do."""


def explain(*blocks):
    """What `from_ds_config` makes of wrong blocks."""
    for block in blocks:
        with pytest.raises(ValueError, match="accepted") as error:
            ClappingConfig.from_ds_config({"clapping": block})
        yield str(error.value)


COMPUTED = {
    ("config.py", r"'\n'.join(_explain(error))"): list(
        explain(
            {"strateg": 1}, {"gradients": {"codec": {}}}, {"gradients": {"codec": "eden9"}}, {"seed": "1"}
        )
    ),
    ("doctor/machine.py", "f'{requirement.name} {has}'"): [
        f"torch {GAP}: accepted: {GAP}",
        f"deepspeed {GAP}: its host accepts {GAP}",
    ],
    ("doctor/ranks.py", "str(error)"): [
        f"start: nothing from ranks {GAP} of {GAP} for {GAP} s: start all {GAP} with MASTER_ADDR={GAP}"
    ],
    ("doctor/visit.py", "self.store.get(gave_up).decode()"): [
        f"{GAP}: nothing from ranks {GAP} of {GAP} for {GAP} s"
    ],
    ("gradients/exchange.py", "f'{leg.direction} from rank {sender_rank}: {error}'"): [
        f"{leg} from rank {GAP}: {GAP}" for leg in ("scatter", "gather", "weights")
    ],
    ("gradients/exchange.py", "f\"rank {rank} has another {what} of {', '.join(differs)}\""): [
        f"rank {GAP} has another {what} of {GAP}" for what in ("mean", f"weight after step {GAP}")
    ],
    ("hosts/deepspeed/checkpoint.py", "f'{reason}: the next step is all fresh, and codecs learn anew'"): [
        f"{reason}: the next step is all fresh, and codecs learn anew"
        for reason in (endpoints.MISSING, endpoints.DIFFERENT)
    ],
    ("hosts/deepspeed/checkpoint.py", 'f"{reason}: what gradients\' codecs have kept back is lost"'): [
        f"{reason}: what gradients' codecs have kept back is lost"
        for reason in (averaging.MISSING, averaging.DIFFERENT)
    ],
    ("link/channel.py", "f'{place}: {error}'"): [f"link {GAP}, {GAP}, step {GAP}, slot {GAP}: {GAP}"],
    ("link/collective.py", "self._collective.describe(text)"): [
        f"{what}: one of the ranks {GAP} was silent for {GAP} s" for what in (averaging.WHAT, "gossip")
    ],
    ("link/collective.py", "self.describe(text, peer)"): [
        f"{what}: {who} {GAP} ended or was silent for too long ({GAP})"
        for what in (averaging.WHAT, "gossip")
        for who in ("rank", "one of the ranks")
    ],
    ("link/groups.py", r"'\n'.join(['the ranks differ; accepted: the same everywhere', *differences])"): [
        f"the ranks differ; accepted: the same everywhere\n{GAP}: {GAP}"
    ],
    ("link/verification.py", "'; '.join(wrong)"): [f"{GAP}: expected {GAP}, found {GAP}"],
    ("run.py", "usage"): [USAGE],
}
"""By file and expression: texts that are put together elsewhere."""
ALSO = {
    "doctor/visit.py": [f"rank {GAP}: {GAP}  FAIL  it was not done after {GAP} s"],
    "gradients/averaging.py": [averaging.MISSING, averaging.DIFFERENT],
    "gradients/rules.py": ["warmup_steps = 0: with Adam give those in which the learning rate rises, while"],
    "stage/endpoints.py": [endpoints.MISSING, endpoints.DIFFERENT],
}
"""By file: what is returned, or printed as a part of something else."""
EXEMPT = {
    ("__init__.py", "f'module {__name__!r} has no attribute {name!r}'"): "Python's text of a wrong name",
    (
        "codecs/base.py",
        "f'{name}: block {block} is larger than the tensor of shape {tuple(shape)}; accepted: a block of at "
        "most {num_values}'",
    ): "caught where gradients and gossip choose a codec; on links min_numel is at least a block",
    ("codecs/grouped.py", "NotImplementedError"): "of methods that every codec has",
    ("gradients/averaging.py", "rules.describe(self.plan, exchange.num_replicas, has_gather)"): "costs",
    ("gradients/averaging.py", "table"): "what was measured",
    ("hosts/deepspeed/engine.py", "decided"): "what was measured",
    ("link/groups.py", r"'\n'.join(_grouped(mistakes))"): "texts of checks, which are here by themselves",
    (
        "stage/endpoints.py",
        r"text if sampling.p_new == 1 else f'{text}\n{report.describe_sampling(sampling)}'",
    ): "costs",
}
"""By file and expression: what no user sees, or what is no problem; and why."""


class Message(NamedTuple):
    place: str
    text: str
    """As users see it, with a `GAP` for each thing that varies."""


class Names:
    """What a file calls its texts: constants, also of other files, and functions of one line."""

    def __init__(self, path):
        self.constants, self.functions = {}, {}
        for node in ast.parse(path.read_text()).body:
            match node:
                case ast.ImportFrom(module=str(module)) if module.startswith("clapping_ds."):
                    self._take(node, ROOT / f"{module.replace('.', '/')}.py")
                case ast.Assign(targets=[ast.Name(id=name)]):
                    self.constants[name] = self.read(node.value)
                case ast.FunctionDef(body=[ast.Return(value=value)] | [ast.Expr(), ast.Return(value=value)]):
                    self.functions[node.name] = value

    def _take(self, node, source):
        wanted = [each.name for each in node.names if each.name.isupper()]
        if wanted and source.exists():
            known = find_names(source).constants
            self.constants |= {name: known[name] for name in wanted if name in known}

    def read(self, node):
        """The text of an expression; a `GAP` for what is only known at run time."""
        match node:
            case ast.Constant(value=str(text)):
                return text
            case ast.JoinedStr(values=parts):
                return "".join(map(self.read, parts))
            case ast.FormattedValue(value=value):
                return self.read(value)
            case ast.BinOp(left=left, op=ast.Add(), right=right):
                return self.read(left) + self.read(right)
            case ast.Name(id=name) if name.isupper():
                return self.constants.get(name, GAP)
            case ast.Call(func=ast.Name(id=name)) if name in self.functions:
                return self.read(self.functions[name])
        return GAP


find_names = cache(Names)


def list_told(path):
    """(line, expression, text) of all that a file raises, prints, or finds in the doctor; not of what is
    raised again as it was."""
    names = find_names(path)
    is_of_block = path == PACKAGE / "config.py" or path.parent == PACKAGE / "codecs"
    for top in ast.parse(path.read_text()).body:
        for node in ast.walk(top):
            match node:
                case ast.Raise(exc=ast.Call(args=[told, *_]) | (ast.Name() as told)):
                    text = names.read(told)
                    yield node.lineno, told, wrap(text, top) if is_of_block else text
                case ast.Call(func=func, args=[told, *_]) if ast.unparse(func) in SAID:
                    yield node.lineno, told, names.read(told)
                case ast.Call(func=ast.Name(id=func), args=[told, advice, *_]) if func in FOUND:
                    yield node.lineno, told, f"{names.read(told)}: {names.read(advice)}"


def wrap(text, top):
    """What `from_ds_config` makes of what a check of the block, or of a part of it, raises."""
    if "accepted" not in text:
        return f"clapping.{GAP} = {GAP}: accepted: {text}"
    is_whole = isinstance(top, ast.ClassDef) and top.name == "ClappingConfig"
    return f"clapping.{text}" if is_whole else f"clapping.{GAP}.{text}"


@cache
def list_messages():
    """All of them, and the keys of `COMPUTED` and `EXEMPT` that were met."""
    found, met = [Message(file, text) for file, texts in ALSO.items() for text in texts], set()
    for path in sorted(PACKAGE.rglob("*.py")):
        file = path.relative_to(PACKAGE).as_posix()
        for line, told, text in list_told(path):
            key, place = (file, ast.unparse(told)), f"clapping_ds/{file}:{line}"
            met.add(key)
            if key in EXEMPT:
                continue
            is_known = key in COMPUTED or re.search("[A-Za-z]", text)
            assert is_known, f"{place}: what is {key[1]}? say it in COMPUTED, or why not in EXEMPT"
            found += [Message(place, each) for each in COMPUTED.get(key, [text])]
    return found, met


def list_patterns():
    """The rows' patterns, each as a regular expression."""
    cells = re.findall(r"^\| (`.*?`) \| ", PAGE.read_text(), re.MULTILINE)
    patterns = [pattern for cell in cells for pattern in re.findall("`([^`]+)`", cell)]
    assert len(set(patterns)) == len(patterns), "a pattern stands twice"
    return {each: re.compile(".*".join(map(re.escape, each.split(ANY))), re.DOTALL) for each in patterns}


def find_owner(text, patterns):
    """Of all patterns that a message fits, the one that says most of it."""
    fitting = [pattern for pattern, expression in patterns.items() if expression.fullmatch(text)]
    return max(fitting, key=lambda pattern: len(pattern.replace(ANY, "")), default=None)


def test_every_message_has_a_row():
    patterns = list_patterns()
    lacking = [message for message in list_messages()[0] if find_owner(message.text, patterns) is None]
    assert not lacking, "no row in docs/troubleshooting.md for\n" + "\n".join(map(": ".join, lacking))


def test_every_row_has_a_message():
    patterns = list_patterns()
    owners = {find_owner(message.text, patterns) for message in list_messages()[0]}
    assert set(patterns) <= owners, "no message, or a closer row for each: " + "\n".join(
        sorted(set(patterns) - owners)
    )


def test_no_row_fits_everything():
    for pattern in list_patterns():
        assert len(re.findall("[A-Za-z]", pattern)) >= 8, pattern


def test_lists_of_this_test_are_of_use():
    stale = (COMPUTED.keys() | EXEMPT.keys()) - list_messages()[1]
    assert not stale, stale
    for file, texts in ALSO.items():
        (source,) = [path for path in PACKAGE.rglob("*.py") if path == PACKAGE / file]
        for text in texts:
            assert text.split(GAP)[0] in source.read_text(), text


def test_links_lead_to_headings():
    for page, anchor in re.findall(r"\]\(([^)#]*)#([^)]+)\)", PAGE.read_text()):
        headings = re.findall("^#+ (.*)$", (PAGE.parent / (page or PAGE.name)).read_text(), re.MULTILINE)
        slugs = [re.sub(r"[^\w\- ]", "", each.lower()).replace(" ", "-") for each in headings]
        assert anchor in slugs, f"{page}#{anchor}"
