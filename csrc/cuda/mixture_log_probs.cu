// mixture_log_probs: scan, then a block per row that merges, then one pass that writes.

#include "mixture.cuh"

namespace ensemw2s::cuda {

template <class T>
ENSEMW2S_KERNEL(kRowThreads, 1)
finish_kernel(const DeviceMixture mixture, const ScanResults results, RowState* states) {
  RowState& state = states[block_index()];
  merge_partials<T>(mixture, results, block_index(), state);
  barrier();
  const bool valid = is_valid(mixture, state, block_index());
  if (valid && mixture.combine == Combine::kVote) find_winners<T>(mixture, results, block_index(), state);
  if (thread_index() == 0) state.valid = valid;
}

ENSEMW2S_DEVICE void store_floats(float* out, int first, int vocabulary, int count, const float* values) {
  for (int e = 0; e < count; e += 4) {
    if (uintptr_t(out) % 16 == 0 && first + e + 4 <= vocabulary) {
      Words4 words;
      memcpy(&words, values + e, sizeof words);
      store_16_bytes(out + first + e, words);
    } else {
      for (int i = e; i < e + 4 && first + i < vocabulary; ++i) out[first + i] = values[i];
    }
  }
}

// kVector tokens from `first` on.
template <class T>
ENSEMW2S_DEVICE void log_probs_of_vector(const DeviceMixture& mixture, const RowState& state, int64_t row,
                                         int first, float* out) {
  const int experts = mixture.num_experts;
  float logits[kVector<T>];
  if (is_product(mixture)) {
    for (int e = 0; e < kVector<T>; ++e) out[e] = 0;
    for (int t = 0; t < experts; ++t) {
      if (!(state.weight[t] > 0)) continue;
      load_vector(row_of<T>(mixture, t, row), mixture.vocabulary, first, logits);
      for (int e = 0; e < kVector<T>; ++e)
        out[e] += product_term(float(state.weight[t]), logits[e], state.max[t]);
    }
    for (int e = 0; e < kVector<T>; ++e)
      out[e] = fminf(0, (out[e] - state.max[experts]) - float(state.log_sum[experts]));
    return;
  }
  LogSum totals[kVector<T>];
  for (int t = 0; t < experts; ++t) {
    if (!(state.weight[t] > 0)) continue;
    load_vector(row_of<T>(mixture, t, row), mixture.vocabulary, first, logits);
    for (int e = 0; e < kVector<T>; ++e) totals[e].add((logits[e] - state.max[t]) + state.shift[t]);
  }
  for (int e = 0; e < kVector<T>; ++e) out[e] = totals[e].value();
}

// One warp for every (row, chunk).
template <class T>
ENSEMW2S_KERNEL(kScanThreads, 6)
write_kernel(const DeviceMixture mixture, const RowState* states, float* log_probs) {
  const int chunks = shape_of(mixture).chunks;
  const int64_t item = block_index() * kScanWarps + warp_index();
  const int64_t row = item / chunks;
  if (row >= mixture.rows) return;
  const RowState& state = states[row];
  float* out = log_probs + row * mixture.vocabulary;
  const int group = int(item % chunks) * kWarp + lane_index();
  for (int i = 0; i < kGroup; i += kVector<T>) {
    const int first = token_of<T>(group, i);
    if (first >= mixture.vocabulary) return;
    float values[kVector<T>];
    if (!state.valid)
      for (int e = 0; e < kVector<T>; ++e) values[e] = NAN;
    else if (mixture.combine == Combine::kVote)
      for (int e = 0; e < kVector<T>; ++e) values[e] = float(log_votes(mixture, state, first + e));
    else
      log_probs_of_vector<T>(mixture, state, row, first, values);
    store_floats(out, first, mixture.vocabulary, kVector<T>, values);
  }
}

template <class T>
const char* launch_log_probs(const DeviceMixture& mixture, float* log_probs, const Allocate& allocate,
                             Stream stream) {
  const ScanResults results = allocate_scan(mixture, false, allocate);
  RowState* states = static_cast<RowState*>(allocate(mixture.rows * int64_t(sizeof(RowState))));
  const char* error = launch_scan<T>(mixture, SampleSettings{}, results, stream);
  if (!error) error = launch(&finish_kernel<T>, mixture.rows, kRowThreads, stream, mixture, results, states);
  const int64_t warps = mixture.rows * shape_of(mixture).chunks;
  const int64_t blocks = (warps + kScanWarps - 1) / kScanWarps;
  return error ? error : launch(&write_kernel<T>, blocks, kScanThreads, stream, mixture, states, log_probs);
}

const char* mixture_log_probs(const DeviceMixture& mixture, float* log_probs, const Allocate& allocate,
                              void* stream) {
  if (mixture.rows == 0) return nullptr;
  ENSEMW2S_DISPATCH(mixture.dtype, launch_log_probs, mixture, log_probs, allocate,
                    static_cast<Stream>(stream));
}

}  // namespace ensemw2s::cuda
