"""The codecs' Triton kernels. Each module has the functions of its twin in `codecs.reference`, which take the
same arguments and leave the same bits; the formulas stand in the modules of `codecs`, whose classes import
this folder when a tensor is on a GPU.

Prefixes of names inside kernels: b_ a block of values in registers, o_ offsets, m_ a mask, p_ a pointer;
capitals are constants of the compilation. Program ids and offsets into tensors are int64.
"""
