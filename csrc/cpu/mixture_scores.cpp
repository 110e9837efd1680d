#include "losses.h"

#include "kernel_headers.h"

#define ENSEMW2S_KERNELS "mixture_scores.inc"
#include "targets.inc"

namespace ensemw2s {

void mixture_scores(const Mixture& mixture, const int64_t* labels, const Scores& scores) {
  ENSEMW2S_RUN(mixture.dtype, mixture_scores_of_rows, mixture, labels, scores)
}

}  // namespace ensemw2s
