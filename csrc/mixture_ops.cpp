#include "ops.h"
#include "tensors.h"

namespace ensemw2s {

Tensor mixture_log_probs_cpu(std::vector<Tensor> logits, Tensor weights, int64_t combine) {
  const MixtureOfTensors mixture(logits, weights, combine);
  const auto sizes = logits[0].sizes();
  Tensor out = new_tensor(logits[0], std::vector<int64_t>(sizes.begin(), sizes.end()), ScalarType::Float);
  mixture_log_probs(*mixture, static_cast<float*>(out.mutable_data_ptr()));
  return out;
}

std::tuple<Tensor, Tensor, Tensor, Tensor> mixture_sample_cpu(std::vector<Tensor> logits, Tensor weights,
                                                              double temperature, int64_t top_k, double top_p,
                                                              double min_p, Tensor seeds, Tensor positions,
                                                              int64_t combine) {
  const MixtureOfTensors mixture(logits, weights, combine);
  const int64_t experts = int64_t(logits.size()), rows = (*mixture).rows;
  ENSEMW2S_CHECK(logits[0].dim() == 2, "logits must be T tensors [B, V]");
  const Dense<int64_t> dense_seeds(seeds, rows, "seeds"), dense_positions(positions, rows, "positions");
  const SampleSettings settings{temperature, top_k, top_p, min_p, dense_seeds.data, dense_positions.data};
  Tensor tokens = new_tensor(logits[0], {rows}, ScalarType::Long);
  Tensor log_probs = new_tensor(logits[0], {rows}, ScalarType::Float);
  Tensor expert_log_probs = new_tensor(logits[0], {experts, rows}, ScalarType::Float);
  Tensor valid = new_tensor(logits[0], {rows}, ScalarType::Bool);
  mixture_sample(
      *mixture, settings,
      {static_cast<int64_t*>(tokens.mutable_data_ptr()), static_cast<float*>(log_probs.mutable_data_ptr()),
       static_cast<float*>(expert_log_probs.mutable_data_ptr()),
       static_cast<bool*>(valid.mutable_data_ptr())});
  return {tokens, log_probs, expert_log_probs, valid};
}

}  // namespace ensemw2s
