"""A checkpoint by the ranks that are left when others have ended: DeepSpeed's own save waits for all ranks.

Each survivor writes what it holds into the files of an ordinary checkpoint, without a message to another
rank. Replicas hold the same, so that one survivor per stage is enough.
"""

import os
import shutil
from pathlib import Path
from typing import Any

from deepspeed.checkpoint.utils import clone_tensors_for_torch_save
from deepspeed.runtime.pipe.engine import PipelineEngine


def save(engine: PipelineEngine, save_dir: Path, tag: str, client_state: dict[str, Any]) -> bool:
    """Writes this rank's part of the checkpoint `tag`; whether every stage's part is there now. Raises as
    `CheckpointingEngine.clapping_save_survivors`."""
    if engine.zero_optimization() or engine.bfloat16_enabled():
        raise ValueError(
            f"zero_optimization.stage = {engine.zero_optimization_stage()} (bf16: "
            f"{engine.bfloat16_enabled()}): the optimizer's state is split over replicas, and what ended "
            "ranks held is lost; accepted: stage 0 in fp32 or fp16"
        )
    folder, unfinished = save_dir / tag, save_dir / f"{tag}.unfinished_rank{engine.global_rank}"
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir(parents=True)
    folder.mkdir(exist_ok=True)
    for number, layer in enumerate(engine.module.forward_funcs):
        if hasattr(layer, "state_dict"):
            path = engine.module.ckpt_layer_path(str(unfinished), number)
            engine.checkpoint_engine.save(clone_tensors_for_torch_save(layer.state_dict()), path)
    state = engine._common_checkpoint_state(None, zero_optimizer_state=False, save_frozen_param=False)
    path = unfinished / Path(engine._get_ckpt_name(str(save_dir), tag)).name
    engine.checkpoint_engine.save({**state, **client_state}, str(path))
    for file in unfinished.iterdir():
        os.replace(file, folder / file.name)
    unfinished.rmdir()
    (folder / f"stage_{engine.stage_id}_is_whole").touch()
    return all((folder / f"stage_{stage}_is_whole").exists() for stage in range(engine.num_stages))
