# metafast._C, the Python module.

Python_add_library(_C MODULE WITH_SOABI csrc/bindings.cpp)
target_link_libraries(_C PRIVATE metafast_ops)
target_compile_definitions(_C PRIVATE METAFAST_NAMESPACE=metafast)
list(JOIN METAFAST_CUDA_ARCHITECTURES "," cuda_architectures)  # a semicolon would end the definition
set_source_files_properties(csrc/bindings.cpp PROPERTIES COMPILE_DEFINITIONS
  "METAFAST_VERSION=\"${PROJECT_VERSION}\";METAFAST_CUDA_ARCHITECTURES=\"${cuda_architectures}\"")

if(METAFAST_WITH_CUDA)
  # An object library of its own without torch's headers: what nvcc reads stays torch-free.
  get_property(cuda_sources GLOBAL PROPERTY METAFAST_CUDA_SOURCES)
  add_library(metafast_cuda OBJECT ${cuda_sources})
  target_link_libraries(metafast_cuda PRIVATE metafast_flags)
  target_link_libraries(_C PRIVATE metafast_cuda CUDA::cudart)
  target_compile_definitions(_C PRIVATE METAFAST_WITH_CUDA)
endif()

# torch is imported first, so its libraries are in the process already; this finds them for other tools (ldd), and
# names no folder of the machine that built.
set_target_properties(_C PROPERTIES BUILD_WITH_INSTALL_RPATH ON INSTALL_RPATH "$ORIGIN/../torch/lib")
install(TARGETS _C LIBRARY DESTINATION metafast)

# What the module was built against, readable without loading it: metafast/_dispatch/load.py compares before it does.
configure_file("${PROJECT_SOURCE_DIR}/cmake/_built.py.in" "${PROJECT_BINARY_DIR}/_built.py" @ONLY)
install(FILES "${PROJECT_BINARY_DIR}/_built.py" DESTINATION metafast)
