"""DeepSpeed: its pipeline engine with channels in place of its sends."""

try:
    import deepspeed as deepspeed
except ImportError as error:
    raise ImportError(
        f"clapping_ds.hosts.deepspeed needs DeepSpeed ({error}); tested: 0.19.8; "
        "install clapping_ds[deepspeed]"
    ) from error
