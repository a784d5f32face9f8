# The imported target `torch`: headers, libraries and OpenMP runtime of the torch that this Python imports.
#
# Not find_package(Torch): with CUDA it demands every CUDA library, overrides the architectures, and it leaves
# torch_python out. What an extension needs are the paths below.

execute_process(
  COMMAND "${Python_EXECUTABLE}" -c "
import os, torch
root = os.path.dirname(torch.__file__)
print(root, torch.__version__, torch.version.cuda or '', int(torch.compiled_with_cxx11_abi()), sep=';', end='')"
  OUTPUT_VARIABLE torch_answer ERROR_VARIABLE torch_error RESULT_VARIABLE torch_result)
if(NOT torch_result EQUAL 0)
  message(FATAL_ERROR "metafast compiles against an installed torch, and ${Python_EXECUTABLE} cannot import it:\n"
    "${torch_error}\nInstall torch first, then: pip install --no-build-isolation .")
endif()
list(GET torch_answer 0 TORCH_ROOT)
list(GET torch_answer 1 TORCH_VERSION)
list(GET torch_answer 2 TORCH_CUDA)  # empty: built without
list(GET torch_answer 3 TORCH_CXX11_ABI)
message(STATUS "torch ${TORCH_VERSION} in ${TORCH_ROOT}, CUDA ${TORCH_CUDA}")

add_library(torch INTERFACE IMPORTED)
# SYSTEM: torch's own warnings are not ours. pybind11 comes from these headers too, not from pip: torch's type
# casters and exceptions are shared between modules only where the pybind11 internals version agrees.
target_include_directories(torch SYSTEM INTERFACE
  "${TORCH_ROOT}/include" "${TORCH_ROOT}/include/torch/csrc/api/include")
target_compile_definitions(torch INTERFACE _GLIBCXX_USE_CXX11_ABI=${TORCH_CXX11_ABI})

set(torch_libraries torch torch_cpu torch_python c10)
if(TORCH_CUDA)
  list(APPEND torch_libraries torch_cuda c10_cuda)
endif()
foreach(name IN LISTS torch_libraries)
  target_link_libraries(torch INTERFACE "${TORCH_ROOT}/lib/${CMAKE_SHARED_LIBRARY_PREFIX}${name}${CMAKE_SHARED_LIBRARY_SUFFIX}")
endforeach()

# One OpenMP runtime per process, torch's: with a second one there are two thread pools, and torch.set_num_threads
# rules only the other. A torch that carries no copy was linked with the system's, which find_package finds.
find_package(OpenMP REQUIRED COMPONENTS CXX)
add_library(torch_openmp INTERFACE IMPORTED)
target_compile_options(torch_openmp INTERFACE $<$<COMPILE_LANGUAGE:CXX>:${OpenMP_CXX_FLAGS}>)
file(GLOB openmp_runtime "${TORCH_ROOT}/lib/libgomp*${CMAKE_SHARED_LIBRARY_SUFFIX}*"
  "${TORCH_ROOT}/lib/libiomp5*${CMAKE_SHARED_LIBRARY_SUFFIX}*" "${TORCH_ROOT}/lib/libomp*${CMAKE_SHARED_LIBRARY_SUFFIX}*")
if(openmp_runtime)
  list(GET openmp_runtime 0 openmp_runtime)
else()
  set(openmp_runtime OpenMP::OpenMP_CXX)
endif()
message(STATUS "OpenMP runtime: ${openmp_runtime}")
target_link_libraries(torch_openmp INTERFACE "${openmp_runtime}")
target_link_libraries(torch INTERFACE torch_openmp)
