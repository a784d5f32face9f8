# Decides METAFAST_WITH_CUDA from METAFAST_CUDA, torch and nvcc, never from the presence of a GPU.

find_program(METAFAST_NVCC nvcc HINTS "${CUDAToolkit_ROOT}" ENV CUDA_HOME ENV CUDA_PATH
  PATHS /usr/local/cuda PATH_SUFFIXES bin)

if(METAFAST_CUDA STREQUAL "AUTO")
  if(TORCH_CUDA AND METAFAST_NVCC)
    set(METAFAST_WITH_CUDA ON)
  else()
    set(METAFAST_WITH_CUDA OFF)
  endif()
elseif(METAFAST_CUDA STREQUAL "ON")
  if(NOT TORCH_CUDA)
    message(FATAL_ERROR "METAFAST_CUDA=ON, but torch ${TORCH_VERSION} in ${TORCH_ROOT} was built without CUDA. "
      "Install a CUDA build of torch into this environment, or build the CPU kernels alone with METAFAST_CUDA=OFF.")
  elseif(NOT METAFAST_NVCC)
    message(FATAL_ERROR "METAFAST_CUDA=ON, but nvcc was not found. Install the CUDA ${TORCH_CUDA} toolkit and put "
      "its bin folder on PATH or its root in CUDA_HOME, or build the CPU kernels alone with METAFAST_CUDA=OFF.")
  endif()
  set(METAFAST_WITH_CUDA ON)
elseif(METAFAST_CUDA STREQUAL "OFF")
  set(METAFAST_WITH_CUDA OFF)
else()
  message(FATAL_ERROR "METAFAST_CUDA must be AUTO, ON or OFF, got '${METAFAST_CUDA}'")
endif()
message(STATUS "METAFAST_CUDA=${METAFAST_CUDA}: CUDA kernels ${METAFAST_WITH_CUDA} "
  "(torch built with CUDA: '${TORCH_CUDA}', nvcc: ${METAFAST_NVCC})")
if(NOT METAFAST_WITH_CUDA)
  return()
endif()

if(NOT METAFAST_CUDA_ARCHITECTURES)
  # Ampere, Hopper, and data-centre Blackwell where nvcc knows it; PTX of the newest for whatever comes later.
  execute_process(COMMAND "${METAFAST_NVCC}" --list-gpu-arch OUTPUT_VARIABLE known_architectures)
  if(known_architectures MATCHES "compute_100\n")
    set(METAFAST_CUDA_ARCHITECTURES 80-real 90-real 100)
  else()
    set(METAFAST_CUDA_ARCHITECTURES 80-real 90)
  endif()
endif()
set(CMAKE_CUDA_ARCHITECTURES ${METAFAST_CUDA_ARCHITECTURES})
set(CMAKE_CUDA_COMPILER "${METAFAST_NVCC}")
set(CMAKE_CUDA_STANDARD 20)
set(CMAKE_CUDA_STANDARD_REQUIRED ON)
set(CMAKE_CUDA_FLAGS_RELEASE "-O3")  # CMake's own adds -DNDEBUG, which takes the device-side asserts out
set(CMAKE_CUDA_VISIBILITY_PRESET hidden)
set(CMAKE_CUDA_RUNTIME_LIBRARY Shared)  # the one torch has loaded
enable_language(CUDA)

string(REGEX MATCH "^[0-9]+" torch_cuda_major "${TORCH_CUDA}")
string(REGEX MATCH "^[0-9]+" nvcc_major "${CMAKE_CUDA_COMPILER_VERSION}")
if(NOT torch_cuda_major EQUAL nvcc_major)
  message(FATAL_ERROR "torch ${TORCH_VERSION} was built with CUDA ${TORCH_CUDA}, but ${METAFAST_NVCC} is CUDA "
    "${CMAKE_CUDA_COMPILER_VERSION}: one process cannot hold two runtimes. Point CUDA_HOME at a CUDA "
    "${torch_cuda_major} toolkit, install a torch for CUDA ${nvcc_major}, or build with METAFAST_CUDA=OFF.")
endif()
find_package(CUDAToolkit REQUIRED)
