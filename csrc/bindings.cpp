// Registers the CPU implementations of the ops that ensemw2s/ops declares.
#include <torch/csrc/stable/library.h>

#include "ops.h"

STABLE_TORCH_LIBRARY_IMPL(ensemw2s, CPU, m) {
  m.impl("mixture_log_probs", TORCH_BOX(&ensemw2s::mixture_log_probs_cpu));
  m.impl("mixture_sample", TORCH_BOX(&ensemw2s::mixture_sample_cpu));
  m.impl("token_scores", TORCH_BOX(&ensemw2s::token_scores_cpu));
  m.impl("mixture_scores", TORCH_BOX(&ensemw2s::mixture_scores_cpu));
  m.impl("weighted_cross_entropy", TORCH_BOX(&ensemw2s::cross_entropy_rows_cpu));
  m.impl("mixture_kl", TORCH_BOX(&ensemw2s::mixture_kl_rows_cpu));
  m.impl("topk_kl_rows", TORCH_BOX(&ensemw2s::topk_kl_rows_cpu));
}
