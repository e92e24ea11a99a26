"""What is used of Megatron-Core; the only file of the package that imports it."""

import inspect

TESTED = "megatron-core 0.16.1, 0.17.1, 0.18.2, 0.19.0"

try:
    from megatron.core import __version__ as VERSION  # noqa: F401
    from megatron.core.dist_checkpointing.mapping import ShardedObject as ShardedObject
    from megatron.core.distributed import DistributedDataParallel as DistributedDataParallel
    from megatron.core.distributed.param_and_grad_buffer import _ParamAndGradBucketGroup
    from megatron.core.pipeline_parallel.p2p_communication import P2PCommunicator as P2PCommunicator
    from megatron.core.pipeline_parallel.schedules import get_schedule_table as get_schedule_table
    from megatron.core.process_groups_config import ProcessGroupCollection as ProcessGroupCollection
    from megatron.core.utils import get_model_config as get_model_config
except ImportError as error:
    raise ImportError(
        f"clapping_ds.hosts.megatron needs Megatron-Core ({error}); tested: {TESTED}; "
        "install clapping_ds[megatron]"
    ) from error

SIGNATURE = "self, tensor_send_next, tensor_send_prev, recv_prev, recv_next, tensor_shape, wait_on_reqs"
if ", ".join(inspect.signature(P2PCommunicator._communicate).parameters) != SIGNATURE:
    raise ImportError(f"P2PCommunicator._communicate does not take ({SIGNATURE}); tested: {TESTED}")

# What bucket groups of gradients must have, with what each takes: see `gradients`.
METHODS = {
    "start_grad_sync": "self, force_all_reduce",
    "finish_grad_sync": "self, force_all_reduce",
    "check_grads": "self, check_for_nan_or_inf, check_for_large",
    "start_param_sync": "self, force_sync",
}
for name, signature in METHODS.items():
    method = getattr(_ParamAndGradBucketGroup, name, None)
    if method is None or ", ".join(inspect.signature(method).parameters) != signature:
        raise ImportError(f"_ParamAndGradBucketGroup has no {name}({signature}); tested: {TESTED}")
