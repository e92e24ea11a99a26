"""DeepSpeed: its pipeline engine with channels in place of its sends."""
