"""The codecs in plain torch: the truth that the Triton kernels are tested against, and the CPU path.

Every public function takes what its Triton twin takes, writes the same arguments, and gives the same
bits; the formulas stand in the docstrings of the modules of the same name in `clapping_ds.codecs`.
Arithmetic is fp32.

Suffixes: G groups or blocks, S values of one, K values kept of one.
"""
