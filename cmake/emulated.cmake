# metafast_emulated, for the tests: the same ops over the CUDA kernels, which the host compiler takes from the same
# .cu files through the headers in tests/cuda_emulator. torch.ops.load_library loads it beside metafast._C.

set(emulator "${PROJECT_SOURCE_DIR}/tests/cuda_emulator")
file(GLOB emulator_sources CONFIGURE_DEPENDS "${emulator}/*.cpp")
get_property(cuda_sources GLOBAL PROPERTY METAFAST_CUDA_SOURCES)
set_source_files_properties(${cuda_sources} PROPERTIES
  LANGUAGE CXX COMPILE_OPTIONS -UNDEBUG)  # device-side asserts are in every build

add_library(metafast_emulated SHARED ${cuda_sources} ${emulator_sources})
target_include_directories(metafast_emulated BEFORE PRIVATE "${emulator}")
target_compile_definitions(metafast_emulated PRIVATE METAFAST_EMULATED METAFAST_NAMESPACE=metafast_emulated)
target_link_libraries(metafast_emulated PRIVATE metafast_ops)
set_target_properties(metafast_emulated PROPERTIES
  PREFIX "" LIBRARY_OUTPUT_DIRECTORY "${METAFAST_EMULATED_OUTPUT}")
if(METAFAST_SANITIZE)
  target_compile_options(metafast_emulated PRIVATE -fsanitize=${METAFAST_SANITIZE} -fno-omit-frame-pointer -O1 -g)
  target_link_options(metafast_emulated PRIVATE -fsanitize=${METAFAST_SANITIZE})
endif()
