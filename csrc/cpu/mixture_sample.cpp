#include "mixture.h"

#include "kernel_headers.h"

#define ENSEMW2S_KERNELS "mixture_sample.inc"
#include "targets.inc"

namespace ensemw2s {

void mixture_sample(const Mixture& mixture, const SampleSettings& settings, const SampleOutputs& outputs) {
  SampleSettings effective = settings;
  if (settings.top_k >= mixture.vocabulary) effective.top_k = 0;
  if (settings.temperature < kColdest) effective.temperature = 0;
  ENSEMW2S_RUN(mixture.dtype, sample_rows, mixture, effective, outputs)
}

}  // namespace ensemw2s
