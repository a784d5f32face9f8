# metafast_emulated, for the tests: the same ops over the CUDA kernels, which the host compiler takes from the same
# .cu files through the headers in tests/cuda_emulator. torch.ops.load_library loads it beside metafast._C.
# metafast_emulated_sanitized is the same with the kernels under AddressSanitizer and UndefinedBehaviorSanitizer. The
# target builds nothing where the compiler has no shared runtime for them.

set(CMAKE_CXX_FLAGS_RELEASE "-O1")  # the tests wait for the compiler more than for the kernels; asserts stay in

add_library(metafast_emulated_ops OBJECT)
target_link_libraries(metafast_emulated_ops PRIVATE metafast_ops)
target_compile_definitions(metafast_emulated_ops PRIVATE METAFAST_EMULATED METAFAST_NAMESPACE=metafast_emulated)

set(emulator "${PROJECT_SOURCE_DIR}/tests/cuda_emulator")
get_property(cuda_sources GLOBAL PROPERTY METAFAST_CUDA_SOURCES)
set_source_files_properties(${cuda_sources} PROPERTIES
  LANGUAGE CXX COMPILE_OPTIONS -Wno-unknown-pragmas)  # nvcc's

function(metafast_emulated_library name)
  add_library(${name} SHARED ${cuda_sources} "${emulator}/emulator.cpp" $<TARGET_OBJECTS:metafast_emulated_ops>)
  target_include_directories(${name} BEFORE PRIVATE "${emulator}")
  target_link_libraries(${name} PRIVATE metafast_flags torch)
  target_compile_options(${name} PRIVATE ${ARGN})
  target_link_options(${name} PRIVATE ${ARGN})
  set_target_properties(${name} PROPERTIES PREFIX "")
endfunction()

metafast_emulated_library(metafast_emulated)

include(CheckCXXSourceCompiles)
set(sanitize -fsanitize=address,undefined)
set(CMAKE_REQUIRED_FLAGS ${sanitize})
check_cxx_source_compiles("int main() {}" METAFAST_HAVE_SANITIZERS)
if(METAFAST_HAVE_SANITIZERS AND CMAKE_CXX_COMPILER_ID STREQUAL "GNU")
  metafast_emulated_library(metafast_emulated_sanitized
    # Without the checks that AddressSanitizer makes too: they are a quarter of the compiler's time.
    ${sanitize} -fno-sanitize=null,object-size,vptr -fno-sanitize-recover=all -fno-omit-frame-pointer -g1)
else()
  add_custom_target(metafast_emulated_sanitized)
endif()
