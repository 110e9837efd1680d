// The ops on torch tensors: they check, unpack to raw pointers and call the kernels. Registered in bindings.cpp.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <tuple>
#include <vector>

namespace ensemw2s {

using torch::stable::Tensor;

Tensor mixture_log_probs_cpu(std::vector<Tensor> logits, Tensor weights, int64_t combine);

std::tuple<Tensor, Tensor, Tensor, Tensor> mixture_sample_cpu(std::vector<Tensor> logits, Tensor weights,
                                                              double temperature, int64_t top_k, double top_p,
                                                              double min_p, Tensor seeds, Tensor positions,
                                                              int64_t combine);

}  // namespace ensemw2s
