"""torch.distributed.pipelining: its schedules with stages that send through channels."""
