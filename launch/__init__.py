"""Example scripts: a GPT that is trained over a DeepSpeed pipeline."""
