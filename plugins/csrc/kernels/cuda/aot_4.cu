// Kernels for 4-bit codes in engines without a plugin library. Compiled to PTX only.
#include "kernels/cuda/aot.cuh"

RB_AOT(4)
