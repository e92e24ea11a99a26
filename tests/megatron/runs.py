"""What ranks do in the tests of Megatron-Core, and the blocks and options that they do it with."""

import time
from itertools import islice
from multiprocessing import active_children
from typing import Any

import torch
from megatron.core import dist_checkpointing

from clapping_ds.hosts.megatron.pipeline import MegatronPipeline
from launch.megatron_on_cpu import on_cpu
from tests import models
from tests.cluster import free_groups
from tests.megatron import on_cpu as megatron_cpu


def both(codec: str, key: str | None = None, member: str = "delta") -> dict[str, Any]:
    direction = {member: codec} if key is None else {member: codec, "key": key}
    return {"activations": direction, "gradients": direction}


NONE = {"strategy": "direct", **both("none", member="codec")}
LAZY_NONE = {"strategy": "fu", "lazy": {"refresh": "slot"}, **both("none")}
BLOCKS = {
    "fc int2": {"strategy": "fc", "lazy": {"refresh": "slot"}, **both("int2")},
    "int8 key + int2 delta": {"strategy": "key_delta", "lazy": {"refresh": "slot"}, **both("int2", "int8")},
    "direct int4": {"strategy": "direct", **both("int4", member="codec")},
}
INT2 = BLOCKS["fc int2"]
CHUNKS = {"num_chunks": 2}
LENGTHS = {"lengths": (64, 48, 32)}
UNBATCHED = {"batch_p2p_comm": False}
OVERLAP = {**CHUNKS, **UNBATCHED, "overlap_p2p_comm": True}
FLUSH = {**OVERLAP, "overlap_p2p_comm_warmup_flush": True}
FREED = {"deallocate_pipeline_outputs": True}


def runs(settings: list[Any], num_ranks: int, steps: int = 3) -> list[Any]:
    """Losses and memories of one training run per (block, options)."""
    found = []
    for block, options in settings:
        found.append(megatron_cpu.train(block, num_ranks, steps=steps, **options))
        free_groups()
    return found


def deepspeed_losses(num_stages: int, blocks: list[Any], steps: int) -> list[Any]:
    found = []
    for block in blocks:
        engine = models.make_engine(block, num_stages, ds={"gradient_clipping": 0.0})
        found.append(models.train(engine, steps))
        del engine
        free_groups()
    return found


def scaled(block: Any, scales: list[float]) -> list[Any]:
    """Losses, and memories, with a loss scale of each step's own, as fp16 optimizers set it."""
    with megatron_cpu.parallel(2):
        trainer = megatron_cpu.Trainer(block)
        losses = []
        for scale in scales:
            trainer.config.grad_scale_func = lambda loss, scale=scale: loss * scale
            trainer.grad_scale = scale
            losses.append(trainer.step())
        trainer.pipeline.endpoints.rescale_gradients(1.0)
        for channel in trainer.pipeline.endpoints.channels:  # what is held follows when it is used
            channel.begin_step(channel.step, trainer.num_micro_batches)
        return [losses, megatron_cpu.memories(trainer.pipeline)]


def evaluated(num_chunks: int) -> Any:
    """Evaluation of both before a step; whether evaluation after a step changed anything that is held."""
    options = OVERLAP if num_chunks > 1 else {}
    with megatron_cpu.parallel(2, num_chunks):
        trainer, stock = (megatron_cpu.Trainer(block, **options) for block in (INT2, None))
        first = trainer.evaluate(), stock.evaluate()
        trainer.step()
        before = megatron_cpu.memories(trainer.pipeline)
        trainer.num_micro_batches = 8
        trainer.evaluate()
        return first, before == megatron_cpu.memories(trainer.pipeline), trainer.pipeline.consumed_samples


def drawn_batches(block: Any) -> tuple[int, int]:
    """How many batches 20 steps took from the data iterator, and how many samples that is said to be."""
    with megatron_cpu.parallel(2):
        trainer = megatron_cpu.Trainer(block)
        (data,) = trainer.data
        drawn = []
        trainer.data = [(drawn.append(batch) or batch for batch in data)]
        for _ in range(20):
            trainer.step()
        return len(drawn), trainer.pipeline.consumed_samples


def with_data_of_each_step() -> Any:
    """Losses and memories of a run whose steps have iterators of their own, and of one with a single one."""
    with megatron_cpu.parallel(2):
        found = []
        for is_anew in (True, False):
            trainer = megatron_cpu.Trainer(models.POOL)
            (data,), losses = trainer.data, []
            for _ in range(6):
                if is_anew:
                    trainer.data = [islice(data, trainer.pipeline.num_fresh(4))]
                losses.append(trainer.step())
            found.append((losses, megatron_cpu.memories(trainer.pipeline)))
        return found


def interrupted(block: dict[str, Any], folder: str) -> list[Any]:
    """Losses and what is held after 3 more steps: uninterrupted, resumed from a file per rank, and from a
    distributed checkpoint."""
    file, found, saved = f"{folder}/{torch.distributed.get_rank()}.pt", [], {}
    with megatron_cpu.parallel(2, 2):
        for source in ("uninterrupted", "file", "sharded"):
            trainer = megatron_cpu.Trainer(block, **OVERLAP)
            pipeline = trainer.pipeline
            if source == "uninterrupted":
                for _ in range(4):
                    trainer.step()
                saved = {"model": trainer.model.state_dict(), "optimizer": trainer.optimizer.state_dict()}
                torch.save({**saved, "clapping": pipeline.state_dict()}, file)
                dist_checkpointing.save(pipeline.sharded_state_dict(), folder)
            else:
                saved = torch.load(file, weights_only=False)
                state = saved["clapping"]
                if source == "sharded":
                    (state,) = dist_checkpointing.load(pipeline.sharded_state_dict(), folder).values()
                trainer.model.load_state_dict(saved["model"])
                trainer.optimizer.load_state_dict(saved["optimizer"])
                assert pipeline.load_state_dict(state) is None
                for data in filter(None, trainer.data):
                    for _ in range(pipeline.consumed_samples // models.LENGTH):
                        next(data)
            losses = [trainer.step() for _ in range(3)]
            found.append((losses, megatron_cpu.memories(pipeline), pipeline.consumed_samples))
    for process in active_children():  # Megatron-Core's queue of written files, which outlives a killed rank
        process.kill()
    return found


def resized(length: int) -> Any:
    """Which slots of three steps were fresh, with micro-batches of another length from the second on; and
    memories at the end."""
    with megatron_cpu.parallel(2):
        trainer = megatron_cpu.Trainer({**INT2, "lazy": {"p_new": 0.1, "refresh": "slot"}})
        fresh = []
        for its_length in (models.LENGTH, length, length):
            trainer.length = its_length
            trainer.data = [data and megatron_cpu.batches((its_length,)) for data in trainer.data]
            trainer.step()
            fresh.append(trainer.pipeline.endpoints.fresh)
        return fresh, megatron_cpu.memories(trainer.pipeline)


def counted_with_other_replicas() -> Any:
    """Samples that four ranks drew in two pipelines, and what one pipeline of all four says of them."""
    with megatron_cpu.parallel(2):
        old = megatron_cpu.Trainer(INT2)
        old.step()
        state = old.pipeline.state_dict()
    free_groups()
    with megatron_cpu.parallel(4):
        new = megatron_cpu.Trainer(INT2)
        why = new.pipeline.load_state_dict(state)
        return old.pipeline.consumed_samples, new.pipeline.consumed_samples, why


def misfit(change: str) -> Any:
    """What is said of a state that does not fit, whether the step after it is all fresh, and the count."""
    with megatron_cpu.parallel(2, 2):
        old = megatron_cpu.Trainer(INT2, **OVERLAP)
        old.step()
        state = old.pipeline.state_dict()
        if change == "missing" and torch.distributed.get_rank() == 1:
            state = None
        if change == "a chunk" and torch.distributed.get_rank() == 1:
            state["endpoints"]["stages"].popitem()
        block = {**INT2, "seed": 5} if change == "seed" else INT2
        new = megatron_cpu.Trainer(block, **OVERLAP)
        reason = new.pipeline.load_state_dict(state)
        count = new.pipeline.consumed_samples
        new.step()
        return reason, [stage.fresh for stage in new.pipeline.endpoints.stages], count


def figures() -> Any:
    with megatron_cpu.parallel(2, 2):
        trainer = megatron_cpu.Trainer(INT2, **CHUNKS)
        trainer.pipeline.measures_error = True
        trainer.step()
        return trainer.pipeline.clapping_report(), trainer.pipeline.clapping_traffic()


def disabled() -> Any:
    with megatron_cpu.parallel(2):
        trainer = megatron_cpu.Trainer({"enabled": False})
        trainer.step()
        assert trainer.pipeline.load_state_dict(trainer.pipeline.state_dict()) is None
        return trainer.run.__module__, trainer.pipeline.clapping_report()


def train_with(block: Any, change: str | None) -> list[Any]:
    """Of a script that does something wrong, on both ranks or on one."""
    with megatron_cpu.parallel(2, 2):
        rank = torch.distributed.get_rank()
        lengths = LENGTHS if change == "lengths" else {}
        trainer = megatron_cpu.Trainer(
            block[rank] if isinstance(block, list) else block, **OVERLAP, **lengths
        )
        run = trainer.run
        if change == "one iterator":
            trainer.data = trainer.data[:1]
        if change == "same iterator" and rank == 0:
            trainer.data = [trainer.data[0]] * 2
        if change == "micro-batches" and rank == 1:
            trainer.num_micro_batches = 8
        if change == "loss scale" and rank == 1:
            trainer.config.grad_scale_func = max
        if change == "adjusts":
            trainer.run = lambda **options: run(**options, adjust_tensor_shapes_fn=max)
        if change == "communicator":
            trainer.run = lambda **options: run(**options, p2p_communicator="mine")
        return [trainer.step() for _ in range(2)]


def tried_again(interrupts: bool) -> list[Any]:
    """Losses of four steps, in the second of which the iterator of the last stage may end at first."""
    with megatron_cpu.parallel(2, 2):
        trainer = megatron_cpu.Trainer({**INT2, "lazy": {"p_new": 0.75, "refresh": "slot"}}, **OVERLAP)
        last = trainer.data[-1]
        if interrupts and last is not None:
            trainer.data[-1] = iter([next(last) for _ in range(5)])
        losses, num_ends = [], 0
        while len(losses) < 4:
            try:
                losses.append(trainer.step())
            except StopIteration:
                num_ends += 1
                trainer.data[-1] = last
        return [losses, num_ends]


def from_source(source: Any) -> tuple[bool, str]:
    with megatron_cpu.parallel(2):
        config = MegatronPipeline(source, megatron_cpu.model_config(2)).config
        return config.enabled, config.strategy


def stalled(timeout_s: float, lengths: dict[str, Any]) -> tuple[str, float]:
    """The error of a step in which the second rank computes for too long, and how long it took."""
    with megatron_cpu.parallel(2):
        trainer = megatron_cpu.Trainer({**INT2, "timeout_s": timeout_s}, **lengths)
        trainer.step()
        if torch.distributed.get_rank() == 1:
            trainer.model[0].register_forward_pre_hook(lambda *_: time.sleep(timeout_s * 2))
        start = time.perf_counter()
        try:
            trainer.step()
        except ConnectionError as error:
            return str(error), time.perf_counter() - start
        return "", 0.0


# The example's GPT

SMALL = {"width": 32, "length": 64, "dtype": "float32", "clip_grad": 0.0, "warmup_steps": 1}


def trained_gpt(blocks: list[Any], sizes: dict[str, Any], steps: int) -> list[Any]:
    from launch.pretrain_gpt_megatron import MegatronRun, start_parallel, train

    run = MegatronRun(steps=steps, eval_interval=steps // 2, eval_batches=1, **SMALL, **sizes)
    with on_cpu():
        start_parallel(run)
        try:
            return [train(run, block and {"clapping": block}) for block in blocks]
        finally:
            megatron_cpu.parallel_state.destroy_model_parallel()


def tensor_parallel_gpt(blocks: list[Any]) -> list[Any]:
    from launch.pretrain_gpt_megatron import MegatronRun, Trainer, start_parallel

    run = MegatronRun(tensor_size=2, **SMALL)
    found = []
    with on_cpu():
        start_parallel(run)
        try:
            for block in blocks:
                trainer = Trainer(run, block and {"clapping": block})
                losses = [trainer.step() for _ in range(3)]
                held = megatron_cpu.memories(trainer.pipeline) if trainer.pipeline else {}
                found.append((losses, held))
            return found
        finally:
            megatron_cpu.parallel_state.destroy_model_parallel()


def parts_of_sequences(blocks: list[Any]) -> list[Any]:
    found = []
    with megatron_cpu.parallel(2, tensor_model_parallel_size=2):
        for block in blocks:
            trainer = megatron_cpu.Trainer(block, sequence_parallel=True, tensor_model_parallel_size=2)
            losses = [trainer.step() for _ in range(3)]
            found.append((losses, megatron_cpu.memories(trainer.pipeline) if trainer.pipeline else {}))
        return found
