"""The first steps of a run: watched, so that links and schedule can be set to what was measured.

Step 0 allocates and compiles, and is only weighed; the next two are timed; before the one after them all
ranks stop, measure links and codecs, and decide.
"""

from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager

import torch

from clapping_ds import report
from clapping_ds.autotune.decision import (
    Decision,
    Direction,
    Measured,
    check_writable,
    decide,
    describe_memory,
)
from clapping_ds.autotune.measurement import Passes, list_candidates, probe_links
from clapping_ds.config import LinksConfig
from clapping_ds.link.groups import Control, rank
from clapping_ds.stage.endpoints import Endpoints

NUM_STEPS_WATCHED = 3


class Tuning:
    """Of a rank with one stage, until the decision is made."""

    def __init__(self, endpoints: Endpoints, num_stages: int) -> None:
        self.endpoints = endpoints
        (self.stage,) = endpoints.stages
        self.config = endpoints.config
        self.control = endpoints.control
        self.num_stages = num_stages
        self.passes = Passes(endpoints.device)
        self.num_steps = 0
        self.decision: Decision | None = None
        """That was made or read in this run."""
        self.compresses_replicas: bool | None = None
        """What was found of the gradients of replicas."""
        links = self.config.links
        if links is not None and links.read is not None:
            self._adopt(_read_by_first_rank(self.control, links.read, num_stages))
        if links is not None and links.write is not None:
            path = links.write
            self.control.check(lambda: check_writable(path) if rank() == 0 else None)

    def restart(self) -> None:
        """After a load: what is still to be measured is measured in the steps to come."""
        self.passes = Passes(self.endpoints.device)
        self.num_steps = 0

    @property
    def has_links(self) -> bool:
        """False where replicas of a single stage compress their gradients alone."""
        return self.num_stages > 1

    @property
    def lacks_links(self) -> bool:
        return self.has_links and self.config.links is not None and not self.endpoints.links_are_measured

    @property
    def lacks_depth(self) -> bool:
        return self.has_links and self.config.in_flight == "auto" and not self.endpoints.depth_is_measured

    @property
    def is_watching(self) -> bool:
        return self.lacks_links or self.lacks_depth

    @contextmanager
    def watching(self, weighs: Iterable[torch.Tensor] | None = None) -> Iterator[None]:
        """Around each forward and backward pass. weighs: the parameters, in a forward pass."""
        with ExitStack() as stack:
            if self.is_watching and self.num_steps == 0 and weighs is not None:
                stack.enter_context(self.passes.weighed(weighs))
            if self.is_watching and self.num_steps > 0:
                stack.enter_context(self.passes.timed())
            yield

    def end_step(self, num_micro_batches: int) -> None:
        if self.is_watching:
            self.passes.end_step(num_micro_batches)
        self.num_steps += 1

    def settle(self, num_micro_batches: int, free_bytes: int | None) -> str | None:
        """Before a step. Once the watched steps are over, decides; what is to be printed, or None.
        A collective of all ranks in that step."""
        if not self.is_watching or self.num_steps < NUM_STEPS_WATCHED:
            return None
        links = self.config.links if self.lacks_links else None
        measured = self.control.gather(self._measured(links, free_bytes))
        sampling = self.endpoints.sampling if links is None else None
        decision = decide(measured, self.config, num_micro_batches, sampling)
        self._adopt(decision)
        if links is not None:
            self._write()
        advice = [] if links is None else decision.advice()
        memory = describe_memory(decision, measured, num_micro_batches)
        return "\n".join([decision.describe(), memory, *advice])

    def note_replicas(self, compresses: bool) -> None:
        """What was found of the gradients of replicas, for the file."""
        self.compresses_replicas = compresses
        self._write()

    def _write(self) -> None:
        """What this run did not find stays as the file has it."""
        links = self.config.links
        if links is None or links.write is None or rank() > 0:
            return
        try:
            known = Decision.read(links.write, self.num_stages)
        except ValueError:
            known = Decision(num_stages=self.num_stages, in_flight=0, stage_ms=0.0, choices=[])
        compresses = self.compresses_replicas
        if compresses is None and self.config.data_parallel is not None:
            compresses = known.compresses_replicas
        found = {"compresses_replicas": compresses}
        try:
            (self.decision or known).model_copy(update=found).write(links.write)
        except OSError as error:  # the other ranks go on
            report.say(f"clapping.links.write = {links.write!r}: {error.strerror}: nothing was written")

    def _adopt(self, decision: Decision) -> None:
        """What the configuration leaves open and no checkpoint has settled."""
        self.decision = decision
        if self.lacks_depth:
            self.stage.set_depth(decision.in_flight)
            self.endpoints.depth_is_measured = True
        if self.lacks_links:
            is_lazy = decision.lazy is None or decision.lazy.pays
            self.endpoints.set_lazy(is_lazy)
            for end, channel in self.stage.channels.items():
                codec = decision.codec(channel.link, channel.direction)
                plan = self.config.plan(end.direction)
                with_codec = plan.with_codec if is_lazy else plan.as_direct
                self.stage.set_plan(end, plan if codec is None else with_codec(codec))
            self.endpoints.links_are_measured = True

    def _measured(self, links: LinksConfig | None, free_bytes: int | None) -> Measured:
        """links: None where codecs are settled, by the block or by a checkpoint: they are weighed alone."""
        speeds = probe_links(self.stage)
        sent = []
        for end, speed in speeds.items():
            channel = self.stage.channels[end]
            raw_bytes = sum(spec.nbytes for spec in channel.specs)
            plan = channel.plan if links is None else self.config.plan(end.direction)
            options = list_candidates(channel, plan, links)
            sent.append(Direction(channel.link, channel.direction, raw_bytes, speed, options))
        compute_s = self.passes.find_per_micro_batch_s()
        return Measured(self.stage.stage_id, compute_s, self.passes.stored_bytes, free_bytes, sent)


def _read_by_first_rank(control: Control, path: str, num_stages: int) -> Decision:
    """The decision in a file that only the first rank needs to see. A collective of all ranks."""
    found = control.check(lambda: Decision.read(path, num_stages) if rank() == 0 else None)
    decision: Decision = control.gather(found)[0]
    return decision
