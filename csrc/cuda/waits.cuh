// Waits that end. In a build with BAM_BOUNDED_WAITS a thread that looks at a barrier in vain for a second says where it
// waits and for what, and traps: the kernel ends with an error, where it would have run for ever. Other builds look
// at no clock, and a Deadline is nothing there.
//
// Not bounded are the hardware's own barriers, which have no form that only looks: those of a block, of a cluster
// (barrier.cluster.wait), and the wait for the kernel before. Whoever starts the process must bound these.
#pragma once

#ifdef BAM_BOUNDED_WAITS

#include <cstdint>
#include <cstdio>

namespace bam::cuda {

class Deadline {
 public:
  __device__ __forceinline__ Deadline() : begin_(nanoseconds()) {}

  // After a look in vain at a barrier, which lies `place` bytes into shared memory.
  __device__ __forceinline__ void check(const char* whom, unsigned place, unsigned phase) const {
    if (nanoseconds() - begin_ > kBound) give_up(whom, place, phase);
  }

 private:
  static constexpr uint64_t kBound = 1000000000, kTimeToReport = 50000000;

  static __device__ __forceinline__ uint64_t nanoseconds() {
    uint64_t now;
    asm volatile("mov.u64 %0, %%globaltimer;" : "=l"(now));
    return now;
  }

  // One line a warp, with the name of the kernels' file.
  static __device__ __noinline__ void give_up(const char* whom, unsigned place, unsigned phase) {
    const char* file = __BASE_FILE__;
    for (const char* c = file; *c; ++c)
      if (*c == '/') file = c + 1;
    if (threadIdx.x % 32 == __ffs(__activemask()) - 1u)
      printf("bam_kernels: %s: block %u of %u, thread %u of %u waits for %s (barrier at byte %u, phase %u)\n", file,
             blockIdx.x, gridDim.x, threadIdx.x, blockDim.x, whom, place, phase);
    // A trap ends all blocks: others that wait have this long to say so.
    for (const uint64_t since = nanoseconds(); nanoseconds() - since < kTimeToReport;) __nanosleep(1000);
    __trap();
  }

  uint64_t begin_;
};

}  // namespace bam::cuda

#else

namespace bam::cuda {

struct Deadline {
  __device__ __forceinline__ void check(const char*, unsigned, unsigned) const {}
};

}  // namespace bam::cuda

#endif
