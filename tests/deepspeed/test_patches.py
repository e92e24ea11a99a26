"""Each patch: the defect without it, none with it, off again, and a refusal of a host that is not known."""

import types

import pytest

from patches.patch import Patch, check_version
from tests import models


def owner(function):
    return types.SimpleNamespace(__name__="host", f=function)


def test_a_patch_is_marked_idempotent_and_undone():
    host = owner(lambda x: x)
    original = host.f
    patch = Patch(host, "f", lambda found: lambda x: found(x) + 1, "x")
    assert not patch.is_applied
    patch.apply()
    patch.apply()
    assert patch.is_applied and host.f(1) == 2
    patch.undo()
    patch.undo()
    assert host.f is original and not patch.is_applied


def test_what_is_not_known_is_refused():
    for host in (owner(lambda y: y), types.SimpleNamespace(__name__="host")):
        with pytest.raises(ImportError, match=r"host.f (takes \(y\); accepted: \(x\)|is missing)"):
            Patch(host, "f", lambda found: found, "x").apply()
    for version in ("0.16.1", "0.17.0rc1", "0.16.2a0+ecf3bae40a.nv26.10"):
        check_version("host", version, ["0.16", "0.17"])
    for version in ("0.160", "0.15.9", "1.16"):
        with pytest.raises(ImportError, match=f"host {version} is not known to this patch"):
            check_version("host", version, ["0.16", "0.17"])


# DeepSpeed's timers


def trained_with_timers(block, patched):
    from patches import deepspeed_timers

    if patched:
        deepspeed_timers.apply()
    try:
        engine = models.make_engine(block, ds={"wall_clock_breakdown": True}, stock=block is None)
        return models.train(engine, 2)
    finally:
        deepspeed_timers.undo()


@pytest.mark.parametrize("block", [None, {"strategy": "fc"}], ids=["stock", "clapping"])
def test_wall_clock_breakdown_trains_with_its_patch(two_ranks, block):
    losses = two_ranks.run(trained_with_timers, block, True)
    assert losses[0] == losses[1] and len(losses[0]) == 2


def test_the_timers_patch_refuses_another_deepspeed(monkeypatch):
    import deepspeed

    from patches import deepspeed_timers

    monkeypatch.setattr(deepspeed, "__version__", "0.20.0")
    with pytest.raises(ImportError, match=r"deepspeed 0.20.0 is not known to this patch; accepted: 0.19.8"):
        deepspeed_timers.apply()
    assert not deepspeed_timers.PATCH.is_applied


# Last: it leaves ranks that are not to be used again


def test_wall_clock_breakdown_crashes_without_its_patch(two_ranks):
    """On the first rank; the second one waits for it."""
    for pipe in two_ranks.pipes:
        pipe.send((trained_with_timers, (None, False)))
    assert two_ranks.pipes[0].poll(two_ranks.timeout_s)
    kind, (_, message, _) = two_ranks.pipes[0].recv()
    assert kind == "error"
    assert "has already been started" in message
