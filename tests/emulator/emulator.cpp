// Fibers for threads, barriers that count, and a scheduler that runs whoever can run, in either order of threads: a
// result that depends on the order is a race.
// Jumps from fiber to fiber are to other stacks, which glibc's checked longjmp takes for an error.
#undef _FORTIFY_SOURCE
#include <sys/mman.h>
#include <ucontext.h>

#include <csetjmp>
#include <deque>
#include <map>
#include <memory>
#include <mutex>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "cuda_runtime.h"

dim3 threadIdx, blockIdx, blockDim, gridDim;

namespace emulator {
namespace {

constexpr size_t kStackBytes = 64 << 10;
constexpr size_t kGuard = 64;
constexpr unsigned char kGuardByte = 0xa5;

struct Barrier {
  unsigned expected = 0, arrived = 0;
  uint64_t generation = 0;
};

struct Warp {
  Barrier barrier;
  uint32_t slot[2][32];
};

struct Cluster {
  Barrier barrier;
  std::vector<struct Block*> blocks;
};

struct Copy {
  void* to;
  const void* from;
  size_t bytes;
};

struct Arrival {
  bool arrived = false;
  int64_t bytes = 0;  // that were said to come and have not, or less than 0: that came before it was said
  uint64_t phase = 0;
  std::vector<Copy> under_way;
};

struct Block {
  dim3 index;
  std::vector<unsigned char> shared;
  size_t shared_bytes = 0;
  Barrier barrier;
  std::vector<Warp> warps;
  Cluster* cluster = nullptr;
  unsigned rank = 0, running = 0;
  bool started = false;
  std::map<ptrdiff_t, Arrival> arrivals;  // by where they are in shared memory
  unsigned char* memory() { return shared.data() + (64 - reinterpret_cast<uintptr_t>(shared.data()) % 64) % 64; }
};

struct Fiber {
  dim3 thread;
  Block* block = nullptr;
  unsigned lane = 0, warp = 0, phase = 0;
  bool started = false, ended = false, follows = false;
  const uint64_t* waits_for = nullptr;
  uint64_t generation = 0;
  const char* where = "";
  std::deque<std::vector<Copy>> groups;
  std::vector<Copy> open;
  jmp_buf state;
  ucontext_t first;
};

struct Device {
  int shared_bytes = 227 << 10, cluster = 16;
} device;

bool reversed = false;
std::mutex one_launch;
std::vector<void*> stacks;
Fiber* current = nullptr;
jmp_buf scheduler;
const std::function<void()>* body = nullptr;
bool programmatic = false;
int launches = 0;

std::string fault;

// Ends the launch: from a fiber by way of the scheduler, whose stack the exception can unwind.
[[noreturn]] void fail(const std::string& reason) {
  fault = reason;
  if (current) _longjmp(scheduler, 1);
  throw std::runtime_error("emulator: " + fault);
}

__attribute__((noinline)) void yield() {
  if (!_setjmp(current->state)) _longjmp(scheduler, 1);
}

void wait(Barrier& barrier, const char* where) {
  if (++barrier.arrived == barrier.expected) {
    barrier.arrived = 0;
    ++barrier.generation;
    return;
  }
  current->waits_for = &barrier.generation;
  current->generation = barrier.generation;
  current->where = where;
  yield();
  current->waits_for = nullptr;
}

void check_it_follows() {
  if (programmatic && !current->follows) fail("a thread of a programmatic launch did not follow the kernels before");
}

void entry() {
  (*body)();
  check_it_follows();
  bool under_way = !current->open.empty();
  for (const auto& group : current->groups) under_way |= !group.empty();
  if (under_way) fail("a thread ended with copies under way");
  current->ended = true;
  _longjmp(scheduler, 1);
}

void resume(Fiber& fiber, void* stack) {
  current = &fiber;
  fiber.block->started = true;
  threadIdx = fiber.thread;
  blockIdx = fiber.block->index;
  if (_setjmp(scheduler)) {
    current = nullptr;
    if (!fault.empty()) fail(fault);
    return;
  }
  if (fiber.started) _longjmp(fiber.state, 1);
  fiber.started = true;
  getcontext(&fiber.first);
  fiber.first.uc_stack.ss_sp = stack;
  fiber.first.uc_stack.ss_size = kStackBytes;
  fiber.first.uc_link = nullptr;
  makecontext(&fiber.first, entry, 0);
  setcontext(&fiber.first);
}

bool can_run(const Fiber& fiber) {
  return !fiber.ended && (!fiber.waits_for || *fiber.waits_for != fiber.generation);
}

[[noreturn]] void fail_waiting(const std::vector<Fiber>& fibers) {
  std::string reason = "threads wait for ever:";
  for (const char* where : {"block", "warp", "cluster", "arrival"}) {
    unsigned waiting = 0;
    for (const Fiber& fiber : fibers) waiting += !fiber.ended && fiber.where == std::string(where);
    const char* at = where == std::string("arrival") ? " for an " : " at a barrier of the ";
    if (waiting) reason += " " + std::to_string(waiting) + at + where;
  }
  fail(reason);
}

// Runs the fiber at `at` if it can run.
bool run_one(std::vector<Fiber>& fibers, size_t at, size_t& left) {
  Fiber& fiber = fibers[at];
  if (!can_run(fiber)) return false;
  resume(fiber, stacks[at]);
  if (fiber.ended) {
    --left;
    --fiber.block->running;
    if (fiber.block->barrier.arrived) fail("a thread ended while others of its block wait for it");
  }
  return true;
}

// A warp runs as far ahead of the others as it can: what they have still to read, it may overwrite.
bool run_warp(std::vector<Fiber>& fibers, size_t first, size_t last, size_t& left) {
  bool any = false;
  for (bool ran = true; ran; any |= ran) {
    ran = false;
    for (size_t k = first; k < last; ++k) ran |= run_one(fibers, reversed ? last - 1 - (k - first) : k, left);
  }
  return any;
}

void schedule(std::vector<Fiber>& fibers, size_t threads) {
  std::vector<size_t> ends;  // of warps
  for (size_t block = 0; block < fibers.size(); block += threads)
    for (size_t t = 0; t < threads; t += 32) ends.push_back(block + (t + 32 < threads ? t + 32 : threads));
  size_t left = fibers.size();
  while (left) {
    bool ran = false;
    for (size_t k = 0; k < ends.size(); ++k) {
      const size_t w = reversed ? ends.size() - 1 - k : k;
      ran |= run_warp(fibers, w ? ends[w - 1] : 0, ends[w], left);
    }
    if (!ran) fail_waiting(fibers);
  }
}

void prepare(Block& block, const Launch& launch) {
  const unsigned threads = launch.block.x * launch.block.y * launch.block.z;
  block.shared.assign(launch.shared_bytes + kGuard + 64, 0xff);
  block.shared_bytes = launch.shared_bytes;
  memset(block.memory() + launch.shared_bytes, kGuardByte, kGuard);
  block.barrier.expected = block.running = threads;
  block.warps.resize((threads + 31) / 32);
  for (unsigned w = 0; w < block.warps.size(); ++w) {
    block.warps[w].barrier.expected = threads - 32 * w < 32 ? threads - 32 * w : 32;
  }
}

void add_fibers(std::vector<Fiber>& fibers, Block& block, const Launch& launch) {
  unsigned t = 0;
  for (unsigned z = 0; z < launch.block.z; ++z)
    for (unsigned y = 0; y < launch.block.y; ++y)
      for (unsigned x = 0; x < launch.block.x; ++x, ++t) {
        Fiber& fiber = fibers.emplace_back();
        fiber.thread = dim3(x, y, z);
        fiber.block = &block;
        fiber.lane = t % 32;
        fiber.warp = t / 32;
      }
}

// Some blocks at once: one, or a cluster.
void run_together(const Launch& launch, unsigned first, unsigned count) {
  const unsigned threads = launch.block.x * launch.block.y * launch.block.z;
  std::vector<std::unique_ptr<Block>> blocks;
  std::vector<Cluster> clusters(count / launch.cluster);
  std::vector<Fiber> fibers;
  fibers.reserve(static_cast<size_t>(count) * threads);
  for (unsigned k = 0; k < count; ++k) {
    blocks.push_back(std::make_unique<Block>());
    Block& block = *blocks.back();
    const unsigned flat = first + k;
    block.index =
        dim3(flat % launch.grid.x, flat / launch.grid.x % launch.grid.y, flat / launch.grid.x / launch.grid.y);
    prepare(block, launch);
    block.cluster = &clusters[k / launch.cluster];
    block.rank = k % launch.cluster;
    block.cluster->blocks.push_back(&block);
    block.cluster->barrier.expected += threads;
    add_fibers(fibers, block, launch);
  }
  while (stacks.size() < fibers.size()) {
    void* stack = mmap(nullptr, kStackBytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (stack == MAP_FAILED) fail("no memory for a stack");
    stacks.push_back(stack);
  }
  schedule(fibers, threads);
  for (auto& block : blocks) {
    for (size_t k = 0; k < kGuard; ++k)
      if (block->memory()[block->shared_bytes + k] != kGuardByte) fail("a write past the end of shared memory");
    for (const auto& [place, a] : block->arrivals)
      if (a.bytes || !a.under_way.empty()) fail("a block ended with copies under way");
  }
}

}  // namespace

void* shared_memory() {
  return current->block->memory();
}
void follow_earlier_kernels() {
  current->follows = true;
}
static void check_all_are_here(const Block& block) {
  if (block.running < block.barrier.expected) fail("a thread ended while others of its block wait for it");
}
void sync_block() {
  check_all_are_here(*current->block);
  wait(current->block->barrier, "block");
}
uint32_t from_lane(uint32_t mine, int lane) {
  Warp& warp = current->block->warps[current->warp];
  const unsigned phase = current->phase++ % 2;  // a lane may run ahead by one exchange, not by two
  warp.slot[phase][current->lane] = mine;
  wait(warp.barrier, "warp");
  return warp.slot[phase][lane];
}
unsigned cluster_rank() {
  return current->block->rank;
}
unsigned cluster_size() {
  return static_cast<unsigned>(current->block->cluster->blocks.size());
}
void sync_cluster() {
  wait(current->block->cluster->barrier, "cluster");
}

static Arrival& arrival_of(Block& block, void* mine) {
  const ptrdiff_t place = static_cast<unsigned char*>(mine) - current->block->memory();
  const auto found = block.arrivals.find(place);
  if (found == block.arrivals.end()) fail("an arrival that has not begun");
  return found->second;
}
static void end_phase_if_complete(Arrival& a) {
  if (!a.arrived || a.bytes || !a.under_way.empty()) return;
  a.arrived = false;
  ++a.phase;
}
bool has_arrivals() {
  return programmatic;
}
void begin_arrival(void* arrival) {
  if (reinterpret_cast<uintptr_t>(arrival) % 8) fail("an arrival that is not aligned");
  current->block->arrivals[static_cast<unsigned char*>(arrival) - current->block->memory()] = {};
}
void expect_bytes(void* arrival, unsigned bytes) {
  arrival_of(*current->block, arrival).bytes += bytes;
}
void arrive(void* arrival) {
  Arrival& a = arrival_of(*current->block, arrival);
  if (a.arrived) fail("a second thread arrives in one phase");
  a.arrived = true;
  end_phase_if_complete(a);
}
static void bring(Arrival& a, const Copy& copy) {
  memcpy(copy.to, copy.from, copy.bytes);
  a.bytes -= static_cast<int64_t>(copy.bytes);
}
void wait_for_arrival(void* arrival, bool odd) {
  Arrival& a = arrival_of(*current->block, arrival);
  for (const Copy& copy : a.under_way) bring(a, copy);
  a.under_way.clear();
  end_phase_if_complete(a);
  if ((a.phase % 2 == 1) != odd) return;
  current->waits_for = &a.phase;
  current->generation = a.phase;
  current->where = "arrival";
  yield();
  current->waits_for = nullptr;
}
void copy_bulk(void* to, const void* from, unsigned bytes, void* arrival) {
  if (reinterpret_cast<uintptr_t>(to) % 16 || reinterpret_cast<uintptr_t>(from) % 16 || bytes % 16)
    fail("a copy that is not aligned");
  check_it_follows();
  Arrival& a = arrival_of(*current->block, arrival);
  if (reversed) bring(a, {to, from, bytes});
  else a.under_way.push_back({to, from, bytes});
  end_phase_if_complete(a);
}
void send_16_bytes(const float (&x)[4], float* to, void* arrival, unsigned rank) {
  Block* block = current->block;
  if (rank >= block->cluster->blocks.size()) fail("an address in a block that the cluster has not");
  Block* other = block->cluster->blocks[rank];
  if (!other->started) fail("an address in a block that may not have begun");
  if (other->running == 0) fail("an address in a block that has ended");
  Arrival& a = arrival_of(*other, arrival);
  bring(a, {other->memory() + (reinterpret_cast<unsigned char*>(to) - block->memory()), x, 16});
  end_phase_if_complete(a);
}
void copy_16_bytes_later(void* to, const void* from) {
  if (reinterpret_cast<uintptr_t>(to) % 16 || reinterpret_cast<uintptr_t>(from) % 16)
    fail("a copy that is not aligned");
  check_it_follows();
  current->open.push_back({to, from, 16});
}
void commit_copies() {
  current->groups.push_back(std::move(current->open));
  current->open.clear();
}
void wait_for_copies(int groups_left) {
  while (static_cast<int>(current->groups.size()) > groups_left) {
    for (const Copy& copy : current->groups.front()) memcpy(copy.to, copy.from, copy.bytes);
    current->groups.pop_front();
  }
}

int run(const Launch& launch, const std::function<void()>& kernel) {
  const std::lock_guard<std::mutex> lock(one_launch);
  ++launches;
  const unsigned threads = launch.block.x * launch.block.y * launch.block.z;
  const unsigned blocks = launch.grid.x * launch.grid.y * launch.grid.z;
  if (!threads || threads > 1024 || !blocks || launch.grid.y > 65535 || launch.grid.z > 65535 || !launch.cluster ||
      blocks % launch.cluster || static_cast<int>(launch.shared_bytes) > device.shared_bytes ||
      static_cast<int>(launch.cluster) > device.cluster)
    return cudaErrorInvalidConfiguration;
  body = &kernel;
  programmatic = launch.programmatic;
  fault.clear();
  blockDim = launch.block;
  gridDim = launch.grid;
  const unsigned together = launch.cluster;
  for (unsigned k = 0; k < blocks; k += together) run_together(launch, reversed ? blocks - together - k : k, together);
  return cudaSuccess;
}

}  // namespace emulator

const char* cudaGetErrorString(cudaError_t error) {
  return error == cudaErrorInvalidConfiguration ? "invalid configuration argument" : "an error";
}
cudaError_t cudaGetLastError() {
  return cudaSuccess;
}
cudaError_t cudaGetDevice(int* device) {
  *device = 0;
  return cudaSuccess;
}
cudaError_t cudaSetDevice(int device) {
  return device == 0 ? cudaSuccess : cudaErrorInvalidValue;
}

extern "C" __attribute__((visibility("default"))) void emulator_set(int reversed) {
  emulator::reversed = reversed != 0;
}
extern "C" __attribute__((visibility("default"))) int emulator_launches() {
  return emulator::launches;
}
