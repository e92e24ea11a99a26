"""Megatron-LM's checkpoints with our memories and held batches, in files of our own in their folders.

`megatron.training.training` calls `save_checkpoint` and `load_checkpoint` by name. Ours is written after
the checkpoint: if a run ends in between, the next run's first step is all fresh.
"""

from collections.abc import Callable
from functools import wraps
from pathlib import Path
from typing import TYPE_CHECKING, Any

from clapping_ds.stage import state_file
from patches.patch import Patch

if TYPE_CHECKING:
    from patches.megatron_lm import Compression

GROUPS = "tp_group, pp_group, dp_cp_group"
GROUPS_FROM_0_19 = f"{GROUPS}, dp_group, expt_dp_group, rng_state_key_prefix"
SAVE = (
    "iteration, model, optimizer, opt_param_scheduler, num_floating_point_operations_so_far, "
    "checkpointing_context, pipeline_rank, expert_rank, tensor_rank, pipeline_parallel, expert_parallel, "
    "non_persistent_ckpt, train_data_iterator, preprocess_common_state_dict_fn, release, "
)
LOAD = (
    "ddp_model, optimizer, opt_param_scheduler, load_arg, strict, checkpointing_context, "
    "skip_load_to_model_and_opt, "
)


def patches(compression: "Compression") -> list[Patch]:
    """Of the Megatron-LM that can be imported."""
    from megatron.training import training
    from megatron.training.checkpointing import get_checkpoint_name

    def folder(checkpoints: str, iteration: int) -> Path:
        return Path(get_checkpoint_name(checkpoints, iteration, return_base_dir=True))

    def saving(original: Callable[..., None]) -> Callable[..., None]:
        @wraps(original)
        def save(iteration: int, *arguments: Any, **options: Any) -> None:
            pipeline = compression.pipeline
            is_ours = pipeline is not None and pipeline.config.enabled
            if not is_ours or options.get("non_persistent_ckpt"):
                return original(iteration, *arguments, **options)
            target = folder(training.get_args().save, iteration)
            state = compression.state_dict()
            # No rank leaves `original` before all have entered it, so old and new files never mix.
            state_file.path_in(target).unlink(missing_ok=True)
            original(iteration, *arguments, **options)
            if state is not None:
                state_file.write(state, target)

        return save

    def loading(original: Callable[..., tuple[int, int]]) -> Callable[..., tuple[int, int]]:
        @wraps(original)
        def load(*arguments: Any, load_arg: str = "load", **options: Any) -> tuple[int, int]:
            iteration, num_operations = original(*arguments, load_arg=load_arg, **options)
            if iteration > 0:
                compression.resumed = folder(getattr(training.get_args(), load_arg), iteration)
            return iteration, num_operations

        return load

    return [
        Patch(training, "save_checkpoint", saving, SAVE + GROUPS, SAVE + GROUPS_FROM_0_19),
        Patch(training, "load_checkpoint", loading, LOAD + GROUPS, LOAD + GROUPS_FROM_0_19),
    ]
