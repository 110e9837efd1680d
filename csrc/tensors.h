// From torch tensors to what kernels take. Messages of ENSEMW2S_CHECK reach the user as ValueError
// (run_compiled in ensemw2s/ops/backend.py looks for the mark).
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <cmath>
#include <type_traits>
#include <vector>

#include "mixture.h"

namespace ensemw2s {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

#define ENSEMW2S_CHECK(condition, ...) STD_TORCH_CHECK(condition, "[ensemw2s] ", __VA_ARGS__)

inline Dtype dtype_of(const Tensor& tensor) {
  switch (tensor.scalar_type()) {
    case ScalarType::Float:
      return Dtype::kFloat;
    case ScalarType::BFloat16:
      return Dtype::kBFloat16;
    case ScalarType::Half:
      return Dtype::kHalf;
    default:
      STD_TORCH_CHECK(false, "[ensemw2s] logits must be float32, bfloat16 or float16");
  }
}

inline Rows rows_of(const Tensor& tensor) {
  const int leading = int(tensor.dim()) - 1;
  ENSEMW2S_CHECK(leading >= 0 && leading <= Rows::kMaxDims, "logits have ", tensor.dim(), " dimensions");
  ENSEMW2S_CHECK(tensor.stride(leading) == 1 || tensor.size(leading) <= 1 || tensor.numel() == 0,
                 "the logits' last stride must be 1");
  Rows rows;
  rows.data = tensor.const_data_ptr();
  rows.dims = leading;
  for (int d = 0; d < leading; ++d) {
    rows.sizes[d] = tensor.size(d);
    rows.strides[d] = tensor.stride(d);
  }
  return rows;
}

inline Tensor new_tensor(const Tensor& like, std::vector<int64_t> shape, ScalarType dtype) {
  return torch::stable::new_empty(like, shape, dtype);
}

template <class V>
constexpr ScalarType kScalarType = std::is_same<V, float>::value ? ScalarType::Float : ScalarType::Long;

// The elements of a float32 or int64 tensor in order, whatever its strides.
template <class V>
struct Dense {
  Tensor tensor;
  const V* data;

  Dense(const Tensor& given, int64_t count, const char* name) : tensor(torch::stable::contiguous(given)) {
    ENSEMW2S_CHECK(tensor.scalar_type() == kScalarType<V> && tensor.numel() == count, name, " must be ",
                   std::is_same<V, float>::value ? "float32" : "int64", " and have ", count, " elements");
    data = static_cast<const V*>(tensor.const_data_ptr());
  }
};

// Owns what a Mixture points to.
class MixtureOfTensors {
 public:
  MixtureOfTensors(const std::vector<Tensor>& logits, const Tensor& weights, int64_t combine) {
    ENSEMW2S_CHECK(!logits.empty(), "logits hold no expert");
    const Tensor& first = logits[0];
    for (const Tensor& expert : logits) {
      ENSEMW2S_CHECK(same_kind(expert, first), "all experts' logits need one shape and dtype");
      rows_.push_back(rows_of(expert));
    }
    ENSEMW2S_CHECK(combine >= 0 && combine <= 2, "combine must be 0, 1 or 2, got ", combine);
    const int64_t vocabulary = first.size(first.dim() - 1);
    ENSEMW2S_CHECK(vocabulary >= 1, "the logits' vocabulary is empty");
    read_weights(weights);
    mixture_ = {rows_.data(),   int64_t(rows_.size()), first.numel() / vocabulary,
                vocabulary,     weights_.data(),       Combine(combine),
                dtype_of(first)};
  }
  MixtureOfTensors(const MixtureOfTensors&) = delete;
  MixtureOfTensors& operator=(const MixtureOfTensors&) = delete;

  const Mixture& operator*() const { return mixture_; }

 private:
  static bool same_kind(const Tensor& a, const Tensor& b) {
    if (a.dim() != b.dim() || a.scalar_type() != b.scalar_type()) return false;
    for (int64_t d = 0; d < a.dim(); ++d)
      if (a.size(d) != b.size(d)) return false;
    return true;
  }

  void read_weights(const Tensor& weights) {
    const Dense<float> dense(weights, int64_t(rows_.size()), "weights");
    const float* values = dense.data;
    double total = 0;
    for (size_t t = 0; t < rows_.size(); ++t) {
      ENSEMW2S_CHECK(std::isfinite(values[t]) && values[t] >= 0,
                     "weights must be finite, non-negative and not all zero, got weights[", t,
                     "] = ", values[t]);
      weights_.push_back(values[t]);
      total += values[t];
    }
    ENSEMW2S_CHECK(total > 0, "weights must be finite, non-negative and not all zero, got a sum of ", total);
    for (double& weight : weights_) weight /= total;
  }

  std::vector<Rows> rows_;
  std::vector<double> weights_;
  Mixture mixture_;
};

}  // namespace ensemw2s
