"""How close the compiled kernels come to the least that they could cost."""
