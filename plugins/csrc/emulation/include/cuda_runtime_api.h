// What TensorRT's headers need of CUDA's, for plugin tests on a machine without the toolkit.
#pragma once

using cudaStream_t = struct CUstream_st*;
using cudaEvent_t = struct CUevent_st*;
