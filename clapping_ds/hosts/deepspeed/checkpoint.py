"""Checkpoints of a DeepSpeed pipeline that hold our state as well, whole at any moment.

Each rank writes its own file into the checkpoint's folder, under another name until it is complete. The
file `latest` is replaced after all ranks have written everything, so that a run that is killed at any moment
finds a complete checkpoint there. (Stock DeepSpeed's first rank does not wait for the others.)
"""

import os
from pathlib import Path
from typing import Any

from deepspeed.runtime.pipe.engine import PipelineEngine

from clapping_ds import report
from clapping_ds.autotune.tuning import Tuning
from clapping_ds.config import ClappingConfig
from clapping_ds.hosts.deepspeed import survivors
from clapping_ds.hosts.deepspeed.gradients import Gradients
from clapping_ds.link.groups import Control
from clapping_ds.stage import state_file
from clapping_ds.stage.endpoints import Endpoints

NUM_DRAWN = "clapping_num_drawn"
"""The key in a checkpoint's client state of the batches that each data iterator has given."""
GRADIENTS = "data_parallel"
"""The key in a rank's own file of what the exchange of gradients holds."""


class CheckpointingEngine(PipelineEngine):
    """`save_checkpoint` and `load_checkpoint` of an engine with endpoints of ours."""

    clapping: ClappingConfig
    _control: Control
    _endpoints: Endpoints
    _tuning: Tuning
    _gradients: Gradients | None
    micro_batches: int

    def save_checkpoint(
        self,
        save_dir: str,
        tag: str | None = None,
        client_state: dict[str, Any] | None = None,
        save_latest: bool = True,
        **kwargs: Any,
    ) -> Any:
        """As `DeepSpeedEngine.save_checkpoint`; `latest` is written last, in one piece."""
        client_state = {} if client_state is None else client_state
        if not self.clapping.enabled:
            return super().save_checkpoint(save_dir, tag, client_state, save_latest, **kwargs)
        client_state = {**client_state, NUM_DRAWN: self._endpoints.num_drawn}
        tag = f"global_step{self.global_steps}" if tag is None else str(tag)
        if self.clapping.checkpoint_memory:
            state = self._endpoints.state_dict()
            if self._gradients is not None:
                state[GRADIENTS] = self._gradients.averaging.state_dict()
            state_file.write(state, Path(save_dir) / tag)
        result = super().save_checkpoint(save_dir, tag, client_state, save_latest=False, **kwargs)
        self._control.wait_for_all()
        if save_latest and self.global_rank == 0:
            _replace_latest(Path(save_dir), tag)
        self._control.wait_for_all()  # or a load that follows at once finds another one on another rank
        return result

    def clapping_save_survivors(self, save_dir: str, client_state: dict[str, Any] | None = None) -> bool:
        """For each rank that is left after a ConnectionError: saves the last finished step, with no message
        to any other rank. Returns whether a survivor of every stage has, which makes it `latest`; ranks that
        stopped at different steps write different checkpoints. The next run's first step is all fresh.
        Raises ValueError with a ZeRO stage above 0, or bf16, and over NCCL."""
        if any(stage.queues for stage in self._endpoints.stages):
            raise ValueError(
                "clapping_save_survivors over NCCL, where the GPU waits for messages of a rank that has "
                "ended; accepted: process groups of gloo"
            )
        client_state = {**(client_state or {}), NUM_DRAWN: self._endpoints.num_drawn}
        tag = f"survivors_step{self.global_steps}_{self._endpoints.run_id}"
        is_whole = survivors.save(self, Path(save_dir), tag, client_state)
        if is_whole:
            _replace_latest(Path(save_dir), tag)
        return is_whole

    def load_checkpoint(self, load_dir: str, *args: Any, **kwargs: Any) -> Any:
        """As `DeepSpeedEngine.load_checkpoint`. Where our state is missing on a rank, or is of another
        configuration, the next step is all fresh, and the first rank says why. The data iterator is the
        caller's: `clapping_num_drawn` batches were taken from it."""
        path, client_state = super().load_checkpoint(load_dir, *args, **kwargs)
        if self.clapping.enabled:
            self.reset_activation_shape()
            state, num_drawn = None, self._endpoints.num_drawn
            if path is not None and self.clapping.checkpoint_memory:
                state = state_file.read(Path(path).parent)
            reason = self._endpoints.load_state_dict(state, self.micro_batches)
            self._tuning.restart()
            if reason is not None:
                if path is not None:
                    of_stock = self.global_steps * self.micro_batches
                    num_drawn = (client_state or {}).get(NUM_DRAWN, of_stock)
                self._endpoints.num_drawn = num_drawn
                if self.global_rank == 0:
                    report.say(f"{reason}: the next step is all fresh, and codecs learn anew")
            if self._gradients is not None:
                held = (state or {}).get(GRADIENTS)
                reason = self._gradients.averaging.load_state_dict(held, self.global_steps)
                if reason is not None and self.global_rank == 0:
                    report.say(f"{reason}: what gradients' codecs have kept back is lost")
        return path, client_state

    @property
    def clapping_num_drawn(self) -> int:
        """Batches that the finished steps took from each data iterator."""
        return self._endpoints.num_drawn if self.clapping.enabled else self.global_steps * self.micro_batches


def _replace_latest(save_dir: Path, tag: str) -> None:
    """Makes the checkpoint `tag` the one that is loaded by default, in one piece."""
    unfinished = save_dir / f"latest.unfinished_{os.getpid()}"
    unfinished.write_text(tag)
    os.replace(unfinished, save_dir / "latest")
