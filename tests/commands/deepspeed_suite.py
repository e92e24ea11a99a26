"""DeepSpeed's own pipeline tests, on the stock engine and through ours with nothing compressed.

    python -m tests.commands.deepspeed_suite CHECKOUT

CHECKOUT is a clone of https://github.com/deepspeedai/DeepSpeed at the installed version, or near it; it is
no part of this project. Writes benchmarks/results/deepspeed_tests.csv, a row per test, and a JSON that says
where they come from. Ends with an error if a test passes on stock and not on ours.

This file is also the pytest plugin of both runs. It writes down each test's outcome. In the run through our
engine, every rank that a test starts enables clapping and adds `BLOCK` to the configuration of each
pipeline that has a link. `pipelines` counts these in the first rank; where it is 0 the test has no such
pipeline, and shows that `enable` harms nothing.
"""

import argparse
import functools
import json
import os
import subprocess
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "benchmarks" / "results" / "deepspeed_tests"
SUITES = ("unit/pipe", "unit/runtime/pipe", "unit/checkpoint/test_pipeline.py")
NOTHING = {"codec": "none"}
BLOCK = {"strategy": "direct", "activations": NOTHING, "gradients": NOTHING}
ENGINE, RECORD = "CLAPPING_SUITE_ENGINE", "CLAPPING_SUITE_RECORD"


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("checkout", type=Path)
    parser.add_argument("--suites", nargs="+", default=SUITES, help="below the checkout's folder tests")
    parser.add_argument("--timeout-s", type=int, default=600, help="of one test")
    options = parser.parse_args()
    outcomes = {engine: run(options, engine) for engine in ("stock", "ours")}
    rows = [row(test, *(outcomes[engine].get(test, {}) for engine in outcomes)) for test in outcomes["stock"]]
    write(rows, options)
    worse = [row["test"] for row in rows if row["stock"] == "passed" != row["ours"]]
    for engine in outcomes:
        counts = [row[engine] for row in rows]
        print(engine, {outcome: counts.count(outcome) for outcome in sorted(set(counts))})
    if worse:
        raise SystemExit("pass on stock, not on ours:\n" + "\n".join(worse))


def run(options, engine):
    """By test: its outcome, the last line of its error, and the number of pipelines with our block."""
    with tempfile.TemporaryDirectory() as folder:
        record = Path(folder) / "record"
        environment = {
            **os.environ,
            "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]),
            "OMP_NUM_THREADS": "1",
            "LOCAL_SIZE": "4",  # what DeepSpeed takes for the number of CPU devices
            "DS_UNITTEST_TIMEOUT": str(options.timeout_s),
            "TMPDIR": folder,
            ENGINE: engine,
            RECORD: str(record),
        }
        pytest = [
            sys.executable,
            "-m",
            "pytest",
            "-p",
            "tests.commands.deepspeed_suite",
            "-p",
            "no:cacheprovider",
        ]
        subprocess.run([*pytest, *options.suites], cwd=options.checkout / "tests", env=environment)
        found: dict[str, dict] = {}
        for line in record.read_text().splitlines():
            test, entry = json.loads(line)
            known = found.setdefault(test, {"pipelines": 0})
            known["pipelines"] += entry.pop("pipelines", 0)
            known.update(entry)
    return found


def row(test, stock, ours):
    reason = stock.get("reason") or ours.get("reason", "")
    outcomes = [engine.get("outcome", "not run") for engine in (stock, ours)]
    return {
        "test": test,
        "stock": outcomes[0],
        "ours": outcomes[1],
        "pipelines": ours.get("pipelines", 0),
        "reason": reason,
    }


def write(rows, options):
    from benchmarks.files import write_results

    commit = subprocess.run(
        ["git", "-C", options.checkout, "rev-parse", "HEAD"], capture_output=True, text=True, check=True
    ).stdout.strip()
    facts = {
        "pytest": version("pytest"),
        "deepspeed_tests": "https://github.com/deepspeedai/DeepSpeed",
        "deepspeed_tests_commit": commit,
        "deepspeed_tests_version": (options.checkout / "version.txt").read_text().strip(),
        "suites": [f"tests/{suite}" for suite in options.suites],
        "clapping": BLOCK,
    }
    write_results(RESULTS, rows, facts)


# The plugin


def note(test, **entry):
    with open(os.environ[RECORD], "a") as file:
        file.write(json.dumps([test, entry]) + "\n")


def pytest_runtest_logreport(report):
    if report.when == "call" or report.outcome != "passed":
        note(report.nodeid, outcome=report.outcome, reason=reason_of(report))


def reason_of(report):
    """One line, without what differs from run to run."""
    if report.outcome == "skipped":
        return report.longrepr[2].removeprefix("Skipped: ")
    crash = getattr(report.longrepr, "reprcrash", None)
    lines = (crash.message if crash else str(report.longrepr or "")).strip().splitlines()
    return lines[0][:160] if lines else ""


def pytest_collection_finish(session):
    """Replaces, in the tests' launcher, what a rank runs: it is pickled with the launcher's object."""
    if os.environ[ENGINE] != "ours" or not session.items:
        return
    from unit.common import DistributedExec

    launch = DistributedExec._launch_with_file_store

    def launch_ours(self, request, world_size):
        self.run = functools.partial(through_ours, self.run, request.node.nodeid)
        launch(self, request, world_size)

    DistributedExec._launch_with_file_store = launch_ours


def through_ours(run, test, **fixtures):
    """In each rank: the test, with clapping enabled and `BLOCK` in every pipeline's configuration."""
    import deepspeed

    import clapping_ds

    clapping_ds.enable()
    stock_initialize = deepspeed.initialize

    def initialize(*args, **kwargs):
        has_link = getattr(kwargs["model"], "num_stages", 1) > 1
        if has_link:
            kwargs["config"] = {**kwargs["config"], "clapping": BLOCK}
        engine, *others = stock_initialize(*args, **kwargs)
        if has_link:
            assert engine.clapping.enabled
            if engine.global_rank == 0:
                note(test, pipelines=1)
        return engine, *others

    deepspeed.initialize = initialize
    try:
        run(**fixtures)
    finally:
        deepspeed.initialize = stock_initialize


if __name__ == "__main__":
    main()
