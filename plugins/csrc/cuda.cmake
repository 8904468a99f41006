# The libraries with CUDA kernels: ONNX Runtime's and the TensorRT plugin library.

set(RANKBOOK_CUDA "AUTO" CACHE STRING "Build the libraries with CUDA kernels: AUTO (if nvcc and headers are found), ON, OFF")
# Cubins of one major architecture run on its later members: 80 serves 86, 87 and 89, and 120 serves 121. Everything
# else (B200) is translated from the PTX when the library is loaded. Others can be asked for: 75, 86, 87, 89, 100, 121.
set(RANKBOOK_CUDA_ARCHITECTURES "80;90-real;120-real" CACHE STRING "GPU architectures, as in CMAKE_CUDA_ARCHITECTURES")
set(TENSORRT_INCLUDE_DIR "" CACHE PATH "Folder with NvInferRuntime.h")

# Says why libraries are not built; fatal where they were asked for.
function(rankbook_leave_out what reason)
  if(RANKBOOK_CUDA STREQUAL "ON")
    message(FATAL_ERROR "RANKBOOK_CUDA is ON, but ${reason}")
  endif()
  message(WARNING "LEFT OUT: ${what}, because ${reason} (`make native-cuda` gets headers and compiler). "
                  "rankbook works without it; on a GPU the function bodies run, more slowly.")
endfunction()

if(RANKBOOK_CUDA STREQUAL "OFF")
  message(STATUS "RANKBOOK_CUDA is OFF: the libraries with CUDA kernels are not built")
  return()
endif()
# nvcc of the environment, of PATH, of the usual folder, or of the wheels that the Makefile puts into build/.
if(NOT CMAKE_CUDA_COMPILER)
  unset(CMAKE_CUDA_COMPILER CACHE) # an earlier run may have found none
  if(NOT DEFINED ENV{CUDACXX})
    find_program(RANKBOOK_NVCC nvcc PATHS /usr/local/cuda/bin ${PROJECT_SOURCE_DIR}/build/cuda-tools/nvidia/cu13/bin)
    if(RANKBOOK_NVCC)
      set(ENV{CUDACXX} ${RANKBOOK_NVCC})
    endif()
  endif()
  check_language(CUDA)
endif()
if(NOT CMAKE_CUDA_COMPILER)
  rankbook_leave_out("CUDA kernels for TensorRT and ONNX Runtime" "no working CUDA compiler was found: install the CUDA toolkit")
  return()
endif()
set(CMAKE_CUDA_ARCHITECTURES "${RANKBOOK_CUDA_ARCHITECTURES}")
set(CMAKE_CUDA_STANDARD 17)
set(CMAKE_CUDA_VISIBILITY_PRESET hidden)
enable_language(CUDA)
message(STATUS "CUDA ${CMAKE_CUDA_COMPILER_VERSION} for ${CMAKE_CUDA_ARCHITECTURES}")
# Machine code for several architectures is nearly all of these libraries. Compressed for size it takes an eighth; every
# driver that runs code of CUDA 13 unpacks it.
set(RANKBOOK_CUDA_COMPRESS "")
if(CMAKE_CUDA_COMPILER_VERSION VERSION_GREATER_EQUAL 13.0)
  set(RANKBOOK_CUDA_COMPRESS --compress-mode=size)
endif()

add_library(rankbook_cuda_kernels OBJECT
  kernels/cuda/launch.cu
  kernels/cuda/experts_2.cu kernels/cuda/experts_3.cu kernels/cuda/experts_4.cu kernels/cuda/experts_8.cu
  kernels/cuda/int8_2.cu kernels/cuda/int8_3.cu kernels/cuda/int8_4.cu kernels/cuda/int8_8.cu
  kernels/cuda/width_2.cu kernels/cuda/width_3.cu kernels/cuda/width_4.cu kernels/cuda/width_8.cu)
target_include_directories(rankbook_cuda_kernels PRIVATE ${CMAKE_CURRENT_SOURCE_DIR})
# --expt-relaxed-constexpr: constexpr members of the argument structures serve both sides.
target_compile_options(rankbook_cuda_kernels PRIVATE --expt-relaxed-constexpr -Werror=all-warnings ${RANKBOOK_CUDA_COMPRESS})

# Kernels as PTX of the oldest architecture that is served, for engines that hold them (plugins/aot.py).
add_library(rankbook_aot OBJECT
  kernels/cuda/aot_2.cu kernels/cuda/aot_3.cu kernels/cuda/aot_4.cu kernels/cuda/aot_8.cu)
target_include_directories(rankbook_aot PRIVATE ${CMAKE_CURRENT_SOURCE_DIR})
target_compile_options(rankbook_aot PRIVATE --expt-relaxed-constexpr -Werror=all-warnings)
set_target_properties(rankbook_aot PROPERTIES CUDA_PTX_COMPILATION ON CUDA_ARCHITECTURES 80-virtual)
install(FILES $<TARGET_OBJECTS:rankbook_aot> DESTINATION rankbook/plugins/lib COMPONENT native)

# ------------------------------------------------------------------------------------------------ ONNX Runtime
# A second file, for it holds machine code for every GPU and is ten times as large.
if(RANKBOOK_ORT_INCLUDE)
  rankbook_add_ort_library(rankbook_ort_cuda shims/ort_cuda/cuda_ops.cpp shims/c/kernels.cpp)
  target_link_libraries(rankbook_ort_cuda PRIVATE rankbook_cuda_kernels)
  target_include_directories(rankbook_ort_cuda SYSTEM PRIVATE ${CMAKE_CUDA_TOOLKIT_INCLUDE_DIRECTORIES})
  set_target_properties(rankbook_ort_cuda PROPERTIES CUDA_RUNTIME_LIBRARY Static)
endif()

# ------------------------------------------------------------------------------------------------ TensorRT
find_path(RANKBOOK_TRT_INCLUDE NvInferRuntime.h
  HINTS "${TENSORRT_INCLUDE_DIR}" "$ENV{TENSORRT_INCLUDE_DIR}" "${PROJECT_SOURCE_DIR}/build/tensorrt-headers/kernel_lens/include/tensorrt"
  PATHS /usr/local/tensorrt/include
  PATH_SUFFIXES x86_64-linux-gnu aarch64-linux-gnu)
if(NOT RANKBOOK_TRT_INCLUDE)
  rankbook_leave_out("the TensorRT plugin library" "NvInferRuntime.h was not found: set TENSORRT_INCLUDE_DIR")
  return()
endif()
message(STATUS "TensorRT headers: ${RANKBOOK_TRT_INCLUDE}")

add_library(rankbook_trt MODULE
  shims/trt/creator.cpp shims/trt/operator.cpp shims/trt/plugin.cpp shims/view.cpp)
target_link_libraries(rankbook_trt PRIVATE rankbook_flags rankbook_cuda_kernels)
target_include_directories(rankbook_trt SYSTEM PRIVATE ${RANKBOOK_TRT_INCLUDE} ${CMAKE_CUDA_TOOLKIT_INCLUDE_DIRECTORIES})
set_target_properties(rankbook_trt PROPERTIES CUDA_RUNTIME_LIBRARY Static LINK_DEPENDS ${CMAKE_CURRENT_SOURCE_DIR}/shims/trt/exports.map)
if(NOT RANKBOOK_SANITIZE)
  target_link_options(rankbook_trt PRIVATE -static-libstdc++ -static-libgcc)
endif()
target_link_options(rankbook_trt PRIVATE
  LINKER:--version-script,${CMAKE_CURRENT_SOURCE_DIR}/shims/trt/exports.map LINKER:--gc-sections)
install(TARGETS rankbook_trt LIBRARY DESTINATION rankbook/plugins/lib COMPONENT native)
