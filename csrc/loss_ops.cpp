#include "losses.h"

#include "ops.h"
#include "tensors.h"

namespace ensemw2s {

namespace {

Logits logits_of(const Tensor& tensor) {
  const Rows rows = rows_of(tensor);
  const int64_t vocabulary = tensor.size(tensor.dim() - 1);
  ENSEMW2S_CHECK(vocabulary >= 1, "the logits' vocabulary is empty");
  return {rows, tensor.numel() / vocabulary, vocabulary, dtype_of(tensor)};
}

std::vector<int64_t> leading_shape(const Tensor& tensor) {
  const auto sizes = tensor.sizes();
  return std::vector<int64_t>(sizes.begin(), sizes.end() - 1);
}

Dense<float> row_weights_of(const Tensor& tensor, int64_t rows) { return {tensor, rows, "row weights"}; }

// Labels in [0, vocabulary), or the masked label; where `row_weights` is 0 they do not matter.
Dense<int64_t> labels_of(const Tensor& tensor, const Logits& logits, const float* row_weights = nullptr) {
  const Dense<int64_t> labels(tensor, logits.rows, "labels");
  for (int64_t i = 0; i < logits.rows; ++i) {
    const int64_t label = labels.data[i];
    const bool needed = row_weights ? row_weights[i] != 0 : label != kMaskedLabel;
    ENSEMW2S_CHECK(!needed || (label >= 0 && label < logits.vocabulary), "labels must be in [0, ",
                   logits.vocabulary, ") or ", kMaskedLabel, ", got labels[", i, "] = ", label);
  }
  return labels;
}

struct NewScores {
  Tensor log_probs, correct, entropy;
  explicit NewScores(const Tensor& logits)
      : log_probs(new_tensor(logits, leading_shape(logits), ScalarType::Float)),
        correct(new_tensor(logits, leading_shape(logits), ScalarType::Bool)),
        entropy(new_tensor(logits, leading_shape(logits), ScalarType::Float)) {}
  Scores pointers() const {
    return {static_cast<float*>(log_probs.mutable_data_ptr()), static_cast<bool*>(correct.mutable_data_ptr()),
            static_cast<float*>(entropy.mutable_data_ptr())};
  }
  std::tuple<Tensor, Tensor, Tensor> tensors() const { return {log_probs, correct, entropy}; }
};

struct NewLosses {
  Tensor losses, gradient;
  NewLosses(const Tensor& logits, bool with_gradient)
      : losses(new_tensor(logits, leading_shape(logits), ScalarType::Float)),
        gradient(new_tensor(logits, gradient_shape(logits, with_gradient), ScalarType::Float)),
        with_gradient_(with_gradient) {}
  float* loss_pointer() const { return static_cast<float*>(losses.mutable_data_ptr()); }
  float* gradient_pointer() const {
    return with_gradient_ ? static_cast<float*>(gradient.mutable_data_ptr()) : nullptr;
  }
  std::tuple<Tensor, Tensor> tensors() const { return {losses, gradient}; }

 private:
  static std::vector<int64_t> gradient_shape(const Tensor& logits, bool with_gradient) {
    if (!with_gradient) return {0};
    const auto sizes = logits.sizes();
    return std::vector<int64_t>(sizes.begin(), sizes.end());
  }
  bool with_gradient_;
};

}  // namespace

std::tuple<Tensor, Tensor, Tensor> token_scores_cpu(Tensor logits, Tensor labels) {
  const Logits input = logits_of(logits);
  const NewScores scores(logits);
  token_scores(input, labels_of(labels, input).data, scores.pointers());
  return scores.tensors();
}

std::tuple<Tensor, Tensor, Tensor> mixture_scores_cpu(std::vector<Tensor> logits, Tensor weights,
                                                      Tensor labels, int64_t combine) {
  const MixtureOfTensors mixture(logits, weights, combine);
  const NewScores scores(logits[0]);
  mixture_scores(*mixture, labels_of(labels, logits_of(logits[0])).data, scores.pointers());
  return scores.tensors();
}

std::tuple<Tensor, Tensor> cross_entropy_rows_cpu(Tensor logits, Tensor labels, Tensor row_weights,
                                                  bool with_gradient) {
  const Logits input = logits_of(logits);
  const Dense<float> weights = row_weights_of(row_weights, input.rows);
  const NewLosses out(logits, with_gradient);
  cross_entropy_rows(input, labels_of(labels, input, weights.data).data, weights.data, out.loss_pointer(),
                     out.gradient_pointer());
  return out.tensors();
}

std::tuple<Tensor, Tensor> mixture_kl_rows_cpu(Tensor student, std::vector<Tensor> experts, Tensor weights,
                                               Tensor row_weights, bool with_gradient) {
  const Logits input = logits_of(student);
  const MixtureOfTensors teacher(experts, weights, int64_t(Combine::kProb));
  ENSEMW2S_CHECK((*teacher).rows == input.rows && (*teacher).vocabulary == input.vocabulary &&
                     (*teacher).dtype == input.dtype,
                 "student and experts need one shape and dtype");
  const NewLosses out(student, with_gradient);
  mixture_kl_rows(input, *teacher, row_weights_of(row_weights, input.rows).data, out.loss_pointer(),
                  out.gradient_pointer());
  return out.tensors();
}

std::tuple<Tensor, Tensor> topk_kl_rows_cpu(Tensor student, Tensor token_ids, Tensor log_probs,
                                            Tensor row_weights, bool with_gradient) {
  const Logits input = logits_of(student);
  ENSEMW2S_CHECK(token_ids.dim() >= 1, "token_ids must be [..., k]");
  const int64_t k = token_ids.size(token_ids.dim() - 1), count = input.rows * k;
  const Dense<int64_t> ids(token_ids, count, "token_ids");
  const Dense<float> kept(log_probs, count, "log_probs");
  for (int64_t i = 0; i < count; ++i)
    ENSEMW2S_CHECK(ids.data[i] >= 0 && ids.data[i] < input.vocabulary, "token_ids must be in [0, ",
                   input.vocabulary, "), got ", ids.data[i]);
  const NewLosses out(student, with_gradient);
  topk_kl_rows(input, {ids.data, kept.data, k}, row_weights_of(row_weights, input.rows).data,
               out.loss_pointer(), out.gradient_pointer());
  return out.tensors();
}

}  // namespace ensemw2s
