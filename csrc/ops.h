// The ops on torch tensors: they check, unpack to raw pointers and call the kernels. Registered in
// bindings.cpp.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <optional>
#include <tuple>
#include <vector>

namespace ensemw2s {

using torch::stable::Tensor;

Tensor mixture_log_probs_cpu(std::vector<Tensor> logits, Tensor weights, int64_t combine);

// A tensor of rows' settings takes the place of the number before it that bears its name.
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> mixture_sample_cpu(
    std::vector<Tensor> logits, Tensor weights, double temperature, int64_t top_k, double top_p, double min_p,
    std::optional<Tensor> temperatures, std::optional<Tensor> top_ks, std::optional<Tensor> top_ps,
    std::optional<Tensor> min_ps, Tensor seeds, Tensor positions, int64_t combine, int64_t top_logprobs,
    std::optional<Tensor> adjusted_tokens, std::optional<Tensor> adjusted_values,
    std::optional<Tensor> adjusted_bits, std::optional<Tensor> mask);

std::tuple<Tensor, Tensor, Tensor> token_scores_cpu(Tensor logits, Tensor labels);
std::tuple<Tensor, Tensor, Tensor> mixture_scores_cpu(std::vector<Tensor> logits, Tensor weights,
                                                      Tensor labels, int64_t combine);

// Each returns (losses, gradient); the gradient is empty unless it is asked for.
std::tuple<Tensor, Tensor> cross_entropy_rows_cpu(Tensor logits, Tensor labels, Tensor row_weights,
                                                  bool with_gradient);
std::tuple<Tensor, Tensor> mixture_kl_rows_cpu(Tensor student, std::vector<Tensor> experts, Tensor weights,
                                               Tensor row_weights, bool with_gradient);
std::tuple<Tensor, Tensor> topk_kl_rows_cpu(Tensor student, Tensor token_ids, Tensor log_probs,
                                            Tensor row_weights, bool with_gradient);

}  // namespace ensemw2s
