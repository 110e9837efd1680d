#include <ucontext.h>

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <map>
#include <memory>
#include <vector>

#include "device.h"

namespace ensemw2s::cuda::emulation {

namespace {

constexpr size_t kStackBytes = 256 * 1024;

enum class State { kReady, kAtBarrier, kAtExchange, kDone };

struct Fiber {
  ucontext_t context;
  std::unique_ptr<char[]> stack{new char[kStackBytes]};
  State state;
  uint64_t exchanges;
};

struct Warp {
  // Two sets: a lane may be one exchange ahead of those that have not read the last one yet.
  char given[2][kWarp * kLargestExchange];
  int waiting = 0;
};

struct FreeLater {
  void operator()(void* memory) const { std::free(memory); }
};

struct Machine {
  std::vector<Fiber> fibers;
  std::vector<Warp> warps;
  std::map<const void*, std::unique_ptr<void, FreeLater>> shared;
  const std::function<void()>* body = nullptr;
  ucontext_t scheduler;
  int threads = 0, current = 0, favoured = 0, rounds_of_favour = 0;
  int64_t block = 0;
  Grid grid{1};
  uint64_t random = 1;
};

Machine machine;

uint64_t next_random() {  // xorshift64*
  uint64_t& x = machine.random;
  x ^= x >> 12;
  x ^= x << 25;
  x ^= x >> 27;
  return x * 0x2545F4914F6CDD1Dull >> 11;
}

Fiber& self() { return machine.fibers[machine.current]; }

void pause(State state) {
  self().state = state;
  swapcontext(&self().context, &machine.scheduler);
}

void fiber_main() {
  (*machine.body)();
  self().state = State::kDone;
}

void prepare(int thread) {
  Fiber& fiber = machine.fibers[thread];
  getcontext(&fiber.context);
  fiber.context.uc_stack.ss_sp = fiber.stack.get();
  fiber.context.uc_stack.ss_size = kStackBytes;
  fiber.context.uc_link = &machine.scheduler;
  makecontext(&fiber.context, fiber_main, 0);
  fiber.state = State::kReady;
  fiber.exchanges = 0;
}

[[noreturn]] void fail(const char* message) {
  std::fprintf(stderr, "emulation: %s (block %lld)\n", message, static_cast<long long>(machine.block));
  std::abort();
}

// Opens the barrier once every thread of the block has come to it.
void open_barrier() {
  int waiting = 0;
  for (const Fiber& fiber : machine.fibers) waiting += fiber.state == State::kAtBarrier;
  if (waiting < machine.threads) fail("some threads wait where the others never come");
  for (Fiber& fiber : machine.fibers) fiber.state = State::kReady;
}

// Leaves only the threads of one warp for some rounds, so that it runs far ahead of the others, then of
// another one.
void favour_a_warp(std::vector<int>& ready) {
  if (machine.rounds_of_favour-- == 0) {
    machine.favoured = int(next_random() % (machine.warps.size() + 1));  // the last one: none
    machine.rounds_of_favour = int(next_random() % 32);
  }
  std::vector<int> chosen;
  for (int t : ready)
    if (t / kWarp == machine.favoured) chosen.push_back(t);
  if (!chosen.empty()) ready = chosen;
}

void run_block() {
  for (int t = 0; t < machine.threads; ++t) prepare(t);
  std::vector<int> ready;
  for (;;) {
    ready.clear();
    bool all_done = true;
    for (int t = 0; t < machine.threads; ++t) {
      all_done = all_done && machine.fibers[t].state == State::kDone;
      if (machine.fibers[t].state == State::kReady) ready.push_back(t);
    }
    if (all_done) return;
    if (ready.empty()) {
      open_barrier();
      continue;
    }
    favour_a_warp(ready);
    for (size_t i = ready.size(); i > 1; --i) std::swap(ready[i - 1], ready[next_random() % i]);
    for (int t : ready) {
      machine.current = t;
      swapcontext(&machine.scheduler, &machine.fibers[t].context);
    }
  }
}

}  // namespace

int thread() { return machine.current; }
int64_t block() { return machine.block; }
const Grid& grid() { return machine.grid; }
void wait_for_block() { pause(State::kAtBarrier); }

const char* exchange(const void* mine, size_t bytes) {
  const int lane = machine.current % kWarp, first = machine.current - lane;
  Warp& warp = machine.warps[machine.current / kWarp];
  char* given = warp.given[self().exchanges++ % 2];
  std::memcpy(given + lane * kLargestExchange, mine, bytes);
  if (++warp.waiting < kWarp) {
    pause(State::kAtExchange);
    return given;
  }
  warp.waiting = 0;
  for (int other = first; other < first + kWarp; ++other)
    if (other != machine.current) machine.fibers[other].state = State::kReady;
  pause(State::kReady);
  return given;
}

void* shared_memory(const void* key, size_t bytes) {
  auto& memory = machine.shared[key];
  if (!memory) {
    memory.reset(std::malloc(bytes));
    std::memset(memory.get(), 0xAB, bytes);
  }
  return memory.get();
}

void run(const Grid& grid, int threads, const std::function<void()>& body) {
  if (threads % kWarp != 0) fail("a block is made of whole warps");
  machine.fibers = std::vector<Fiber>(threads);
  machine.threads = threads;
  machine.body = &body;
  machine.grid = grid;
  const int64_t blocks = grid.x * grid.y * grid.z;
  for (machine.block = 0; machine.block < blocks; ++machine.block) {
    machine.warps.assign(threads / kWarp, {});
    machine.shared.clear();
    run_block();
  }
}

void set_seed(uint64_t seed) { machine.random = seed * 0x9E3779B97F4A7C15ull | 1; }

}  // namespace ensemw2s::cuda::emulation
