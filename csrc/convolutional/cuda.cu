// CUDA kernels of the convolutional family and their launchers.
#include "convolutional/cuda_block_backward.h"
#include "convolutional/cuda_block_forward.h"
#include "convolutional/cuda_convolve.h"
#include "convolutional/cuda_loss.h"
#include "convolutional/cuda_permute.h"
#include "convolutional/cuda_thin.h"
#include "convolutional/cuda_weights.h"

namespace metafast::cuda {

#define METAFAST_INSTANTIATE(Params)                  \
  template void launch(const Params<float>&, Stream); \
  template void launch(const Params<double>&, Stream);
METAFAST_INSTANTIATE(Convolve)
METAFAST_INSTANTIATE(ConvolveWeights)
METAFAST_INSTANTIATE(BlockForward)
METAFAST_INSTANTIATE(BlockBackward)
METAFAST_INSTANTIATE(ThinMoments)
METAFAST_INSTANTIATE(OutputGradient)
METAFAST_INSTANTIATE(Permute)
#undef METAFAST_INSTANTIATE
template void launch(const PairRows<float>&, Stream);

}  // namespace metafast::cuda
