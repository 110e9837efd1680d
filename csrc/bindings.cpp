// Registers the CPU implementations of the ops that ensemw2s/ops declares.
#include <torch/csrc/stable/library.h>

#include "ops.h"

STABLE_TORCH_LIBRARY_IMPL(ensemw2s, CPU, m) {
  m.impl("mixture_log_probs", TORCH_BOX(&ensemw2s::mixture_log_probs_cpu));
  m.impl("mixture_sample", TORCH_BOX(&ensemw2s::mixture_sample_cpu));
}
