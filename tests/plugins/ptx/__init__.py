"""Runs PTX, the code that nvcc emits for a GPU, on the CPU: what ships is executed, lane by lane, without a GPU.

Only what the kernels of this project use is implemented, after the PTX manual (NVIDIA, "PTX ISA", 9.0); everything else
raises with its line.
"""
