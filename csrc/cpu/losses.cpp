#include "losses.h"

#include "kernel_headers.h"

#define ENSEMW2S_KERNELS "losses.inc"
#include "targets.inc"

namespace ensemw2s {

void cross_entropy_rows(const Logits& logits, const int64_t* labels, const float* row_weights, float* losses,
                        float* gradient) {
  ENSEMW2S_RUN(logits.dtype, cross_entropy_of_rows, logits, labels, row_weights, losses, gradient)
}

void mixture_kl_rows(const Logits& student, const Mixture& teacher, const float* row_weights, float* losses,
                     float* gradient) {
  ENSEMW2S_RUN(student.dtype, mixture_kl_of_rows, student, teacher, row_weights, losses, gradient)
}

void topk_kl_rows(const Logits& student, const TopK& teacher, const float* row_weights, float* losses,
                  float* gradient) {
  ENSEMW2S_RUN(student.dtype, topk_kl_of_rows, student, teacher, row_weights, losses, gradient)
}

}  // namespace ensemw2s
