// The first pass over the logits ("scan") and what one row's block makes of it ("finish").
//
// A chunk is kChunk consecutive tokens, one warp's work; lane `l` of it loads 16 bytes at a time and owns the
// kGroup tokens that it loads, a group. The scan leaves a normaliser for every (row, expert, chunk) and the
// largest logit of every (row, expert, group): bounds that tell which groups can matter later. Chunks do not
// depend on the batch or the chip and are merged in a fixed order, and so a row's numbers depend on nothing
// but the row.
#pragma once

#include <cfloat>
#include <cmath>

#include "device.h"
#include "launch.h"
#include "philox.h"

namespace ensemw2s::cuda {

constexpr int kGroup = 32;
constexpr int kChunk = kWarp * kGroup;
constexpr float kLowest = -FLT_MAX;
constexpr float kInfinity = INFINITY;

// Threads of a block. The emulation takes fewer.
#if !defined(ENSEMW2S_SCAN_THREADS)
#  define ENSEMW2S_SCAN_THREADS 128
#endif
#if !defined(ENSEMW2S_ROW_THREADS)
#  define ENSEMW2S_ROW_THREADS 256
#endif
constexpr int kScanThreads = ENSEMW2S_SCAN_THREADS, kScanWarps = kScanThreads / kWarp;
constexpr int kRowThreads = ENSEMW2S_ROW_THREADS, kRowWarps = kRowThreads / kWarp;

// Tokens in 16 bytes.
template <class T>
constexpr int kVector = 16 / int(sizeof(T));

// The chunk-wise results, in scratch memory. The product's scores are taken beside the experts' largest
// logits in the chunk.
struct Partial {
  float max, sum;  // log-sum-exp in two numbers
};

struct ScanResults {
  Partial* partials;      // [rows, T + 1, chunks]; the last one is the product of experts
  float* group_max;       // [rows, T, groups]; for the product of experts [rows, 1, groups]
  float* plain_max;       // like group_max, of the tokens that may be drawn as they are; null if all may
  uint32_t* least_words;  // [rows, groups], the least Philox word of each group; null if not needed
};

struct Shape {
  int chunks, groups;
};
ENSEMW2S_HOST_DEVICE inline Shape shape_of(const DeviceMixture& mixture) {
  const int chunks = (mixture.vocabulary + kChunk - 1) / kChunk;
  return {chunks, chunks * kWarp};
}

ENSEMW2S_HOST_DEVICE inline bool is_product(const DeviceMixture& mixture) {
  return mixture.combine == Combine::kLogProb;
}

template <class T>
ENSEMW2S_DEVICE const T* row_of(const DeviceMixture& mixture, int expert, int64_t row) {
  return static_cast<const T*>(mixture.logits[expert]) + row * mixture.row_stride[expert];
}

// Token number i of a group.
template <class T>
ENSEMW2S_DEVICE int token_of(int group, int i) {
  const int chunk = group / kWarp, lane = group % kWarp;
  return chunk * kChunk + i / kVector<T> * (kWarp * kVector<T>)+lane * kVector<T> + i % kVector<T>;
}

// kVector logits from token `first` on, which is a multiple of kVector; -inf past the end.
template <class T>
ENSEMW2S_DEVICE void load_vector(const T* row, int vocabulary, int first, float* logits) {
  if (uintptr_t(row) % 16 == 0 && first + kVector<T> <= vocabulary) {
    const Words4 words = load_16_bytes(row + first);
    T values[kVector<T>];
    memcpy(values, &words, sizeof words);
    for (int e = 0; e < kVector<T>; ++e) logits[e] = to_float(values[e]);
  } else {
    for (int e = 0; e < kVector<T>; ++e)
      logits[e] = first + e < vocabulary ? to_float(row[first + e]) : -kInfinity;
  }
}

template <class T>
ENSEMW2S_DEVICE void load_group(const T* row, int vocabulary, int group, float* logits) {
#pragma unroll
  for (int i = 0; i < kGroup; i += kVector<T>)
    load_vector(row, vocabulary, token_of<T>(group, i), logits + i);
}

// ---- scan ----

// The group's largest value among tokens that may be drawn as they are.
template <class T>
ENSEMW2S_DEVICE float largest_plain(const DeviceMixture& mixture, int64_t row, int group,
                                    const float* values) {
  float top = -kInfinity;
#pragma unroll
  for (int i = 0; i < kGroup; i += kVector<T>) {
    const int first = token_of<T>(group, i);
    if (first >= mixture.vocabulary) continue;
    const uint32_t bits = mixture.offer.plain_word(row, first / 32) >> (first % 32);
#pragma unroll
    for (int e = 0; e < kVector<T>; ++e)
      if (bits >> e & 1) top = fmaxf(top, values[i + e]);
  }
  return top;
}

// The group's largest value into *group_max, the warp's normaliser into *partial; returns the warp's largest
// value.
ENSEMW2S_DEVICE float reduce_chunk(const float* values, float* group_max, Partial* partial) {
  float top = values[0];
#pragma unroll
  for (int i = 1; i < kGroup; ++i) top = fmaxf(top, values[i]);
  *group_max = top;
  const float max = fmaxf(reduce_warp(top, [](float a, float b) { return fmaxf(a, b); }), kLowest);
  float sum = 0;
#pragma unroll
  for (int i = 0; i < kGroup; ++i) sum += fast_exp(values[i] - max);
  sum = reduce_warp(sum, [](float a, float b) { return a + b; });
  if (lane_index() == 0) *partial = {max, sum};
  return max;
}

// w (z - top), an expert's part in the product's score of a token, where `top` is at least z. By halves,
// because z - top may be more than a float holds.
ENSEMW2S_DEVICE float product_term(float weight, float logit, float top) {
  return 2 * weight * (0.5f * logit - 0.5f * top);
}

// A row's weights. An expert of weight 0 is not read.
ENSEMW2S_DEVICE const float* weights_of(const DeviceMixture& mixture, int64_t row) {
  return mixture.weights + row * mixture.weight_stride;
}

// Sum of the weights in a fixed order; NaN if one of them cannot be a weight.
ENSEMW2S_DEVICE double total_weight(const DeviceMixture& mixture, int64_t row) {
  const float* weights = weights_of(mixture, row);
  double total = 0;
  for (int t = 0; t < mixture.num_experts; ++t) total += weights[t] >= 0 ? double(weights[t]) : NAN;
  return total;
}

template <class T>
ENSEMW2S_DEVICE void scan_expert(const DeviceMixture& mixture, const ScanResults& results, int64_t row,
                                 int expert, int chunk) {
  if (weights_of(mixture, row)[expert] == 0) return;
  const Shape shape = shape_of(mixture);
  const int group = chunk * kWarp + lane_index();
  float logits[kGroup];
  load_group(row_of<T>(mixture, expert, row), mixture.vocabulary, group, logits);
  const int64_t place = (row * mixture.num_experts + expert) * shape.groups + group;
  if (results.plain_max) results.plain_max[place] = largest_plain<T>(mixture, row, group, logits);
  reduce_chunk(logits, &results.group_max[place],
               &results.partials[(row * (mixture.num_experts + 1) + expert) * shape.chunks + chunk]);
}

// All experts in turn, and the sum of their weighted logits.
template <class T>
ENSEMW2S_DEVICE void scan_product(const DeviceMixture& mixture, const ScanResults& results, int64_t row,
                                  int chunk) {
  const Shape shape = shape_of(mixture);
  const int group = chunk * kWarp + lane_index();
  Partial* partials = &results.partials[row * (mixture.num_experts + 1) * shape.chunks + chunk];
  float* group_max = &results.group_max[row * shape.groups + group];
  const float* weights = weights_of(mixture, row);
  const double total = total_weight(mixture, row);
  float logits[kGroup], scores[kGroup] = {};
  for (int t = 0; t < mixture.num_experts; ++t) {
    if (weights[t] == 0) continue;
    load_group(row_of<T>(mixture, t, row), mixture.vocabulary, group, logits);
    const float top = reduce_chunk(logits, group_max, partials + int64_t(t) * shape.chunks);
    const float weight = float(weights[t] / total);
    if (weight != 0) {
#pragma unroll
      for (int i = 0; i < kGroup; ++i) scores[i] += product_term(weight, logits[i], top);
    }
  }
  if (results.plain_max)
    results.plain_max[row * shape.groups + group] = largest_plain<T>(mixture, row, group, scores);
  reduce_chunk(scores, group_max, partials + int64_t(mixture.num_experts) * shape.chunks);
}

// Whether a row's race is among all tokens, which is what the least words are for.
ENSEMW2S_HOST_DEVICE inline bool races_all(const RowSettings& asked) {
  return !asked.is_greedy() && !asked.is_filtered();
}

template <class T>
ENSEMW2S_DEVICE void scan_noise(const DeviceMixture& mixture, const SampleSettings& settings,
                                const ScanResults& results, int64_t row, int chunk) {
  const int group = chunk * kWarp + lane_index();
  const RowSettings asked = settings.of(row, mixture.vocabulary);
  if (!races_all(asked)) return;
  uint32_t least = ~0u;
  for (int i = 0; i < kGroup; i += 4) {  // kVector neighbours are a multiple of four
    const PhiloxWords block = philox_words(asked.seed, asked.position, uint32_t(token_of<T>(group, i)) / 4);
    for (const uint32_t word : block.word) least = word < least ? word : least;
  }
  results.least_words[row * shape_of(mixture).groups + group] = least;
}

// One warp for every (row, slice, chunk). A slice is an expert (or all of them, for the product), the last
// one the noise if it is asked for: its arithmetic fills the time in which the other warps wait for memory.
template <class T, bool kProduct>
ENSEMW2S_KERNEL(kScanThreads, kProduct ? 3 : 8)
scan_kernel(const DeviceMixture mixture, const SampleSettings settings, const ScanResults results) {
  const int chunks = shape_of(mixture).chunks;
  const int expert_slices = kProduct ? 1 : mixture.num_experts;
  const int slices = expert_slices + (results.least_words != nullptr);
  int64_t item = block_index() * kScanWarps + warp_index();
  const int chunk = int(item % chunks);
  item /= chunks;
  const int slice = int(item % slices);
  const int64_t row = item / slices;
  if (row >= mixture.rows) return;  // a whole warp; no barrier follows
  if (slice == expert_slices)
    scan_noise<T>(mixture, settings, results, row, chunk);
  else if constexpr (kProduct)
    scan_product<T>(mixture, results, row, chunk);
  else
    scan_expert<T>(mixture, results, row, slice, chunk);
}

// ---- finish ----

struct Normaliser {
  double max = -DBL_MAX;
  double sum = 0;
};

ENSEMW2S_DEVICE Normaliser merged(const Normaliser& a, const Normaliser& b) {
  const double top = fmax(a.max, b.max);
  return {top, a.sum * exp(a.max - top) + b.sum * exp(b.max - top)};
}

// What is known of a row after its scan. Index T is the product of experts.
struct RowState {
  double weight[kMaxExperts];  // normalised
  double log_sum[kMaxExperts + 1];
  float max[kMaxExperts + 1];  // of the product: the likeliest token's score, as a float
  double product_max;          // and as a double
  float shift[kMaxExperts];    // (z - max) + shift = log(weight * probability)
  bool usable[kMaxExperts + 1];
  int winner[kMaxExperts];  // vote: the expert's first argmax, -1 for weight 0
  bool valid;
};

// Keeps an expert's or the product's normaliser. By a single thread.
ENSEMW2S_DEVICE void keep_normaliser(RowState& state, int t, const Normaliser& all) {
  state.max[t] = float(all.max);
  state.log_sum[t] = log(all.sum);
  state.usable[t] = all.sum > 0 && all.max <= FLT_MAX && all.sum <= DBL_MAX;
}

// What leads from the product's scores in a chunk to those beside the experts' largest logits in the row.
ENSEMW2S_DEVICE double descent(const DeviceMixture& mixture, const RowState& state, const Partial* partials,
                               int chunk) {
  double sum = 0;
  for (int t = 0; t < mixture.num_experts; ++t) {
    if (!(state.weight[t] > 0)) continue;
    const float top = partials[int64_t(t) * shape_of(mixture).chunks + chunk].max;
    sum += state.weight[t] * (double(top) - state.max[t]);
  }
  return sum;
}

// The product's score of a token beside the experts' largest logits, where logit(t) is expert t's logit of
// it.
template <class Logit>
ENSEMW2S_DEVICE float product_score(const DeviceMixture& mixture, const RowState& state, const Logit& logit) {
  float score = 0;
  for (int t = 0; t < mixture.num_experts; ++t)
    if (state.weight[t] > 0) score += product_term(float(state.weight[t]), logit(t), state.max[t]);
  return score;
}

template <class Logit>
ENSEMW2S_DEVICE double exact_product_score(const DeviceMixture& mixture, const RowState& state,
                                           const Logit& logit) {
  double score = 0;
  for (int t = 0; t < mixture.num_experts; ++t)
    if (state.weight[t] > 0) score += state.weight[t] * (double(logit(t)) - state.max[t]);
  return score;
}

// Of the chunks of one row, the largest score and its chunk.
struct BestChunk {
  double max;
  int chunk;
  int unused;  // whole words: shuffles carry no padding
};

// The product's normaliser, by one warp. Where the experts disagree by far the scores are large numbers, and
// roundings of them too. So that the likeliest token is likely in the arithmetic of everything that follows,
// its score there is what the others are compared with.
template <class T>
ENSEMW2S_DEVICE void merge_product(const DeviceMixture& mixture, const ScanResults& results, int64_t row,
                                   RowState& state) {
  const int chunks = shape_of(mixture).chunks, experts = mixture.num_experts;
  const Partial* partials = results.partials + row * (experts + 1) * chunks;
  Normaliser all;
  BestChunk best{-DBL_MAX, 0, 0};
  for (int chunk = lane_index(); chunk < chunks; chunk += kWarp) {
    const Partial partial = partials[int64_t(experts) * chunks + chunk];
    const double max = partial.max + descent(mixture, state, partials, chunk);
    all = merged(all, {max, partial.sum});
    if (partial.sum > 0 && max > best.max) best = {max, chunk, 0};
  }
  all = reduce_warp(all, merged);
  best = reduce_warp(best, [](const BestChunk& a, const BestChunk& b) {
    return a.max > b.max || (a.max == b.max && a.chunk < b.chunk) ? a : b;
  });
  const float* group_max = results.group_max + row * shape_of(mixture).groups + best.chunk * kWarp;
  const float top = partials[int64_t(experts) * chunks + best.chunk].max;
  const uint32_t holders = ballot(group_max[lane_index()] == top);
  const int group = best.chunk * kWarp + (holders ? lowest_bit(holders) : 0);
  const int token = token_of<T>(group, lane_index());
  const auto logit = [&](int t) {
    return token < mixture.vocabulary ? to_float(row_of<T>(mixture, t, row)[token]) : -kInfinity;
  };
  const auto larger = [](double a, double b) { return fmax(a, b); };
  const double exact = reduce_warp(exact_product_score(mixture, state, logit), larger);
  const double rounded = reduce_warp(double(product_score(mixture, state, logit)), larger);
  if (lane_index() != 0) return;
  keep_normaliser(state, experts, all);
  state.product_max = exact;
  state.max[experts] = float(rounded);
}

// Merges the chunks' normalisers, a warp for each expert. Between this call and the use of `state` a barrier
// is needed.
template <class T>
ENSEMW2S_DEVICE void merge_partials(const DeviceMixture& mixture, const ScanResults& results, int64_t row,
                                    RowState& state) {
  const int chunks = shape_of(mixture).chunks, experts = mixture.num_experts;
  const float* weights = weights_of(mixture, row);
  const double total = total_weight(mixture, row);
  const Partial* partials = results.partials + row * (experts + 1) * chunks;
  for (int t = warp_index(); t < experts; t += kRowWarps) {
    Normaliser all;
    for (int chunk = lane_index(); chunk < chunks && weights[t] != 0; chunk += kWarp) {
      const Partial partial = partials[int64_t(t) * chunks + chunk];
      all = merged(all, {partial.max, partial.sum});
    }
    all = reduce_warp(all, merged);
    if (lane_index() != 0) continue;
    keep_normaliser(state, t, all);
    const double weight = weights[t] / total;
    state.weight[t] = float(weight) > 0 ? weight : 0;  // as the scan sees it
    state.shift[t] = float(log(state.weight[t]) - state.log_sum[t]);
    state.winner[t] = -1;
  }
  if (!is_product(mixture)) return;
  barrier();
  if (warp_index() == 0) merge_product<T>(mixture, results, row, state);
}

// Whether the row can be used; every thread finds the same.
ENSEMW2S_DEVICE bool is_valid(const DeviceMixture& mixture, const RowState& state, int64_t row) {
  const double total = total_weight(mixture, row);
  bool valid = total > 0 && total <= DBL_MAX;
  for (int t = 0; t < mixture.num_experts; ++t) valid = valid && (state.usable[t] || !(state.weight[t] > 0));
  return valid && (!is_product(mixture) || state.usable[mixture.num_experts]);
}

// Vote: every active expert's first argmax, a warp for each expert. A barrier is needed before and after.
template <class T>
ENSEMW2S_DEVICE void find_winners(const DeviceMixture& mixture, const ScanResults& results, int64_t row,
                                  RowState& state) {
  const int groups = shape_of(mixture).groups;
  for (int t = warp_index(); t < mixture.num_experts; t += kRowWarps) {
    if (!(state.weight[t] > 0)) continue;
    const float* group_max = results.group_max + (row * mixture.num_experts + t) * groups;
    const T* logits = row_of<T>(mixture, t, row);
    const float max = state.max[t];
    int first = mixture.vocabulary;
    for (int group = lane_index(); group < groups; group += kWarp) {
      if (group_max[group] != max) continue;
      for (int i = 0; i < kGroup; ++i) {
        const int token = token_of<T>(group, i);
        if (token < first && to_float(logits[token]) == max) first = token;
      }
    }
    first = reduce_warp(first, [](int a, int b) { return a < b ? a : b; });
    if (lane_index() == 0) state.winner[t] = first;
  }
}

// log(sum(exp(x))) of terms that come one by one, with one exp for each.
struct LogSum {
  float max = -kInfinity, sum = 0;

  ENSEMW2S_DEVICE void add(float x) {
    if (!(x > -kInfinity)) return;
    const float scaled = fast_exp(-fabsf(x - max));
    sum = x > max ? sum * scaled + 1 : sum + scaled;
    max = fmaxf(x, max);
  }
  ENSEMW2S_DEVICE float value() const { return max > -kInfinity ? max + logf(sum) : max; }
};

// Votes for a token, as a log-probability.
ENSEMW2S_DEVICE double log_votes(const DeviceMixture& mixture, const RowState& state, int token) {
  double votes = 0;
  for (int t = 0; t < mixture.num_experts; ++t) votes += state.winner[t] == token ? state.weight[t] : 0.0;
  return log(votes);
}

// The mixture's log-probability where logit(t) is expert t's logit of the token.
template <class Logit>
ENSEMW2S_DEVICE float float_log_prob(const DeviceMixture& mixture, const RowState& state,
                                     const Logit& logit) {
  if (is_product(mixture)) {
    const int experts = mixture.num_experts;
    const float score = product_score(mixture, state, logit);
    return fminf(0, (score - state.max[experts]) - float(state.log_sum[experts]));
  }
  LogSum total;
  for (int t = 0; t < mixture.num_experts; ++t)
    if (state.weight[t] > 0) total.add((logit(t) - state.max[t]) + state.shift[t]);
  return total.value();
}

template <class T>
const char* launch_scan(const DeviceMixture& mixture, const SampleSettings& settings,
                        const ScanResults& results, Stream stream) {
  const int64_t slices = (is_product(mixture) ? 1 : mixture.num_experts) + (results.least_words != nullptr);
  const int64_t warps = mixture.rows * slices * shape_of(mixture).chunks;
  const auto kernel = is_product(mixture) ? &scan_kernel<T, true> : &scan_kernel<T, false>;
  return launch(kernel, (warps + kScanWarps - 1) / kScanWarps, kScanThreads, stream, mixture, settings,
                results);
}

inline ScanResults allocate_scan(const DeviceMixture& mixture, bool with_noise, const Allocate& allocate) {
  const int64_t rows = mixture.rows, experts = mixture.num_experts;
  const Shape shape = shape_of(mixture);
  const auto memory = [&](int64_t count, int64_t size) { return allocate(count * size); };
  ScanResults results{};
  results.partials = static_cast<Partial*>(memory(rows * (experts + 1) * shape.chunks, sizeof(Partial)));
  results.group_max =
      static_cast<float*>(memory(rows * (is_product(mixture) ? 1 : experts) * shape.groups, sizeof(float)));
  if (!mixture.offer.is_everything() && mixture.combine != Combine::kVote)
    results.plain_max =
        static_cast<float*>(memory(rows * (is_product(mixture) ? 1 : experts) * shape.groups, sizeof(float)));
  if (with_noise) results.least_words = static_cast<uint32_t*>(memory(rows * shape.groups, sizeof(uint32_t)));
  return results;
}

}  // namespace ensemw2s::cuda

// Calls f<T>(...) for the element type that a Dtype names.
#define ENSEMW2S_DISPATCH(dtype, function, ...) \
  switch (dtype) {                              \
    case Dtype::kFloat:                         \
      return function<float>(__VA_ARGS__);      \
    case Dtype::kBFloat16:                      \
      return function<BFloat16>(__VA_ARGS__);   \
    case Dtype::kHalf:                          \
      return function<Half>(__VA_ARGS__);       \
  }                                             \
  return "unknown dtype"
