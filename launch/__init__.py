"""Example scripts: a GPT that is trained over a DeepSpeed or Megatron-Core pipeline."""
