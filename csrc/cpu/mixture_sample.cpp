#include "mixture.h"

#include "kernel_headers.h"

#define ENSEMW2S_KERNELS "mixture_sample.inc"
#include "targets.inc"

namespace ensemw2s {

void mixture_sample(const Mixture& mixture, const SampleSettings& settings, const SampleOutputs& outputs) {
  ENSEMW2S_RUN(mixture.dtype, sample_rows, mixture, settings, outputs)
}

}  // namespace ensemw2s
