"""`python -m clapping_ds.doctor`: what to run first on a new machine.

    python -m clapping_ds.doctor                                        one process: this machine alone
    torchrun --nproc_per_node 2 -m clapping_ds.doctor                   any number of ranks and nodes
    deepspeed --module clapping_ds.doctor --config ds_config.json       the same, and the block of a JSON

It looks at versions, devices, environment, network and folders, then lets the ranks do what they will do in
training, and prints a line for each. `visit` runs the checks, `checks` lists them.
"""
