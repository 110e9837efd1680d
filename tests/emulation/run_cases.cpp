// Runs the cases of a file and writes what the kernels give, every array in a heap block of its own: a
// program for AddressSanitizer, which a Python process is slow under. Usage: run_cases CASES RESULTS A case
// is nine int64 (order of the threads, sampling or not, experts, rows, vocabulary, combine, dtype, top_count,
// top_k), three doubles (temperature, top_p, min_p), then weights of each row, seeds, positions and each
// expert's logits. Where the order is odd, every row gets its settings by itself.

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <fstream>
#include <memory>
#include <vector>

#include "library.h"

namespace {

// Exactly as many bytes as asked for.
struct Array {
  explicit Array(int64_t bytes) : size(bytes), data(new char[bytes]) {}
  template <class V>
  V* as() {
    return reinterpret_cast<V*>(data.get());
  }
  int64_t size;
  std::unique_ptr<char[]> data;
};

Array read(std::istream& file, int64_t bytes) {
  Array array(bytes);
  file.read(array.data.get(), bytes);
  return array;
}

void write(std::ostream& file, Array& array) { file.write(array.data.get(), array.size); }

template <class V>
Array filled(int64_t count, V value) {
  Array array(count * int64_t(sizeof(V)));
  for (int64_t i = 0; i < count; ++i) array.as<V>()[i] = value;
  return array;
}

struct Header {
  int64_t order, samples, experts, rows, vocabulary, combine, dtype, top_count, top_k;
  double temperature, top_p, min_p;
};

const char* run_case(const Header& h, std::istream& cases, std::ostream& results) {
  Array weights = read(cases, h.rows * h.experts * 4), seeds = read(cases, h.rows * 8),
        positions = read(cases, h.rows * 8);
  std::vector<Array> logits;
  std::vector<const void*> pointers;
  const std::vector<int64_t> strides(h.experts, h.vocabulary);
  for (int64_t t = 0; t < h.experts; ++t) {
    logits.push_back(read(cases, h.rows * h.vocabulary * (h.dtype == 0 ? 4 : 2)));
    pointers.push_back(logits.back().as<void>());
  }
  if (!h.samples) {
    Array log_probs(h.rows * h.vocabulary * 4);
    const char* error =
        emulated_log_probs(h.order, pointers.data(), strides.data(), h.experts, h.rows, h.vocabulary,
                           weights.as<float>(), h.experts, h.combine, h.dtype, log_probs.as<float>());
    write(results, log_probs);
    return error;
  }
  Array tokens(h.rows * 8), log_probs(h.rows * 4), expert_log_probs(h.experts * h.rows * 4), valid(h.rows);
  Array top_tokens(h.rows * h.top_count * 8), top_log_probs(h.rows * h.top_count * 4);
  Array temperature = filled(h.rows, h.temperature), top_k = filled(h.rows, h.top_k),
        top_p = filled(h.rows, h.top_p), min_p = filled(h.rows, h.min_p);
  EmulatedSettings settings{
      h.temperature,          h.top_k, h.top_p, h.min_p, {}, {true, true, true, true}, seeds.as<int64_t>(),
      positions.as<int64_t>()};
  Array* of_rows[] = {&temperature, &top_k, &top_p, &min_p};
  for (int i = 0; i < 4 && h.order % 2; ++i) settings.rows[i] = of_rows[i]->as<void>();
  // All tokens are allowed and the last one is adjusted by nothing, which takes other paths to the same draw.
  const int64_t words = (h.vocabulary + 31) / 32;
  Array mask = filled(h.rows * words, ~0u), tokens_of_rows = filled(h.rows, int32_t(h.vocabulary - 1));
  Array listed = filled(h.rows * words, 0u), values = filled(3 * h.rows, 0.0f);
  for (int64_t row = 0; row < h.rows; ++row) {
    listed.as<uint32_t>()[(row + 1) * words - 1] = 1u << (h.vocabulary - 1) % 32;
    values.as<float>()[h.rows + row] = 1;
  }
  if (h.order % 3 == 0) {
    settings.mask = mask.as<uint32_t>();
    settings.tokens = tokens_of_rows.as<int32_t>();
    settings.values = values.as<float>();
    settings.listed = listed.as<uint32_t>();
    settings.count = 1;
  }
  const char* error = emulated_sample(
      h.order, pointers.data(), strides.data(), h.experts, h.rows, h.vocabulary, weights.as<float>(),
      h.experts, h.combine, h.dtype, &settings, h.top_count, tokens.as<int64_t>(), log_probs.as<float>(),
      expert_log_probs.as<float>(), valid.as<bool>(), top_tokens.as<int64_t>(), top_log_probs.as<float>());
  write(results, tokens);
  write(results, top_tokens);
  return error;
}

}  // namespace

int main(int, char** arguments) {
  std::ifstream cases(arguments[1], std::ios::binary);
  std::ofstream results(arguments[2], std::ios::binary);
  Header header;
  while (cases.read(reinterpret_cast<char*>(&header), sizeof header)) {
    const char* error = run_case(header, cases, results);
    if (!error) continue;
    std::fprintf(stderr, "%s\n", error);
    return 1;
  }
}
