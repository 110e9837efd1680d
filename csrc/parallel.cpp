#include "parallel.h"

#include <torch/csrc/stable/ops.h>

namespace ensemw2s {

int64_t num_threads() { return torch::stable::get_num_threads(); }

void parallel_ranges(int64_t end, void (*body)(int64_t, int64_t, void*), void* context) {
  torch::stable::parallel_for(0, end, 1, [&](int64_t from, int64_t to) { body(from, to, context); });
}

}  // namespace ensemw2s
