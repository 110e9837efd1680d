// From torch tensors to what kernels take. Messages of ENSEMW2S_CHECK reach the user as ValueError
// (run_compiled in ensemw2s/ops/backend.py looks for the mark).
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <cmath>
#include <optional>
#include <tuple>
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

inline int64_t vocabulary_of(const Tensor& logits) {
  const int64_t vocabulary = logits.dim() > 0 ? logits.size(logits.dim() - 1) : 0;
  ENSEMW2S_CHECK(vocabulary >= 1, "the logits' vocabulary is empty");
  return vocabulary;
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

// A new contiguous tensor on the device of another one. Not by new_empty, whose way through the dispatcher is
// several times as long.
inline Tensor new_tensor(const Tensor& like, const std::vector<int64_t>& shape, ScalarType dtype) {
  std::vector<int64_t> strides(shape.size(), 1);
  for (size_t d = shape.size(); d-- > 1;) strides[d - 1] = strides[d] * std::max<int64_t>(shape[d], 1);
  const auto code = torch::stable::detail::to<int32_t>(torch::stable::detail::from(dtype));
  int32_t device_type = 0, device_index = 0;
  STD_TORCH_CHECK(aoti_torch_get_device_type(like.get(), &device_type) == 0, "a tensor without a device");
  STD_TORCH_CHECK(aoti_torch_get_device_index(like.get(), &device_index) == 0, "a tensor without a device");
  AtenTensorHandle made = nullptr;
  STD_TORCH_CHECK(aoti_torch_empty_strided(int64_t(shape.size()), shape.data(), strides.data(), code,
                                           device_type, device_index, &made) == 0,
                  "no memory for a result");
  return Tensor(made);
}

// The tensor itself, or a contiguous copy.
inline Tensor as_contiguous(const Tensor& tensor) {
  return tensor.is_contiguous() ? tensor : torch::stable::contiguous(tensor);
}

template <class V>
constexpr ScalarType kScalarType = std::is_same<V, float>::value     ? ScalarType::Float
                                   : std::is_same<V, int32_t>::value ? ScalarType::Int
                                                                     : ScalarType::Long;

// The elements of a float32, int32 or int64 tensor in order, whatever its strides.
template <class V>
struct Dense {
  Tensor tensor;
  const V* data;

  Dense(const Tensor& given, int64_t count, const char* name) : tensor(as_contiguous(given)) {
    ENSEMW2S_CHECK(tensor.scalar_type() == kScalarType<V> && tensor.numel() == count, name, " must be ",
                   std::is_same<V, float>::value     ? "float32"
                   : std::is_same<V, int32_t>::value ? "int32"
                                                     : "int64",
                   " and have ", count, " elements");
    data = static_cast<const V*>(tensor.const_data_ptr());
  }
};

// A setting of mixture_sample: a number, or a tensor [rows] of a narrow or a wide dtype, of which this owns
// the elements in order.
template <class Narrow, class Wide, ScalarType kNarrow, ScalarType kWide>
class SettingOfTensor {
 public:
  SettingOfTensor(Wide number, const std::optional<Tensor>& rows, int64_t count, const char* name)
      : setting_{number} {
    if (!rows) return;
    const ScalarType dtype = rows->scalar_type();
    ENSEMW2S_CHECK(rows->dim() == 1 && rows->size(0) == count && (dtype == kNarrow || dtype == kWide), name,
                   " must be one value for all rows, or ", count, " of them in a tensor of the right dtype");
    tensor_ = as_contiguous(*rows);
    setting_.is_wide = dtype == kWide;
    // Without rows the tensor may have no memory, but it is no number all the same.
    if (count > 0) setting_.rows = tensor_->const_data_ptr();
  }

  const Setting<Narrow, Wide>& operator*() const { return setting_; }

 private:
  std::optional<Tensor> tensor_;
  Setting<Narrow, Wide> setting_;
};

using RealSetting = SettingOfTensor<float, double, ScalarType::Float, ScalarType::Double>;
using CountSetting = SettingOfTensor<int32_t, int64_t, ScalarType::Int, ScalarType::Long>;

// A mask and the adjustments of mixture_sample, if there are any.
class OfferOfTensors {
 public:
  OfferOfTensors(const std::optional<Tensor>& tokens, const std::optional<Tensor>& values,
                 const std::optional<Tensor>& listed, const std::optional<Tensor>& mask, int64_t rows,
                 int64_t vocabulary) {
    offer_.words = (vocabulary + 31) / 32;
    if (mask) offer_.mask = bits_of(*mask, rows, "mask");
    ENSEMW2S_CHECK(tokens.has_value() == values.has_value() && tokens.has_value() == listed.has_value(),
                   "adjustments are tokens, values and bits together");
    if (!tokens) return;
    ENSEMW2S_CHECK(tokens->dim() == 2 && tokens->size(0) == rows,
                   "adjusted tokens must be [B, N] with B = ", rows);
    offer_.count = tokens->size(1);
    offer_.listed = bits_of(*listed, rows, "the bits of adjustments");
    offer_.tokens = kept(Dense<int32_t>(*tokens, rows * offer_.count, "adjusted tokens"));
    offer_.values = kept(Dense<float>(*values, 3 * rows * offer_.count, "the values of adjustments"));
    if (offer_.count == 0) offer_.tokens = nullptr, offer_.listed = nullptr;
  }

  const Offer& operator*() const { return offer_; }

 private:
  const uint32_t* bits_of(const Tensor& bits, int64_t rows, const char* name) {
    return reinterpret_cast<const uint32_t*>(kept(Dense<int32_t>(bits, rows * offer_.words, name)));
  }
  template <class V>
  const V* kept(const Dense<V>& dense) {
    tensors_.push_back(dense.tensor);
    return dense.data;
  }

  std::vector<Tensor> tensors_;
  Offer offer_;
};

// What mixture_sample returns.
class NewSample {
 public:
  NewSample(const Tensor& logits, int64_t rows, int64_t experts, int64_t top_count)
      : top_count_(top_count),
        tokens_(new_tensor(logits, {rows}, ScalarType::Long)),
        log_probs_(new_tensor(logits, {rows}, ScalarType::Float)),
        expert_log_probs_(new_tensor(logits, {experts, rows}, ScalarType::Float)),
        valid_(new_tensor(logits, {rows}, ScalarType::Bool)),
        top_tokens_(new_tensor(logits, {rows, top_count}, ScalarType::Long)),
        top_log_probs_(new_tensor(logits, {rows, top_count}, ScalarType::Float)) {}

  SampleOutputs pointers() const {
    return {static_cast<int64_t*>(tokens_.mutable_data_ptr()),
            static_cast<float*>(log_probs_.mutable_data_ptr()),
            static_cast<float*>(expert_log_probs_.mutable_data_ptr()),
            static_cast<bool*>(valid_.mutable_data_ptr()),
            static_cast<int64_t*>(top_tokens_.mutable_data_ptr()),
            static_cast<float*>(top_log_probs_.mutable_data_ptr()),
            top_count_};
  }
  std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> tensors() const {
    return {tokens_, log_probs_, expert_log_probs_, valid_, top_tokens_, top_log_probs_};
  }

 private:
  int64_t top_count_;
  Tensor tokens_, log_probs_, expert_log_probs_, valid_, top_tokens_, top_log_probs_;
};

// Owns what a Mixture points to.
class MixtureOfTensors {
 public:
  MixtureOfTensors(const std::vector<Tensor>& logits, const Tensor& weights, int64_t combine,
                   const Offer& offer = {}) {
    ENSEMW2S_CHECK(!logits.empty(), "logits hold no expert");
    const Tensor& first = logits[0];
    for (const Tensor& expert : logits) {
      ENSEMW2S_CHECK(same_kind(expert, first), "all experts' logits need one shape and dtype");
      rows_.push_back(rows_of(expert));
    }
    ENSEMW2S_CHECK(combine >= 0 && combine <= 2, "combine must be 0, 1 or 2, got ", combine);
    const int64_t vocabulary = vocabulary_of(first);
    const int64_t rows = first.numel() / vocabulary, experts = int64_t(rows_.size());
    const bool per_row = weights.dim() > 1;
    read_weights(weights, per_row ? rows : 1, per_row);
    mixture_ = {rows_.data(),     experts,         rows, vocabulary, weights_.data(), per_row ? experts : 0,
                Combine(combine), dtype_of(first), offer};
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

  // Shares of the weight; all 0 in a row without any.
  void read_weights(const Tensor& weights, int64_t rows, bool per_row) {
    const int64_t experts = int64_t(rows_.size());
    const Dense<float> dense(weights, rows * experts, "weights");
    weights_.resize(rows * experts);
    for (int64_t i = 0; i < rows; ++i) {
      const float* given = dense.data + i * experts;
      double total = 0;
      for (int64_t t = 0; t < experts; ++t) {
        const bool is_good = std::isfinite(given[t]) && given[t] >= 0;
        ENSEMW2S_CHECK(is_good || !per_row, "weights must be finite and non-negative, got ", given[t],
                       " in row ", i);
        ENSEMW2S_CHECK(is_good, "weights must be finite, non-negative and not all zero, got weights[", t,
                       "] = ", given[t]);
        total += given[t];
      }
      ENSEMW2S_CHECK(per_row || total > 0,
                     "weights must be finite, non-negative and not all zero, got a sum of ", total);
      for (int64_t t = 0; t < experts; ++t) weights_[i * experts + t] = total > 0 ? given[t] / total : 0;
    }
  }

  std::vector<Rows> rows_;
  std::vector<double> weights_;
  Mixture mixture_;
};

}  // namespace ensemw2s
