#include "mixture.h"

#include "kernel_headers.h"

#define ENSEMW2S_KERNELS "mixture_log_probs.inc"
#include "targets.inc"

namespace ensemw2s {

void mixture_log_probs(const Mixture& mixture, float* log_probs) {
  ENSEMW2S_RUN(mixture.dtype, log_probs_of_rows, mixture, log_probs)
}

}  // namespace ensemw2s
