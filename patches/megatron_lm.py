"""Megatron-LM's own scripts with compression: no line of theirs is changed.

torchrun ... -m patches.megatron_lm pretrain_gpt.py --clapping-config FILE [arguments of the script]

Its training loop looks `forward_backward_*` up in `megatron.core.pipeline_parallel.schedules` when it
starts. All three are replaced there by what `MegatronPipeline.wrap` makes of them, which passes our
communicator and iterators as their arguments. `args.consumed_train_samples` comes to count fresh samples
only, so that a resumed run skips no data. The optimizer that `get_megatron_optimizer` makes is kept for
`MegatronPipeline.compress_gradients`.

Megatron-Core is imported late, so that it is the one beside the script, if there is one.
"""

import sys
from collections.abc import Callable, Mapping
from functools import wraps
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from clapping_ds.link.groups import rank
from clapping_ds.report import format_table
from clapping_ds.run import prepare_script, run_prepared_script
from clapping_ds.stage import state_file
from patches import megatron_lm_checkpoints
from patches.patch import Patch, check_version

ACCEPTED = ["0.16", "0.17", "0.18", "0.19"]
USAGE = "usage: python -m patches.megatron_lm SCRIPT --clapping-config FILE [arguments of the script]"
OPTION = "--clapping-config"
SCHEDULES = (
    "forward_backward_pipelining_with_interleaving",
    "forward_backward_pipelining_without_interleaving",
    "forward_backward_no_pipelining",
)
SIGNATURE = (
    "forward_step_func, data_iterator, model, num_microbatches, seq_length, micro_batch_size, "
    "decoder_seq_length, forward_only, collect_non_loss_data, first_val_step, adjust_tensor_shapes_fn, "
    "p2p_communicator, pg_collection, force_all_reduce"
)
OPTIMIZER = (
    "config, model_chunks, config_overrides, use_gloo_process_groups, pg_collection, "
    "dump_param_to_param_group_map"
)


class Compression:
    """The `MegatronPipeline` of this process, made when the first schedule runs: by then Megatron-LM has
    set up its process groups."""

    def __init__(self, source: str | Mapping[str, Any]) -> None:
        self.source = source
        self.pipeline: Any = None
        self.resumed: Path | None = None
        """The folder of the checkpoint that was loaded before the first step."""
        self.is_first_rank = False
        self.optimizer: Any = None
        """Megatron-LM's, once it has made it."""
        self.has_trained = False

    def start(self, model: Any) -> None:
        """model: this rank's model chunk, or a list of them. A collective of all ranks."""
        from megatron.core.utils import get_model_config

        from clapping_ds.hosts.megatron.pipeline import MegatronPipeline

        model_config = get_model_config(model[0] if isinstance(model, list) else model)
        self.pipeline = MegatronPipeline(self.source, model_config)
        self.is_first_rank = rank() == 0

    def start_training(self, model: Any) -> None:
        """Before the first training step. A collective of all ranks."""
        config = self.pipeline.config
        if config.sampling.p_new < 1:
            _refuse_phases()
        if config.data_parallel is not None:
            if self.optimizer is None:
                raise ValueError(
                    "data_parallel with an optimizer that get_megatron_optimizer did not make; accepted: one "
                    "that it made, or data_parallel = null"
                )
            self.pipeline.compress_gradients(model, self.optimizer)
        if self.resumed is not None:
            reason = self.pipeline.load_state_dict(state_file.read(self.resumed))
            if reason is not None and self.is_first_rank and config.checkpoint_memory:
                print(f"clapping: {reason}: the next step is all fresh", flush=True)

    def state_dict(self) -> dict[str, Any] | None:
        """What this rank must save; before the first training step what it resumed from, if anything."""
        if self.has_trained:
            found: dict[str, Any] = self.pipeline.state_dict()
            return found
        return None if self.resumed is None else state_file.read(self.resumed)

    def of(self, original: Callable[..., Any]) -> Callable[..., Any]:
        """The replacement of a schedule."""

        @wraps(original)
        def run(*, model: Any, forward_only: bool = False, **options: Any) -> Any:
            if self.pipeline is None:
                self.start(model)
            if forward_only or not self.pipeline.config.enabled:
                return original(model=model, forward_only=forward_only, **options)
            if not self.has_trained:
                self.start_training(model)
                self.has_trained = True
            _refuse_a_second_run()
            before = self.pipeline.consumed_samples
            result = self.pipeline.wrap(original)(model=model, **options)
            num_samples = options["num_microbatches"] * options["micro_batch_size"]
            fresh = self.pipeline.consumed_samples - before
            _give_back(num_samples * self.pipeline.groups.dp.size() - fresh)
            return result

        return run

    def keeping_optimizer(self, original: Callable[..., Any]) -> Callable[..., Any]:
        """The replacement of `get_megatron_optimizer`."""

        @wraps(original)
        def get_megatron_optimizer(*arguments: Any, **options: Any) -> Any:
            self.optimizer = original(*arguments, **options)
            return self.optimizer

        return get_megatron_optimizer

    def print_sent(self) -> None:
        """On the first rank: what this rank sent. No communication: the script may have ended it."""
        rows = [] if self.pipeline is None else self.pipeline.clapping_sent()
        if self.is_first_rank and rows:
            print(f"clapping, sent by rank 0:\n{format_table(rows)}", flush=True)


def _arguments() -> Any:
    """Megatron-LM's; None without its loop."""
    training = sys.modules.get("megatron.training")
    return None if training is None else training.get_args()


def _give_back(num_samples: int) -> None:
    """Samples of a step that were not drawn. Megatron-LM's loop is going to add all of the step."""
    arguments = _arguments()
    if arguments is not None:
        arguments.consumed_train_samples -= num_samples


def _refuse_phases() -> None:
    if getattr(_arguments(), "phase_transition_iterations", None):
        raise ValueError(
            "--phase-transition-iterations with p_new < 1: Megatron-LM takes a phase's data position from "
            "its iterations, each of which draws less than a batch; accepted: p_new = 1, or one phase"
        )


def _refuse_a_second_run() -> None:
    """Of a training step: it would toss another coin and change memories again. The same on every rank."""
    if _arguments() is not None:
        from megatron.core.rerun_state_machine import get_rerun_state_machine

        state = get_rerun_state_machine().state.name
        if state.startswith("RERUNNING"):
            raise ValueError(
                f"Megatron-LM rejected a result of this step and runs it again ({state}), which compressed "
                "traffic does not allow; accepted: --rerun-mode disabled"
            )


_APPLIED: list[Patch] = []


def apply(source: str | Mapping[str, Any]) -> Compression:
    """For schedules that are looked up from now on. Raises ImportError on a Megatron-Core that is not
    known, ValueError if it is applied already."""
    if _APPLIED:
        raise ValueError("patches.megatron_lm is applied already; accepted: undo() first")
    import megatron.core

    check_version("megatron-core", megatron.core.__version__, ACCEPTED)
    from megatron.core.pipeline_parallel import schedules

    compression = Compression(source)
    patches = [Patch(schedules, name, compression.of, SIGNATURE) for name in SCHEDULES]
    if find_spec("megatron.training") is not None:
        from megatron.training import training

        patches.append(Patch(training, "get_megatron_optimizer", compression.keeping_optimizer, OPTIMIZER))
        patches += megatron_lm_checkpoints.patches(compression)
    for patch in patches:
        patch.check()
    for patch in patches:
        patch.apply()
    _APPLIED.extend(patches)
    return compression


def undo() -> None:
    while _APPLIED:
        _APPLIED.pop().undo()


def main(arguments: list[str]) -> None:
    """Runs the script as `__main__` without the option that is ours."""
    if OPTION not in arguments[:-1]:
        raise SystemExit(USAGE)
    place = arguments.index(OPTION)
    source = arguments[place + 1]
    arguments = arguments[:place] + arguments[place + 2 :]
    prepare_script(arguments, USAGE)
    compression = apply(
        source
    )  # after it, so that the Megatron-Core beside the script is the one that is patched
    try:
        run_prepared_script()
    finally:
        compression.print_sent()


if __name__ == "__main__":
    main(sys.argv[1:])
