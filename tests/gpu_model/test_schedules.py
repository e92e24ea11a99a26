"""What NCCL and the GPU would do with the package, in a model of them: nothing hangs, nothing races, the host
waits for nothing, and memory does not grow. `python -m tests.commands.schedules` runs 10,000 of these."""

from hypothesis import given, settings
from hypothesis import strategies as st

from tests.gpu_model.cases import LEARNING, check, draw_case
from tests.gpu_model.program import Case

NONE = {"activations": {"codec": "none"}, "gradients": {"codec": "none"}}
TOLD = Case(2, 4, 2, "megatron", "overlap", {**NONE, "overlap": True}, (4, 1, 64), syncs=0.3, is_dynamic=True)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(st.integers(0, 1 << 32))
def test_any_pipeline_runs(number):
    check(draw_case(number), number)


def test_shapes_that_are_told_are_heard_where_stock_would():
    for seed in range(20):
        check(TOLD, seed)


def test_what_a_codec_learns_is_neither_waited_for_nor_taken_away():
    """Twelve periods of a basis and anchors, of direct messages and of deltas."""
    learned = {"codec": LEARNING, "min_numel": 16}
    direct = {"activations": learned, "gradients": learned}
    delta = {"key": "none", "delta": LEARNING, "min_numel": 16}
    lazy = {"strategy": "key_delta", "lazy": {"p_new": 0.5, "refresh": "cycle"}}
    for block in (direct, {**lazy, "activations": delta, "gradients": delta}):
        for seed in range(5):
            block |= {"overlap": True, "in_flight": 0}
            check(Case(num_slots=3, num_steps=8, block=block, shape=(64, 64)), seed)
