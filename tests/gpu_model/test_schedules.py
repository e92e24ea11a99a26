"""What NCCL and the GPU would do with the package, in a model of them: nothing hangs, nothing races, the host
waits for nothing, and memory does not grow. `python -m tests.commands.schedules` runs 10,000 of these."""

from hypothesis import given, settings
from hypothesis import strategies as st

from tests.gpu_model.cases import check, draw_case

NONE = {"activations": {"codec": "none"}, "gradients": {"codec": "none"}}


@settings(max_examples=60, deadline=None, derandomize=True)
@given(st.integers(0, 1 << 32))
def test_any_pipeline_runs(number):
    check(draw_case(number), number)
