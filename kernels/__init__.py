"""One training step of many small networks. Each file: the definition in plain torch, then its kernel, then its launcher.

A definition `x_ref` computes ONE run, in any float dtype, from plain 2-D tensors. It is the oracle for the kernels and, walked
over the runs of an ensemble, the CPU path. A run's bits therefore cannot depend on its neighbours.
"""
