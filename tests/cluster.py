"""Ranks that stay: each test sends its function to running processes, which start from one that has
imported everything, as an import costs a rank six seconds."""

import gc
import os
import socket
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any

import torch.multiprocessing as mp

TIMEOUT_S = 90


class RankError(Exception):
    """What a rank's function raised: its type's name and its message."""

    def __init__(self, kind: str, message: str, trace: str) -> None:
        super().__init__(f"{kind}: {message}\n{trace}")
        self.kind = kind
        self.message = message


class Cluster:
    """`world_size` processes in one gloo process group."""

    def __init__(self, world_size: int, timeout_s: float = TIMEOUT_S) -> None:
        context = mp.get_context("forkserver")
        context.set_forkserver_preload(["tests.preloaded"])
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        self.timeout_s = timeout_s
        self.pipes: list[Connection] = []
        self.processes = []
        for rank in range(world_size):
            ours, theirs = context.Pipe()
            process = context.Process(target=_serve, args=(rank, world_size, port, theirs))
            process.start()
            self.pipes.append(ours)
            self.processes.append(process)

    def outcomes(self, function: Callable[..., Any], *args: Any) -> list[Any]:
        """What `function(*args)` returned on each rank, or the RankError it ended with.

        Raises TimeoutError when a rank hangs; the cluster is of no use from then on.
        """
        for pipe in self.pipes:
            pipe.send((function, args))
        results = []
        for rank, pipe in enumerate(self.pipes):
            if not pipe.poll(self.timeout_s):
                self.close()
                raise TimeoutError(f"rank {rank} hangs in {function.__name__}")
            try:
                results.append(pipe.recv())
            except EOFError:
                results.append(("error", ("dead", f"rank {rank} ended", "")))
        return [RankError(*result[1]) if result[0] == "error" else result[1] for result in results]

    def run(self, function: Callable[..., Any], *args: Any) -> list[Any]:
        """What `function(*args)` returned on each rank. Raises the first RankError."""
        results = self.outcomes(function, *args)
        for result in results:
            if isinstance(result, RankError):
                raise result
        return results

    def close(self) -> None:
        for process in self.processes:
            process.kill()
            process.join()


def assert_same_error(outcomes: list[Any], kind: str, message: str) -> None:
    """Every rank raised the same error of this kind, which says `message` among other things."""
    for outcome in outcomes:
        assert isinstance(outcome, RankError), "a rank went on"
        assert outcome.kind == kind
        assert outcome.message == outcomes[0].message
        assert message in outcome.message


def assert_replicas_are_equal(outcomes: list[tuple[int, list[int]]]) -> None:
    """outcomes: of all ranks, their stage, and checksums of their weights."""
    by_stage: dict[int, list[list[int]]] = {}
    for stage, weights in outcomes:
        by_stage.setdefault(stage, []).append(weights)
    for of_stage in by_stage.values():
        assert len(of_stage) > 1 and all(weights == of_stage[0] for weights in of_stage)


def _serve(rank: int, world_size: int, port: int, pipe: Connection) -> None:
    os.environ.update(
        RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world_size), MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port), OMP_NUM_THREADS="1",
    )  # fmt: skip
    import logging

    from deepspeed.utils import groups, logger
    from torch.distributed import distributed_c10d as c10d

    from launch.pretrain_gpt import start_distributed

    logger.setLevel(logging.WARNING)
    start_distributed()
    groups._clone_world_group()  # cached by DeepSpeed for good
    KEPT_GROUPS.update(c10d._world.pg_map)
    has_imported = False
    while True:
        try:
            function, args = pipe.recv()
        except EOFError:
            return
        if not has_imported:
            gc.freeze()  # what modules hold is no garbage, and looking through it takes a second each time
            has_imported = True
        try:
            pipe.send(("result", function(*args)))
        except BaseException as error:
            pipe.send(("error", (type(error).__name__, str(error), traceback.format_exc())))
        free_groups()


KEPT_GROUPS: set[Any] = set()


def free_groups() -> None:
    """Ends the process groups of finished engines. Each gloo group runs busy threads of its own until
    nothing refers to it, and each engine makes several groups. The loss of a finished engine has hooks
    that refer to the engine, which the garbage collector cannot see."""
    from deepspeed import PipelineEngine
    from torch.distributed import distributed_c10d as c10d

    for engine in [found for found in gc.get_objects() if isinstance(found, PipelineEngine)]:
        vars(engine).update(loss=None, total_loss=None, fwd_outputs=None, pipe_buffers={})
        del engine
    gc.collect()
    for group in [group for group in c10d._world.pg_map if group not in KEPT_GROUPS]:
        c10d.destroy_process_group(group)
    gc.collect()
