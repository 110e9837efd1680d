#include "losses.h"

#include "kernel_headers.h"

#define ENSEMW2S_KERNELS "token_scores.inc"
#include "targets.inc"

namespace ensemw2s {

void token_scores(const Logits& logits, const int64_t* labels, const Scores& scores) {
  ENSEMW2S_RUN(logits.dtype, token_scores_of_rows, logits, labels, scores)
}

}  // namespace ensemw2s
