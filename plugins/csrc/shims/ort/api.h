#pragma once

// ONNX Runtime's C++ API, initialized by RegisterCustomOps with the API of the runtime that loads the library.
#define ORT_API_MANUAL_INIT
#include <onnxruntime_cxx_api.h>
#undef ORT_API_MANUAL_INIT
