"""What the codecs lose and cost, alone, on tensors captured in training."""
