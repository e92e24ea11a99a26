"""`patches.megatron_lm`: the schedules, the checkpoints and the arguments of Megatron-LM's own scripts."""

import json
import os
import subprocess
import sys
import types
from contextlib import contextmanager
from importlib.machinery import ModuleSpec
from inspect import Parameter, Signature
from pathlib import Path

import pytest
from megatron.core.optimizer import get_megatron_optimizer
from megatron.core.pipeline_parallel import get_forward_backward_func

from tests import models
from tests.cluster import assert_same_error, free_groups
from tests.megatron import on_cpu as megatron_cpu
from tests.megatron import replicas

BLOCK = {
    "strategy": "fc",
    "lazy": {"refresh": "slot"},
    "activations": {"delta": "int2"},
    "gradients": {"delta": "int2"},
}
NUM_STEPS = 6
SAMPLES_PER_STEP = 4 * models.LENGTH


def train_as_megatron_lm(num_chunks):
    """Losses of a script that knows nothing of us and counts samples as Megatron-LM's loop does."""
    training = types.SimpleNamespace(consumed_train_samples=0)
    sys.modules["megatron.training"] = types.SimpleNamespace(get_args=lambda: training)
    try:
        with megatron_cpu.parallel(2, num_chunks):
            options = {"overlap_p2p_comm": True, "batch_p2p_comm": False} if num_chunks > 1 else {}
            trainer = megatron_cpu.Trainer(None, num_chunks, **options)
            losses = []
            for _ in range(NUM_STEPS):
                losses.append(trainer.step())
                training.consumed_train_samples += SAMPLES_PER_STEP
            return losses, training.consumed_train_samples
    finally:
        del sys.modules["megatron.training"]


def with_and_without(num_chunks):
    from patches import megatron_lm

    found = [train_as_megatron_lm(num_chunks)]
    compression = megatron_lm.apply({"clapping": BLOCK})
    try:
        found.append(train_as_megatron_lm(num_chunks))
        traffic = compression.pipeline.clapping_traffic()
    finally:
        megatron_lm.undo()
    free_groups()
    found.append(train_as_megatron_lm(num_chunks))
    options = {"overlap_p2p_comm": True, "batch_p2p_comm": False} if num_chunks > 1 else {}
    free_groups()
    by_hand = megatron_cpu.train(BLOCK, 2, num_chunks, NUM_STEPS, **options)[0]
    return found, by_hand, traffic.ratio, compression.pipeline.consumed_samples


@pytest.mark.parametrize("num_chunks", [1, 2])
def test_megatron_lm_is_compressed_with_its_patch_only(two_ranks, num_chunks):
    outcomes = two_ranks.run(with_and_without, num_chunks)
    for (without, patched, undone), by_hand, ratio, fresh_samples in outcomes:
        assert without[1] == undone[1] == NUM_STEPS * SAMPLES_PER_STEP
        assert patched[1] == fresh_samples < NUM_STEPS * SAMPLES_PER_STEP
        assert without == undone
        assert patched[0] == by_hand
        assert ratio > 15
    (without, patched, _), *_ = outcomes[-1]
    assert without[0] != patched[0]


# Gradients of replicas

GRADIENTS = {**models.NONE, "data_parallel": {"scatter": "eden4", "min_numel": 512}}


def train_replicas(block=None):
    """Losses, norms and weights of two replicas of one stage."""
    with replicas.parallel(1):
        run = replicas.Run(block)
        found = run.train(3), run.weights()
    free_groups()
    return found


def with_and_without_an_optimizer(makes_optimizer):
    from patches import megatron_lm
    from patches.megatron_lm_checkpoints import GROUPS, LOAD, SAVE

    found = [train_replicas(), train_replicas(GRADIENTS)]
    with megatron_training("folder", SAVE + GROUPS, LOAD + GROUPS, 0) as training:
        megatron_lm.apply({"clapping": GRADIENTS})
        try:
            if makes_optimizer:
                replicas.get_megatron_optimizer = training.get_megatron_optimizer
            return [*found, train_replicas()]
        finally:
            replicas.get_megatron_optimizer = get_megatron_optimizer
            megatron_lm.undo()


def test_gradients_of_megatron_lm_are_compressed_with_its_patch(two_ranks):
    for stock, by_hand, patched in two_ranks.run(with_and_without_an_optimizer, True):
        assert patched == by_hand != stock


def evaluated():
    """Whether a script that only evaluates runs as stock, without an optimizer."""
    from patches import megatron_lm
    from patches.megatron_lm_checkpoints import GROUPS, LOAD, SAVE

    with megatron_training("folder", SAVE + GROUPS, LOAD + GROUPS, 0):
        compression = megatron_lm.apply({"clapping": GRADIENTS})
        try:
            with replicas.parallel(1):
                run = replicas.Run(None)
                run.backward(forward_only=True)
        finally:
            megatron_lm.undo()
            free_groups()
    return compression.pipeline.gradients is None


def test_evaluation_alone_needs_no_optimizer(two_ranks):
    assert two_ranks.run(evaluated) == [True, True]


def test_an_optimizer_that_is_not_known_is_refused(two_ranks):
    outcomes = two_ranks.outcomes(with_and_without_an_optimizer, False)
    assert_same_error(outcomes, "ValueError", "an optimizer that get_megatron_optimizer did not make")


# Megatron-LM's checkpoints


@contextmanager
def megatron_training(folder, save_signature, load_signature, iteration):
    """Stands in for the package of Megatron-LM's loop, with checkpoints that hold nothing."""
    names = ("megatron.training", "megatron.training.training", "megatron.training.checkpointing")
    package, training, checkpointing = (types.ModuleType(name) for name in names)
    package.__spec__, package.__path__ = ModuleSpec(names[0], None), []
    args = types.SimpleNamespace(consumed_train_samples=0, save=folder, load=folder)
    package.get_args = training.get_args = lambda: args
    package.training, package.checkpointing = training, checkpointing
    training.get_megatron_optimizer = get_megatron_optimizer
    training.save_checkpoint = taking(save_signature, lambda *_, **options: None)
    training.load_checkpoint = taking(load_signature, lambda *_, **options: (iteration, 0))
    checkpointing.get_checkpoint_name = lambda path, iteration, return_base_dir: f"{path}/iter_{iteration}"
    sys.modules.update(zip(names, (package, training, checkpointing), strict=True))
    try:
        yield training
    finally:
        for name in names:
            del sys.modules[name]


def taking(signature, function):
    parameters = [Parameter(name, Parameter.POSITIONAL_OR_KEYWORD) for name in signature.split(", ")]
    function.__signature__ = Signature(parameters)
    return function


def interrupted(folder, block, at_step, restored_from):
    """Losses of a run whose compression is made anew after a step: the first from step 0 on, the second
    from what a checkpoint of that step says, or from nothing."""
    from patches import megatron_lm
    from patches.megatron_lm_checkpoints import GROUPS, LOAD, SAVE

    model_and_more = [None] * 4
    with megatron_training(folder, SAVE + GROUPS, LOAD + GROUPS, restored_from) as training:
        losses = []
        with megatron_cpu.parallel(2):
            trainer = megatron_cpu.Trainer(None)
            for step in range(1, NUM_STEPS + 1):
                if step in (1, at_step + 1):
                    compression = megatron_lm.apply({"clapping": block})
                    trainer.run = get_forward_backward_func()
                    if step > 1:
                        training.load_checkpoint(*model_and_more[:3])
                losses.append(trainer.step())
                if step == at_step:
                    training.save_checkpoint(step, *model_and_more)
                    training.save_checkpoint(step + 1, *model_and_more, non_persistent_ckpt=True)
                    megatron_lm.undo()
        free_groups()
        megatron_lm.undo()
    return losses, compression.pipeline.consumed_samples


def interrupted_and_not(folder):
    never = interrupted(folder / "never", BLOCK, NUM_STEPS, 0)
    resumed = interrupted(folder / "resumed", BLOCK, 2, 2)
    forgotten = interrupted(folder / "forgotten", {**BLOCK, "checkpoint_memory": False}, 2, 2)
    missing = interrupted(folder / "missing", BLOCK, 2, 3)
    return never, resumed, forgotten, missing


def test_megatron_lm_goes_on_where_its_checkpoint_stood(two_ranks, tmp_path):
    outcomes = two_ranks.run(interrupted_and_not, tmp_path)
    for never, resumed, forgotten, missing in outcomes:
        assert resumed == never
        assert missing[0][:2] == forgotten[0][:2] == never[0][:2]
        assert forgotten[1] > never[1]  # an all-fresh step more
    never, resumed, forgotten, missing = outcomes[-1]
    assert missing[0][2:] == forgotten[0][2:] != never[0][2:]
    for run in ("never", "resumed", "forgotten", "missing"):
        files = [str(file.relative_to(tmp_path / run)) for file in sorted((tmp_path / run).rglob("*.pt"))]
        folder = f"iter_{NUM_STEPS if run == 'never' else 2}"
        assert files == [f"{folder}/clapping_rank_00000.pt", f"{folder}/clapping_rank_00001.pt"]


def test_checkpoints_of_another_megatron_lm_are_refused():
    from megatron.core.pipeline_parallel import schedules

    from patches import megatron_lm
    from patches.megatron_lm_checkpoints import GROUPS, SAVE

    original = schedules.forward_backward_pipelining_without_interleaving
    with (
        megatron_training("folder", SAVE + GROUPS, "model", 0),
        pytest.raises(ImportError, match=r"load_checkpoint takes \(model\); accepted: \(ddp_model, "),
    ):
        megatron_lm.apply({"clapping": BLOCK})
    assert schedules.forward_backward_pipelining_without_interleaving is original


def refused_in_a_phase_or_a_second_run():
    """The errors of the patch: with phases, and where the loop runs a step again."""
    from megatron.core import rerun_state_machine

    from patches import megatron_lm
    from patches.megatron_lm_checkpoints import GROUPS, LOAD, SAVE

    found = []
    with megatron_training("folder", SAVE + GROUPS, LOAD + GROUPS, 0) as training:
        for phases in ([100], None):
            training.get_args().phase_transition_iterations = phases
            megatron_lm.apply({"clapping": BLOCK})
            try:
                with megatron_cpu.parallel(2):
                    trainer = megatron_cpu.Trainer(None)
                    machine = rerun_state_machine.get_rerun_state_machine()
                    if phases is None:
                        trainer.step()
                        machine.state = rerun_state_machine.RerunState.RERUNNING_IN_PLACE
                    with pytest.raises(ValueError, match="accepted: ") as error:
                        trainer.step()
                    found.append(str(error.value))
            finally:
                rerun_state_machine.destroy_rerun_state_machine()
                megatron_lm.undo()
                free_groups()
    return found


def disabled_in_a_phase(folder):
    """Whether a disabled block trains and saves as if it were not there."""
    from patches import megatron_lm
    from patches.megatron_lm_checkpoints import GROUPS, LOAD, SAVE

    with megatron_training(folder, SAVE + GROUPS, LOAD + GROUPS, 0) as training:
        training.get_args().phase_transition_iterations = [100]
        stock, _ = megatron_cpu.train(None, 2)
        megatron_lm.apply({"clapping": {"enabled": False}})
        try:
            losses, _ = megatron_cpu.train(None, 2)
            training.save_checkpoint(4, *[None] * 4)
        finally:
            megatron_lm.undo()
            free_groups()
    return losses == stock and not folder.exists()


def test_a_disabled_block_changes_nothing(two_ranks, tmp_path):
    assert two_ranks.run(disabled_in_a_phase, tmp_path / "checkpoints") == [True, True]


def test_what_would_lose_data_or_change_memories_twice_is_refused(two_ranks):
    for phases, second_run in two_ranks.run(refused_in_a_phase_or_a_second_run):
        assert phases.startswith("--phase-transition-iterations with p_new < 1: ")
        assert "runs it again (RERUNNING_IN_PLACE)" in second_run


def run_script(arguments):
    from patches import megatron_lm

    path, argv = sys.path[:], sys.argv
    try:
        megatron_lm.main(arguments)
    finally:
        megatron_lm.undo()
        sys.path, sys.argv = path, argv


def test_a_script_is_run_with_its_own_arguments(tmp_path):
    script, result = tmp_path / "pretrain.py", tmp_path / "result.json"
    script.write_text(
        "import json, sys\n"
        "from megatron.core.pipeline_parallel import get_forward_backward_func\n"
        "function = get_forward_backward_func(pp_size=2, vp_size=None)\n"
        "found = [sys.argv, __name__, hasattr(function, '__clapping_patch__')]\n"
        f"open({str(result)!r}, 'w').write(json.dumps(found))"
    )
    run_script([str(script), "--lr", "1", "--clapping-config", "clapping.json", "--bf16"])
    assert json.loads(result.read_text()) == [[str(script), "--lr", "1", "--bf16"], "__main__", True]


def test_the_megatron_core_beside_the_script_is_the_one_that_is_patched(tmp_path):
    """From another folder, as with `python -m patches.megatron_lm CHECKOUT/pretrain_gpt.py`."""
    checkout, elsewhere = tmp_path / "checkout", tmp_path / "elsewhere"
    (checkout / "megatron" / "core").mkdir(parents=True)
    elsewhere.mkdir()
    (checkout / "megatron" / "core" / "__init__.py").write_text("__version__ = '0.7.7'")
    (checkout / "pretrain.py").write_text("")
    command = [
        sys.executable,
        "-m",
        "patches.megatron_lm",
        str(checkout / "pretrain.py"),
        "--clapping-config",
        "c",
    ]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    done = subprocess.run(
        command, cwd=elsewhere, env=environment, capture_output=True, text=True, check=False
    )
    assert "megatron-core 0.7.7 is not known to this patch" in done.stderr


@pytest.mark.parametrize(
    "arguments", [["a.py"], ["a.py", "--clapping-config"], ["a.py", "--clapping-config", "b"]]
)
def test_the_runner_names_what_it_needs(arguments):
    with pytest.raises(SystemExit, match="usage: "):
        run_script(arguments)


def test_the_megatron_patch_refuses_another_megatron(monkeypatch):
    import megatron.core
    from megatron.core.pipeline_parallel import schedules

    from patches import megatron_lm

    original = schedules.forward_backward_pipelining_without_interleaving
    monkeypatch.setattr(megatron.core, "__version__", "0.20.0")
    with pytest.raises(ImportError, match=r"megatron-core 0.20.0 is not known to this patch"):
        megatron_lm.apply({"clapping": BLOCK})
    monkeypatch.undo()
    monkeypatch.setattr(schedules, "forward_backward_pipelining_with_interleaving", lambda model: None)
    with pytest.raises(ImportError, match=r"takes \(model\); accepted: \(forward_step_func, "):
        megatron_lm.apply({"clapping": BLOCK})
    assert schedules.forward_backward_pipelining_without_interleaving is original
