// Runs CUDA kernels on the CPU, for tests: a CTA is a set of threads with a barrier, CTAs come one
// after another. What a sanitiser can see on a CPU it sees here: reads outside an array (dynamic
// shared memory is a heap block of exactly the size asked for), and races between two barriers. A
// barrier that some thread of the CTA left out ends the program.

#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <numeric>
#include <thread>
#include <vector>

#define __global__
#define __device__
#define __host__
#define __shared__ static  // CTAs run one after another, so one copy will do
#define __align__(n) __attribute__((aligned(n)))
#define __launch_bounds__(n)
#define GI_DYNAMIC_SHARED(name) unsigned char* name = emulation::dynamic_shared

using cudaStream_t = void*;
enum cudaError_t { cudaSuccess = 0 };
enum { cudaDevAttrMaxSharedMemoryPerBlockOptin, cudaFuncAttributeMaxDynamicSharedMemorySize };
struct cudaFuncAttributes {
  size_t sharedSizeBytes;
};

struct Dim {
  unsigned x;
};

namespace emulation {

inline int shared_limit = 64 << 10;
inline unsigned char* dynamic_shared = nullptr;

// Yields instead of sleeping: there are more threads than cores, and hundreds of barriers a kernel.
class Barrier {
 public:
  explicit Barrier(int size) : size_(size) {}
  void wait() {
    const int round = round_.load();
    if (waiting_.fetch_add(1) + 1 == size_) {
      waiting_.store(0);
      round_.store(round + 1);
      return;
    }
    while (round_.load() == round) {
      if (gone_.load() && round_.load() == round) {
        fprintf(stderr, "__syncthreads() that %d of %d threads never reach\n", gone_.load(), size_);
        abort();
      }
      std::this_thread::yield();
    }
  }
  void leave() { gone_.fetch_add(1); }

 private:
  const int size_;
  std::atomic<int> waiting_{0}, round_{0}, gone_{0};
};

inline Barrier* barrier = nullptr;

}  // namespace emulation

inline thread_local Dim threadIdx, blockIdx;
inline Dim blockDim, gridDim;

inline void __syncthreads() { emulation::barrier->wait(); }
inline int atomicOr(int* p, int bits) { return __atomic_fetch_or(p, bits, __ATOMIC_RELAXED); }

inline cudaError_t cudaGetLastError() { return cudaSuccess; }
inline const char* cudaGetErrorString(cudaError_t) { return "no error"; }
inline cudaError_t cudaGetDevice(int* device) { return *device = 0, cudaSuccess; }
inline cudaError_t cudaDeviceGetAttribute(int* value, int, int) {
  return *value = emulation::shared_limit, cudaSuccess;
}
template <class Kernel>
cudaError_t cudaFuncGetAttributes(cudaFuncAttributes* attributes, Kernel) {
  return attributes->sharedSizeBytes = 0, cudaSuccess;
}
template <class Kernel>
cudaError_t cudaFuncSetAttribute(Kernel, int, int) {
  return cudaSuccess;
}

namespace gi {

template <class Kernel, class... Args>
void launch(Kernel kernel, int grid, int block, size_t shared, cudaStream_t, Args... args) {
  gridDim = {unsigned(grid)};
  blockDim = {unsigned(block)};
  std::vector<unsigned char> memory(shared);
  memory.shrink_to_fit();
  emulation::dynamic_shared = memory.data();
  std::deque<emulation::Barrier> barriers;  // one a CTA
  for (int b = 0; b < grid; ++b) barriers.emplace_back(block);
  emulation::Barrier next_cta(block);
  const auto run = [&](int t) {
    threadIdx = {unsigned(t)};
    for (int b = 0; b < grid; ++b) {
      blockIdx = {unsigned(b)};
      if (t == 0) {
        std::fill(memory.begin(), memory.end(), 0xFF);  // NaN to whoever reads before writing
        emulation::barrier = &barriers[b];
      }
      next_cta.wait();
      kernel(args...);
      barriers[b].leave();
      next_cta.wait();
    }
  };
  std::vector<std::thread> threads;
  for (int t = 0; t < block; ++t) threads.emplace_back(run, t);
  for (auto& thread : threads) thread.join();
}

template <class K>
cudaError_t sort_on_device(void* temporary, size_t& bytes, const K* in, K* out, const double* weights_in,
                           double* weights_out, int n, cudaStream_t) {
  bytes = 16;
  if (temporary == nullptr) return cudaSuccess;
  std::vector<int> order(n);
  std::iota(order.begin(), order.end(), 0);
  std::stable_sort(order.begin(), order.end(), [&](int a, int b) { return in[a] < in[b]; });
  for (int i = 0; i < n; ++i) {
    out[i] = in[order[i]];
    if (weights_in) weights_out[i] = weights_in[order[i]];
  }
  return cudaSuccess;
}

}  // namespace gi
