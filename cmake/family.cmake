# metafast_family(<name> [more sources]): one family of ops, csrc/<name>/{cpu.cpp,cuda.cu,op.cpp,autograd.cpp}.
#
# It adds to the interface library `metafast_ops`, which the Python module and, in the tests, metafast_emulated link:
# op.cpp and autograd.cpp are compiled by each of them, the torch-free kernels here, once.

add_library(metafast_flags INTERFACE)
# Contraction is GCC's default and not Clang's: said here, so that a*b+c is one FMA wherever the target has it.
target_compile_options(metafast_flags INTERFACE
  $<$<COMPILE_LANGUAGE:CXX>:-Wall;-Wextra;-ffp-contract=fast>
  $<$<COMPILE_LANGUAGE:CUDA>:-lineinfo;--expt-relaxed-constexpr;-Xcompiler=-Wall;-Xcompiler=-Wextra>)
# Assertions and torch's checks carry file names: relative ones, so that a wheel names no folder of its build machine.
target_compile_options(metafast_flags INTERFACE $<$<COMPILE_LANGUAGE:CXX>:
  -ffile-prefix-map=${PROJECT_SOURCE_DIR}/=;-ffile-prefix-map=${TORCH_ROOT}/=torch/>)
target_include_directories(metafast_flags INTERFACE "${PROJECT_SOURCE_DIR}/csrc")

add_library(metafast_ops INTERFACE)
find_package(Threads REQUIRED)
target_link_libraries(metafast_ops INTERFACE metafast_flags torch Threads::Threads)

set(METAFAST_ISAS baseline)
if(CMAKE_SYSTEM_PROCESSOR MATCHES "^(x86_64|AMD64|amd64)$")
  list(APPEND METAFAST_ISAS avx2 avx512)
  target_compile_definitions(metafast_ops INTERFACE METAFAST_HAVE_AVX2 METAFAST_HAVE_AVX512)
endif()
set(METAFAST_FLAGS_baseline)
set(METAFAST_FLAGS_avx2 -mavx2 -mfma -mf16c)
set(METAFAST_FLAGS_avx512 -mavx512f -mavx512bw -mavx512dq -mavx512vl -mfma -mf16c -mprefer-vector-width=512)

# csrc/<family>/cpu.cpp once for each instruction set; METAFAST_ISA names the C++ namespace its code lives in, so
# that the linker never merges two of them.
function(metafast_cpu_kernels family)
  if(METAFAST_EMULATED)  # which runs the CUDA kernels alone
    return()
  endif()
  foreach(isa IN LISTS METAFAST_ISAS)
    set(target metafast_${family}_${isa})
    add_library(${target} OBJECT "${PROJECT_SOURCE_DIR}/csrc/${family}/cpu.cpp")
    target_compile_definitions(${target} PRIVATE METAFAST_ISA=${isa})
    # The kernels are vectorised by hand (common/simd.h), and g++ 12 crashes in this pass on them.
    target_compile_options(${target} PRIVATE ${METAFAST_FLAGS_${isa}} -fno-tree-slp-vectorize)
    target_link_libraries(${target} PRIVATE metafast_flags torch_openmp)
    target_sources(metafast_ops INTERFACE $<TARGET_OBJECTS:${target}>)
  endforeach()
endfunction()

function(metafast_cuda_kernels family)
  set_property(GLOBAL APPEND PROPERTY METAFAST_CUDA_SOURCES "${PROJECT_SOURCE_DIR}/csrc/${family}/cuda.cu")
endfunction()

function(metafast_family family)
  metafast_cpu_kernels(${family})
  metafast_cuda_kernels(${family})
  set(folder "${PROJECT_SOURCE_DIR}/csrc/${family}")
  list(TRANSFORM ARGN PREPEND "${folder}/" OUTPUT_VARIABLE others)
  target_sources(metafast_ops INTERFACE "${folder}/op.cpp" "${folder}/autograd.cpp" ${others})
endfunction()

# csrc/common holds the kernels that families share, and no ops.
metafast_cpu_kernels(common)
metafast_cuda_kernels(common)
