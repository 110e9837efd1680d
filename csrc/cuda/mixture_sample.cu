// mixture_sample: scan, then a block per row that draws (the semantics are in
// ensemw2s/ops/mixture_sample.py).

#include "mixture.cuh"

namespace ensemw2s::cuda {

// Candidates that a row keeps. Where there are more, the logits are read again for every look at them.
#if !defined(ENSEMW2S_SHARED_CANDIDATES)
#  define ENSEMW2S_SHARED_CANDIDATES 2048
#endif
constexpr int kSharedCandidates = ENSEMW2S_SHARED_CANDIDATES;

constexpr int kBins = 256;

struct SampleScratch {
  float *upper, *lower;  // [rows, groups]: bounds on the largest log-probability of each group
  float* adjusted;       // [rows, count]: the log-probabilities at which the adjusted tokens are offered
};

// Where select_key goes on.
struct Digit {
  int value;
  uint64_t above;  // what the larger ones weigh
};

// A token and its log-probability.
struct Likely {
  float log_prob;
  int token;  // -1: none
};

ENSEMW2S_DEVICE Likely likelier(const Likely& a, const Likely& b) {
  if (a.token < 0 || b.token < 0) return a.token < 0 ? b : a;
  return is_likelier(a.log_prob, a.token, b.log_prob, b.token) ? a : b;
}

struct Best {
  double score;
  int token;   // -1: none yet
  int unused;  // whole words
};

ENSEMW2S_DEVICE Best better(const Best& a, const Best& b) {
  if (a.token < 0 || b.token < 0) return a.token < 0 ? b : a;
  if (a.score != b.score) return a.score > b.score ? a : b;
  return a.token < b.token ? a : b;
}

struct Sums {
  uint64_t first, second;
};

ENSEMW2S_DEVICE Sums added(const Sums& a, const Sums& b) { return {a.first + b.first, a.second + b.second}; }

// By all threads of a block.
ENSEMW2S_DEVICE_CALL Best best_of_all(Best mine) { return reduce_block<kRowThreads>(mine, better); }
ENSEMW2S_DEVICE_CALL Sums sums_of_all(Sums mine) { return reduce_block<kRowThreads>(mine, added); }

// A token's score in the race: what it has beyond `anchor`, at the temperature, and its noise.
ENSEMW2S_DEVICE_CALL double race_score(double log_prob, double anchor, double temperature, uint32_t word) {
  return (log_prob - anchor) / temperature + gumbel(word);
}

struct RowShared {
  RowState state;
  const float*
      upper;  // [groups]: bounds on the log-probabilities of the tokens that may be drawn as they are
  Offer offer;
  int64_t row, rows;
  int vocabulary;
  float limit;  // candidates reach this
  int count;    // of candidates, of which the first kSharedCandidates are kept
  int32_t ids[kSharedCandidates];
  float log_probs[kSharedCandidates];
  uint64_t sums[kRowThreads > kBins ? kRowThreads : kBins];
  Digit digit;

  ENSEMW2S_DEVICE bool is_plain(int token) const {
    return offer.plain_word(row, token / 32) >> (token % 32) & 1;
  }

  // By a single thread. The order of the candidates is left to chance: nothing may depend on it.
  ENSEMW2S_DEVICE void add_candidate(int token, float value) {
    const int i = atomic_add(&count, 1);
    if (i >= kSharedCandidates) return;
    ids[i] = token;
    log_probs[i] = value;
  }
};

// Rounding that a bound or a float32 log-probability of this size may have.
template <bool kProduct>
ENSEMW2S_DEVICE float slack_of(const RowState& state, float log_prob) {
  const float of_product =
      kProduct ? 1e-7f * (8 + state.num_experts) * fabsf(state.max[state.num_experts]) : 0;
  return 2e-5f + of_product + 1e-6f * fabsf(log_prob);
}

// visit(token, group) for every token that may be drawn as it is, of the groups first ... last - 1 with
// is_near(group): a warp looks at a group together.
template <class T, class Near, class Visit>
ENSEMW2S_DEVICE void visit_groups(const RowShared& shared, int first, int last, const Near& is_near,
                                  const Visit& visit) {
  const int share = last - first < kRowThreads ? (last - first + kRowWarps - 1) / kRowWarps : kWarp;
#pragma unroll 1
  for (int start = first + warp_index() * share; start < last; start += kRowWarps * share) {
    const int mine = start + lane_index();
    const bool is_mine = lane_index() < share && mine < last;
#pragma unroll 1
    for (uint32_t near = ballot(is_mine && is_near(mine)); near != 0; near &= near - 1) {
      const int group = start + lowest_bit(near), token = token_of<T>(group, lane_index());
      if (token < shared.vocabulary && shared.is_plain(token)) visit(token, group);
    }
  }
}

// The place of an adjusted token in the row's list; -1 if it has none there.
ENSEMW2S_DEVICE int64_t place_of(const Offer& offer, int64_t row, int token) {
  int64_t low = 0, high = offer.count;
#pragma unroll 1
  while (low < high) {
    const int64_t middle = (low + high) / 2;
    const int32_t other = offer.token(row, middle);
    if (other >= 0 && other < token)
      low = middle + 1;
    else
      high = middle;
  }
  return low < offer.count && offer.token(row, low) == token ? low : -1;
}

// The log-probability at which a token is offered; -inf if it may not be drawn.
template <class T, bool kProduct>
ENSEMW2S_DEVICE_CALL double offered_log_prob(const RowShared& shared, int token) {
  const double log_prob = exact_log_prob<T, kProduct>(shared.state, token);
  if (shared.is_plain(token)) return log_prob;
  const int64_t place = place_of(shared.offer, shared.row, token);
  if (place < 0 || !shared.offer.is_allowed(shared.row, token)) return -kInfinity;
  return shared.offer.adjustment(shared.rows, shared.row, place).of(log_prob);
}

template <class T, bool kProduct>
ENSEMW2S_DEVICE float quick_log_prob(const RowState& state, int token) {
  return float_log_prob<kProduct>(state, [&](int t) { return logit_of<T>(state, t, token); });
}

// Adds the candidates of the groups first ... last - 1.
template <class T, bool kProduct>
ENSEMW2S_DEVICE_CALL void gather(RowShared& shared, int first, int last) {
  const float near = shared.limit - slack_of<kProduct>(shared.state, shared.limit);
  visit_groups<T>(
      shared, first, last, [&](int g) { return shared.upper[g] >= near; },
      [&](int token, int) {
        const float value = quick_log_prob<T, kProduct>(shared.state, token);
        if (value >= shared.limit) shared.add_candidate(token, value);
      });
}

// An integer image of a float that keeps the order.
ENSEMW2S_DEVICE uint32_t ascending_bits(float value) {
  const uint32_t bits = bits_from_float(value == 0 ? 0.0f : value);
  return bits ^ (uint32_t(int32_t(bits) >> 31) | 0x80000000u);
}

ENSEMW2S_DEVICE float from_ascending_bits(uint32_t bits) {
  return float_from_bits(bits & 0x80000000u ? bits & 0x7fffffffu : ~bits);
}

// Finds the digit at which the bins, from the last one down, reach `target`; 0 if they do not. By one warp.
ENSEMW2S_DEVICE void find_digit(const uint64_t* bins, uint64_t target, Digit& digit) {
  constexpr int kEach = kBins / kWarp;
  const uint64_t* last = bins + kBins - 1 - kEach * lane_index();  // the lane's bins end here
  uint64_t mine = 0;
  for (int i = 0; i < kEach; ++i) mine += last[-i];
  uint64_t above = 0, total = mine;  // of the lanes before this one; of 2, 4, ... lanes together
  for (int mask = 1; mask < kWarp; mask *= 2) {
    const uint64_t other = shuffle_xor(total, mask);
    above += lane_index() & mask ? other : 0;
    total += other;
  }
  if (lane_index() == 0 && total < target) digit = {0, total - bins[0]};
  if (above >= target || above + mine < target) return;
  int i = 0;
  for (; above + last[-i] < target; ++i) above += last[-i];
  digit = {int(last - bins) - i, above};
}

// The largest key in low ... high such that the items from it upwards weigh at least `target`; `low` if all
// of them weigh less. each(add) calls add(key, weight) for every item, no key of which is above `high`.
// Weights are integers: their sums do not depend on the order of the items.
template <class Each>
ENSEMW2S_DEVICE uint32_t select_key(RowShared& shared, uint32_t low, uint32_t high, uint64_t target,
                                    const Each& each) {
  int bits = 0;
  while (bits < 32 && (high - low) >> bits) ++bits;
  while (bits > 0) {
    const int shift = bits > 8 ? bits - 8 : 0;
    for (int bin = thread_index(); bin < kBins; bin += kRowThreads) shared.sums[bin] = 0;
    barrier();
    each([&](uint32_t key, uint64_t weight) {
      const uint64_t offset = uint64_t(key) - low;
      if (key >= low && offset >> bits == 0) atomic_add(&shared.sums[offset >> shift], weight);
    });
    barrier();
    if (warp_index() == 0) find_digit(shared.sums, target, shared.digit);
    barrier();
    low += uint32_t(shared.digit.value) << shift;
    target -= shared.digit.above;
    bits = shift;
  }
  return low;
}

// One row's block. Every member function is called by all threads together unless it says otherwise.
template <class T, bool kProduct>
struct RowSampler {
  const DeviceMixture& mixture;
  const RowSettings settings;
  RowShared& shared;
  const RowState& state;
  int64_t row;
  int groups;
  const Partial* partials;
  const float* all_max;  // the groups' largest logits
  const float* maxima;   // those of the tokens that count
  const uint32_t* least_words;
  float *upper, *lower, *adjusted;
  float largest_lower;
  float inverse_temperature;
  double anchor = 0;  // of the race: near the likeliest token's log-probability

  ENSEMW2S_DEVICE RowSampler(const DeviceMixture& a_mixture, const RowSettings& asked,
                             const ScanResults& results, const SampleScratch& scratch, RowShared& a_shared,
                             int64_t a_row)
      : mixture(a_mixture),
        settings(asked),
        shared(a_shared),
        state(a_shared.state),
        row(a_row),
        groups(shape_of(a_mixture).groups),
        partials(results.partials + row * (mixture.num_experts + 1) * shape_of(a_mixture).chunks),
        all_max(maxima_of(results.group_max)),
        maxima(results.plain_max ? maxima_of(results.plain_max) : all_max),
        least_words(results.least_words + row * groups),
        upper(scratch.upper + row * groups),
        lower(scratch.lower + row * groups),
        adjusted(scratch.adjusted + row * mixture.offer.count),
        inverse_temperature(fminf(float(1 / settings.temperature), FLT_MAX)) {
    if (thread_index() != 0) return;
    shared.upper = upper;
    shared.offer = mixture.offer;
    shared.row = row;
    shared.rows = mixture.rows;
    shared.vocabulary = mixture.vocabulary;
  }

  ENSEMW2S_DEVICE const float* maxima_of(const float* of_rows) const {
    return of_rows + row * groups * (kProduct ? 1 : mixture.num_experts);
  }

  ENSEMW2S_DEVICE bool is_vote() const { return state.is_vote; }

  // Whether some tokens may not be drawn, or not as they are.
  ENSEMW2S_DEVICE bool is_restricted() const { return !shared.offer.is_everything(); }

  // The scan found the row valid. The token, which is the likeliest where the race has no winner, or -1 if no
  // token that may be drawn is possible.
  ENSEMW2S_DEVICE int draw() {
    barrier();  // shared.offer is known
    if (is_vote())
      collect_votes();
    else
      bound_groups();
    if (is_restricted() && !offers_something()) return -1;
    const int winner = settings.is_greedy() ? -1 : race();
    if (winner >= 0) return winner;
    return is_vote() ? most_voted() : most_probable();
  }

  ENSEMW2S_DEVICE int race() {
    if (is_vote()) return race_ranked();
    if (settings.top_k > 0) {
      collect(floor_of(settings.top_k));
      return race_filtered();
    }
    return settings.top_p < 1 ? race_in_nucleus() : race_all();
  }

  // ---- what is offered (by single threads) ----

  ENSEMW2S_DEVICE double offered(int token) const { return offered_log_prob<T, kProduct>(shared, token); }

  // visit(token, number) for the adjusted tokens that may be drawn.
  template <class Visit>
  ENSEMW2S_DEVICE void visit_adjusted(const Visit& visit) const {
#pragma unroll 1
    for (int64_t i = thread_index(); i < shared.offer.count; i += kRowThreads) {
      const int token = shared.offer.token(row, i);
      if (token >= 0 && shared.offer.is_allowed(row, token)) visit(token, i);
    }
  }

  // Whether some token may be drawn and is possible. Prepares the adjusted tokens for what follows.
  ENSEMW2S_DEVICE bool offers_something() const {
    if (is_vote()) return shared.count > 0;
    bool found = largest_lower > -kInfinity;
    visit_adjusted([&](int token, int64_t i) {
      adjusted[i] = float(offered(token));
      found = found || adjusted[i] > -kInfinity;
    });
    return reduce_block<kRowThreads>(int(found), [](int a, int b) { return a | b; }) != 0;
  }

  ENSEMW2S_DEVICE float slack(float log_prob) const { return slack_of<kProduct>(state, log_prob); }

  // ---- groups ----

  ENSEMW2S_DEVICE void bound_groups() {
    float largest = -kInfinity;
    for (int g = thread_index(); g < groups; g += kRowThreads) {
      if constexpr (kProduct)
        bound_product(g);
      else
        bound_mixture(g);
      largest = fmaxf(largest, lower[g]);
    }
    // Its barriers also make the bounds known to all threads.
    largest_lower = reduce_block<kRowThreads>(largest, [](float a, float b) { return fmaxf(a, b); });
  }

  ENSEMW2S_DEVICE void bound_product(int g) {
    const double fall = descent(mixture, state, partials, g / kWarp) - state.product_max;
    upper[g] = lower[g] = maxima[g] + float(fall - state.log_sum[mixture.num_experts]);
  }

  // One token of the group has the largest of the terms; none has all of them in full.
  ENSEMW2S_DEVICE void bound_mixture(int g) {
    float term = -kInfinity, probability = 0;
#pragma unroll 4
    for (int a = 0; a < state.num_active; ++a) {
      const int t = state.active[a];
      const float max = maxima[int64_t(t) * groups + g];
      term = fmaxf(term, (max - state.max[t]) + state.shift[t]);
      probability += weighted_probability(state, t, max);
    }
    lower[g] = term;
    upper[g] = log_of(probability, state, [&](int t) { return maxima[int64_t(t) * groups + g]; });
  }

  // ---- greedy ----

  ENSEMW2S_DEVICE int most_probable() {
    collect(largest_lower);
    if (shared.count == 1) {
      const int only = shared.ids[0];
      barrier();  // the candidates may be others again
      return only;
    }
    Best best{0, -1, 0};
    visit_candidates([&](int token, float) { best = better(best, {offered(token), token, 0}); });
    best = best_of_all(best);
    return best.token >= 0 ? best.token : most_probable_of_best_group();
  }

  // What the bounds rule out by rounding alone: logits that are as large as floats get.
  ENSEMW2S_DEVICE int most_probable_of_best_group() {
    Best best{0, -1, 0};
    visit_groups<T>(
        shared, 0, groups, [&](int g) { return lower[g] == largest_lower; },
        [&](int token, int) { best = better(best, {exact_log_prob<T, kProduct>(state, token), token, 0}); });
    return best_of_all(best).token;
  }

  ENSEMW2S_DEVICE int most_voted() {
    Best best{0, -1, 0};
    for (int i = thread_index(); i < shared.count; i += kRowThreads)
      best = better(best, {offered(shared.ids[i]), shared.ids[i], 0});
    return best_of_all(best).token;
  }

  // ---- candidates ----

  ENSEMW2S_DEVICE void clear_candidates() const {
    if (thread_index() == 0) shared.count = 0;
    barrier();
  }

  ENSEMW2S_DEVICE void collect_votes() {
    clear_candidates();
    for (int t = thread_index(); t < mixture.num_experts; t += kRowThreads) {
      bool is_first = state.winner[t] >= 0;
      for (int earlier = 0; earlier < t; ++earlier)
        is_first = is_first && state.winner[earlier] != state.winner[t];
      const float value = is_first ? float(offered(state.winner[t])) : -kInfinity;
      if (value > -kInfinity) shared.add_candidate(state.winner[t], value);
    }
    barrier();
  }

  // Makes candidates of all possible tokens whose log-probability is at least `floor` (and of some that are
  // less than slack() below).
  ENSEMW2S_DEVICE void collect(float floor) {
    const float limit = limit_of(floor);
    if (thread_index() == 0) shared.limit = limit;
    clear_candidates();
    gather<T, kProduct>(shared, 0, groups);
    visit_adjusted([&](int token, int64_t i) {
      if (adjusted[i] >= limit) shared.add_candidate(token, adjusted[i]);
    });
    barrier();
  }

  ENSEMW2S_DEVICE float limit_of(float floor) const { return fmaxf(floor - slack(floor), kLowest); }

  // visit(token, log-probability) for every candidate.
  template <class Visit>
  ENSEMW2S_DEVICE void visit_candidates(const Visit& visit) const {
    if (shared.count <= kSharedCandidates)
      visit_kept(visit);
    else
      visit_again(visit);
  }

  template <class Visit>
  ENSEMW2S_DEVICE void visit_kept(const Visit& visit) const {
#pragma unroll 1
    for (int i = thread_index(); i < shared.count; i += kRowThreads)
      visit(shared.ids[i], shared.log_probs[i]);
  }

  // As many groups as have room are gathered at a time.
  template <class Visit>
  ENSEMW2S_DEVICE void visit_again(const Visit& visit) const {
    constexpr int kGroups = kSharedCandidates / kGroup;
    const int count = shared.count;
#pragma unroll 1
    for (int first = 0; first < groups; first += kGroups) {
      barrier();
      clear_candidates();
      gather<T, kProduct>(shared, first, first + kGroups < groups ? first + kGroups : groups);
      barrier();
      visit_kept(visit);
    }
    visit_adjusted([&](int token, int64_t i) {
      if (adjusted[i] >= shared.limit) visit(token, adjusted[i]);
    });
    barrier();
    if (thread_index() == 0) shared.count = count;
    barrier();
  }

  // Two sums over the candidates: add(token, log-probability, sums) adds a candidate's part.
  template <class Add>
  ENSEMW2S_DEVICE Sums sum_candidates(const Add& add) const {
    Sums sums{};
    visit_candidates([&](int token, float value) { add(token, value, sums); });
    return sums_of_all(sums);
  }

  // A log-probability that at least `count` tokens reach: each group holds one that reaches its lower bound.
  ENSEMW2S_DEVICE float floor_of(int64_t count) const {
    constexpr float kStep = 1.0f / 512;
    constexpr uint32_t kSteps = 1 << 16;
    if (count > groups) return -kInfinity;
    const auto key = [&](int g) {
      const float steps = (largest_lower - lower[g]) / kStep;
      return steps < kSteps ? kSteps - uint32_t(steps) : 0;
    };
    const uint32_t found = select_key(shared, 0, kSteps, uint64_t(count), [&](const auto& add) {
      for (int g = thread_index(); g < groups; g += kRowThreads) add(key(g), 1);
    });
    return found > 0 ? largest_lower - (kSteps - found + 1) * kStep : -kInfinity;
  }

  ENSEMW2S_DEVICE Likely likeliest_candidate() const {
    Likely best{0, -1};
    visit_candidates([&](int token, float value) { best = likelier(best, {value, token}); });
    return reduce_block<kRowThreads>(best, likelier);
  }

  // ---- the likeliest tokens ----

  // After draw(), whose bounds it uses where they are those of all tokens: those likelier than all others,
  // the likeliest first.
  ENSEMW2S_DEVICE void write_likeliest(const SampleOutputs& outputs) {
    const int count = int(outputs.top_count);
    if (is_restricted()) {
      barrier();
      maxima = all_max;
      if (thread_index() == 0) shared.offer = {};
      barrier();
      if (!is_vote()) bound_groups();
    }
    if (is_vote())
      collect_votes();
    else
      collect(floor_of(count));
    Likely last{kInfinity, 0};
    for (int n = 0; n < count; ++n) {
      if (last.token >= 0) last = next_likeliest(last);
      if (thread_index() != 0) continue;
      outputs.top_tokens[row * count + n] = last.token;
      outputs.top_log_probs[row * count + n] = last.token < 0 ? -kInfinity : last.log_prob;
    }
  }

  ENSEMW2S_DEVICE Likely next_likeliest(const Likely& last) const {
    Likely next{0, -1};
    visit_candidates([&](int token, float value) {
      if (value > -kInfinity && is_likelier(last.log_prob, last.token, value, token))
        next = likelier(next, {value, token});
    });
    return reduce_block<kRowThreads>(next, likelier);
  }

  // ---- filters ----

  // exp((log_prob - top) / temperature) as a whole number of units: sums of 2^21 of them fit, in any order.
  // `top` is at least the log-probability, up to rounding.
  static constexpr float kMassUnit = 0x1p42f;
  ENSEMW2S_DEVICE uint64_t mass(float value, float top) const {
    return uint64_t(expf(fminf((value - top) * inverse_temperature, 0.0f)) * kMassUnit);
  }

  // The mass that the nucleus has to reach.
  ENSEMW2S_DEVICE uint64_t target_of(double total) const { return uint64_t(ceil(settings.top_p * total)); }

  // What min-p asks of a log-probability.
  ENSEMW2S_DEVICE float min_p_floor(float top) const {
    return settings.min_p > 0 ? top + float(settings.temperature * log(settings.min_p)) : -kInfinity;
  }

  // What top-k and top-p let through: keys above `key`, and those equal to it up to token `last_tied`.
  struct Kept {
    uint32_t key;
    int last_tied;

    ENSEMW2S_DEVICE bool holds(uint32_t other, int token) const {
      return other > key || (other == key && token <= last_tied);
    }
  };

  // Filters the candidates and draws; -1 if there are none.
  ENSEMW2S_DEVICE int race_filtered() {
    if (shared.count <= kRowThreads) return race_ranked();
    const Likely likeliest = likeliest_candidate();
    const float top = likeliest.log_prob;
    Kept kept{0, mixture.vocabulary};
    if (settings.top_k > 0 && settings.top_k < shared.count)
      kept.key = select_key(shared, ascending_bits(shared.limit), ascending_bits(top),
                            uint64_t(settings.top_k), [&](const auto& add) {
                              visit_candidates([&](int, float value) { add(ascending_bits(value), 1); });
                            });
    if (settings.top_p < 1) {
      const uint64_t sum = sum_candidates([&](int, float value, Sums& sums) {
                             if (ascending_bits(value) >= kept.key) sums.first += mass(value, top);
                           }).first;
      keep_nucleus(kept, top, target_of(double(sum)), sum);
    }
    anchor = offered(likeliest.token);
    return race_candidates(kept, min_p_floor(top));
  }

  // Narrows what is kept, whose mass is `sum`, to the likeliest candidates that weigh `target` together. None
  // is likelier than `top`, up to rounding.
  ENSEMW2S_DEVICE void keep_nucleus(Kept& kept, float top, uint64_t target, uint64_t sum) const {
    if (target > sum) return;
    const uint32_t least = kept.key;
    const uint32_t edge = select_key(shared, ascending_bits(shared.limit), ascending_bits(top + slack(top)),
                                     target, [&](const auto& add) {
                                       visit_candidates([&](int, float value) {
                                         const uint32_t key = ascending_bits(value);
                                         if (key >= least) add(key, mass(value, top));
                                       });
                                     });
    const auto [above, tied] = sum_candidates([&](int, float value, Sums& sums) {
      const uint32_t key = ascending_bits(value);
      if (key > edge) sums.first += mass(value, top);
      if (key == edge) ++sums.second;
    });
    const uint64_t each = mass(from_ascending_bits(edge), top);
    const uint64_t admitted = (target - above + each - 1) / each;
    kept = {edge, mixture.vocabulary};
    if (admitted < tied)  // the lowest ids first
      kept.last_tied =
          int(~select_key(shared, ~uint32_t(mixture.vocabulary - 1), ~0u, admitted, [&](const auto& add) {
            visit_candidates([&](int token, float value) {
              if (ascending_bits(value) == edge) add(~uint32_t(token), 1);
            });
          }));
  }

  // race_filtered where every thread holds a candidate: it looks at all others instead of selecting by key.
  ENSEMW2S_DEVICE int race_ranked() {
    const int count = shared.count, i = thread_index();
    if (count == 0) return -1;
    const int token = i < count ? shared.ids[i] : -1;
    const float value = i < count ? shared.log_probs[i] : -kInfinity;
    const Likely likeliest = likeliest_candidate();
    const float top = likeliest.log_prob;
    int likelier_tokens = 0;
    if (settings.top_k > 0)
      for (int other = 0; other < count; ++other) likelier_tokens += shared.log_probs[other] > value;
    bool is_kept = i < count && (settings.top_k == 0 || likelier_tokens < settings.top_k);
    if (settings.top_p < 1) {
      const uint64_t mine = is_kept ? mass(value, top) : 0;
      if (i < count) shared.sums[i] = mine;
      const uint64_t total = sums_of_all({mine, 0}).first;
      uint64_t before = 0;
      for (int other = 0; other < count; ++other)
        if (is_likelier(shared.log_probs[other], shared.ids[other], value, token))
          before += shared.sums[other];
      is_kept = is_kept && before < target_of(double(total));
    }
    is_kept = is_kept && value >= min_p_floor(top);
    anchor = offered(likeliest.token);
    Best best{0, -1, 0};
    if (is_kept) enter(best, token, value, -kInfinity);
    return best_of_all(best).token;
  }

  // ---- top-p alone: if the winner among all tokens lies in the nucleus, it is the nucleus's, too ----

  // Whether all tokens together weigh 1, which is then known without a look at them.
  ENSEMW2S_DEVICE bool weighs_one() const { return settings.temperature == 1 && !is_restricted(); }

  // As the candidates have it.
  ENSEMW2S_DEVICE float offered_as_float(int token) const {
    return shared.is_plain(token) ? quick_log_prob<T, kProduct>(state, token) : float(offered(token));
  }

  // So many of the likeliest tokens weigh nearly all in most rows.
  static constexpr int kLikelyTokens = 512;

  ENSEMW2S_DEVICE int race_in_nucleus() {
    const int winner = race_all();
    if (winner < 0) return winner;
    const float value = offered_as_float(winner), top = float(offered(most_probable()));
    float floor = weighs_one() ? value : floor_of(kLikelyTokens);
    uint64_t target = 0, sum = 0;  // unknown until what all tokens weigh is
#pragma unroll 1
    while (true) {
      collect(floor);
      const auto [likelier, all] = sum_candidates([&](int token, float other, Sums& sums) {
        const uint64_t weight = mass(other, top);
        if (is_likelier(other, token, value, winner)) sums.first += weight;
        sums.second += weight;
      });
      sum = all;
      const bool has_likelier = value >= floor;  // all of them
      // What else there is only makes the nucleus larger.
      if (has_likelier && likelier < target_of(double(sum))) return winner;
      if (target == 0) target = target_of(weighs_one() ? whole_mass(sum, top) : double(total_mass(top)));
      if (has_likelier && likelier < target) return winner;
      if (sum >= target) break;
      floor = value;
    }
    Kept kept{0, mixture.vocabulary};
    keep_nucleus(kept, top, target, sum);
    return race_candidates(kept, min_p_floor(top));
  }

  // What all tokens weigh at temperature 1, of which some weigh `sum`.
  ENSEMW2S_DEVICE double whole_mass(uint64_t sum, float top) const {
    return fmax(double(sum), exp(-double(top)) * double(kMassUnit));
  }

  // What all tokens weigh. Groups of which no token weighs a unit are not read.
  ENSEMW2S_DEVICE uint64_t total_mass(float top) const {
    uint64_t mine = 0;
    visit_groups<T>(
        shared, 0, groups,
        [&](int g) { return upper[g] > -kInfinity && mass(upper[g] + slack(upper[g]), top) > 0; },
        [&](int token, int) { mine += mass(quick_log_prob<T, kProduct>(state, token), top); });
    visit_adjusted([&](int, int64_t i) { mine += mass(adjusted[i], top); });
    return sums_of_all({mine, 0}).first;
  }

  // ---- Gumbel race: argmax over tokens of (log_prob - anchor) / temperature + noise ----

  // As -log(-log(1 - u)) <= -log(u), no token of this log-probability and word can score more.
  ENSEMW2S_DEVICE float highest_score(float value, uint32_t word) const {
    const float noise = 22.180710f - logf(float(word) + 0.5f);
    const float score = (value + slack(value) - float(anchor)) * inverse_temperature + noise;
    return score + (1e-4f + fminf(1e-6f * fabsf(score), FLT_MAX));
  }

  // By a single thread.
  ENSEMW2S_DEVICE void enter(Best& best, int token, float upper_bound, double floor) const {
    const uint32_t word = philox(settings.seed, settings.position, uint32_t(token));
    if (best.token >= 0 && double(highest_score(upper_bound, word)) < best.score) return;
    const double value = offered(token);
    if (value >= floor && value > -kInfinity)
      best = better(best, {race_score(value, anchor, settings.temperature, word), token, 0});
  }

  ENSEMW2S_DEVICE int race_candidates(const Kept& kept, float floor) const {
    Best best{0, -1, 0};
    visit_candidates([&](int token, float value) {
      if (value >= floor && kept.holds(ascending_bits(value), token)) enter(best, token, value, -kInfinity);
    });
    return best_of_all(best).token;
  }

  // Below this temperature the likeliest token is looked for first, as for min-p: it is the anchor.
  static constexpr double kCold = 1e-3;
  // No noise makes up for this: it lies between -3.2 and 22.9.
  static constexpr double kFarthest = -30;

  // No filter but min-p, which alone needs nothing but the likeliest token.
  ENSEMW2S_DEVICE int race_all() {
    double floor = -kInfinity;
    if (settings.min_p > 0 || settings.temperature < kCold) {
      anchor = offered(most_probable());
      floor = anchor + settings.temperature * (settings.min_p > 0 ? log(settings.min_p) : kFarthest);
    }
    const float rounded_floor = float(floor);
    const auto reaches_floor = [&](int g) {
      return upper[g] > -kInfinity && upper[g] + slack(upper[g]) >= rounded_floor;
    };
    Best group{0, -1, 0};
    for (int g = thread_index(); g < groups; g += kRowThreads)
      if (reaches_floor(g)) group = better(group, {highest_score(upper[g], least_words[g]), g, 0});
    group = best_of_all(group);
    // The group of the highest bound first: few others can beat what it holds.
    Best best{0, -1, 0};
    const int token = group.token < 0 ? mixture.vocabulary : token_of<T>(group.token, lane_index());
    if (warp_index() == 0 && token < mixture.vocabulary && shared.is_plain(token))
      enter(best, token, upper[group.token], floor);
    best = best_of_all(best);
    visit_groups<T>(
        shared, 0, groups,
        [&](int g) {
          return reaches_floor(g) &&
                 (best.token < 0 || double(highest_score(upper[g], least_words[g])) >= best.score);
        },
        [&](int other, int g) { enter(best, other, upper[g], floor); });
    visit_adjusted([&](int other, int64_t i) { enter(best, other, adjusted[i], floor); });
    return best_of_all(best).token;
  }
};

// Whether a row's adjustments are such as token_adjustments makes. By all threads of the row's block; all
// find the same.
ENSEMW2S_DEVICE bool are_adjustments_usable(const DeviceMixture& mixture, int64_t row) {
  const Offer& offer = mixture.offer;
  if (offer.count == 0) return true;
  bool good = true;
  for (int64_t i = thread_index(); i < offer.count; i += kRowThreads) {
    const int token = offer.token(row, i), last = i > 0 ? offer.token(row, i - 1) : -1;
    const bool in_order = i == 0 || (last >= 0 && last < token);
    if (token >= 0)
      good = good && token < mixture.vocabulary && in_order &&
             offer.adjustment(mixture.rows, row, i).is_usable();
  }
  return reduce_block<kRowThreads>(int(good), [](int a, int b) { return a & b; }) != 0;
}

// By all threads of an invalid row's block.
ENSEMW2S_DEVICE void write_no_likeliest(const SampleOutputs& outputs, int64_t row) {
  for (int64_t n = thread_index(); n < outputs.top_count; n += kRowThreads) {
    outputs.top_tokens[row * outputs.top_count + n] = -1;
    outputs.top_log_probs[row * outputs.top_count + n] = NAN;
  }
}

template <class T, bool kProduct>
ENSEMW2S_KERNEL(kRowThreads, 1)
sample_kernel(const DeviceMixture mixture, const SampleSettings settings, const ScanResults results,
              const SampleScratch scratch, const SampleOutputs outputs) {
  ENSEMW2S_SHARED(RowShared, shared);
  const int64_t row = block_index();
  merge_partials<T, kProduct>(mixture, results, row, shared.state);
  barrier();
  const RowSettings asked = settings.of(row, mixture.vocabulary);
  const bool is_usable =
      is_valid<kProduct>(shared.state) && asked.are_usable() && are_adjustments_usable(mixture, row);
  RowSampler<T, kProduct> sampler(mixture, asked, results, scratch, shared, row);
  if (is_usable && mixture.combine == Combine::kVote) {
    find_winners<T>(mixture, results, row, shared.state);
    barrier();
  }
  const int token = is_usable ? sampler.draw() : -1;
  const bool valid = token >= 0;
  for (int t = thread_index(); t < mixture.num_experts; t += kRowThreads)
    outputs.expert_log_probs[t * mixture.rows + row] =
        valid && shared.state.usable[t] ? float(expert_log_prob<T>(shared.state, t, token)) : NAN;
  if (thread_index() == 0) {
    outputs.valid[row] = valid;
    outputs.tokens[row] = token;
    outputs.log_probs[row] = valid ? float(exact_log_prob<T, kProduct>(shared.state, token)) : NAN;
  }
  if (!valid)
    write_no_likeliest(outputs, row);
  else if (outputs.top_count > 0)
    sampler.write_likeliest(outputs);
}

// Whether some row may need the noise of all tokens.
inline bool needs_noise(const DeviceMixture& mixture, const SampleSettings& settings) {
  if (mixture.combine == Combine::kVote) return false;
  return !settings.same_for_all() || races_all(settings.settings_of(0, mixture.vocabulary));
}

template <class T>
const char* launch_sample(const DeviceMixture& mixture, const SampleSettings& settings,
                          const SampleOutputs& outputs, const Allocate& allocate, Stream stream) {
  const ScanResults results = allocate_scan(mixture, needs_noise(mixture, settings), allocate);
  const int64_t bounds = mixture.rows * shape_of(mixture).groups;
  const int64_t adjusted = mixture.rows * mixture.offer.count;
  float* upper = static_cast<float*>(allocate((2 * bounds + adjusted) * int64_t(sizeof(float))));
  const SampleScratch scratch{upper, upper + bounds, upper + 2 * bounds};
  if (const char* error = launch_scan<T>(mixture, settings, results, stream)) return error;
  const auto kernel = is_product(mixture) ? &sample_kernel<T, true> : &sample_kernel<T, false>;
  return launch(kernel, {mixture.rows}, kRowThreads, Start::kEarly, stream, mixture, settings, results,
                scratch, outputs);
}

const char* mixture_sample(const DeviceMixture& mixture, const SampleSettings& settings,
                           const SampleOutputs& outputs, const Allocate& allocate, void* stream) {
  if (mixture.rows == 0) return nullptr;
  ENSEMW2S_DISPATCH(mixture.dtype, launch_sample, mixture, settings, outputs, allocate,
                    static_cast<Stream>(stream));
}

}  // namespace ensemw2s::cuda
