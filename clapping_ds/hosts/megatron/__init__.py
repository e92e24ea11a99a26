"""Megatron-Core: its schedules with a communicator and iterators of ours."""
