// What the scoring and loss kernels take and give, on raw pointers.
#pragma once

#include "mixture.h"
#include "types.h"

namespace ensemw2s {

constexpr int64_t kMaskedLabel = -100;  // as in transformers

// Logits [rows, vocabulary] of one model.
struct Logits {
  Rows rows_of;
  int64_t rows;
  int64_t vocabulary;
  Dtype dtype;
};

struct Scores {
  float* log_probs;  // [rows]; 0 where the label is masked
  bool* correct;     // [rows]
  float* entropy;    // [rows], in nats
};

void token_scores(const Logits& logits, const int64_t* labels, const Scores& scores);
void mixture_scores(const Mixture& mixture, const int64_t* labels, const Scores& scores);

// Losses of single rows, times the row's weight; rows of weight 0 are neither read nor computed. `gradient`
// [rows, vocabulary], contiguous, may be null.
void cross_entropy_rows(const Logits& logits, const int64_t* labels, const float* row_weights, float* losses,
                        float* gradient);
void mixture_kl_rows(const Logits& student, const Mixture& teacher, const float* row_weights, float* losses,
                     float* gradient);

// The teacher as its k likeliest tokens; the rest of its mass is one outcome.
struct TopK {
  const int64_t* token_ids;  // [rows, k]
  const float* log_probs;    // [rows, k]
  int64_t k;
};
void topk_kl_rows(const Logits& student, const TopK& teacher, const float* row_weights, float* losses,
                  float* gradient);

}  // namespace ensemw2s
