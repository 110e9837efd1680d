// Threads for the kernels without a torch header: parallel.cpp hands the work to torch's own pool.
#pragma once

#include <cstdint>

namespace ensemw2s {

int64_t num_threads();
void parallel_ranges(int64_t end, void (*body)(int64_t, int64_t, void*), void* context);

// Calls body(begin, end) on disjoint ranges that cover [0, end), one per thread.
template <class Body>
void parallel_for(int64_t end, const Body& body) {
  parallel_ranges(
      end, [](int64_t from, int64_t to, void* context) { (*static_cast<const Body*>(context))(from, to); },
      const_cast<void*>(static_cast<const void*>(&body)));
}

}  // namespace ensemw2s
