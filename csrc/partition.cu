// The partition on a GPU. A plain C interface: pointers, sizes, a workspace, a stream. Nothing here
// waits for the device: what a row's values turn out to be is read on the device alone.
//
// Rows of up to 8192 values: one CTA a row does everything, in shared memory as far as it reaches.
// Longer rows: the same phases of partition.h, a launch each, over the whole device.

#include "partition.h"

#ifdef GI_EMULATION
#include "emulation.h"
#else
#include <cub/device/device_radix_sort.cuh>
#include <cuda_runtime.h>

#define GI_DYNAMIC_SHARED(name) extern __shared__ __align__(16) unsigned char name[]

namespace gi {
template <class Kernel, class... Args>
void launch(Kernel kernel, int grid, int block, size_t shared, cudaStream_t stream, Args... args) {
  kernel<<<grid, block, shared, stream>>>(args...);
}

// With temporary == nullptr only sets `bytes`.
template <class K>
cudaError_t sort_on_device(void* temporary, size_t& bytes, const K* in, K* out, const double* weights_in,
                           double* weights_out, int n, cudaStream_t stream) {
  if (weights_in == nullptr)
    return cub::DeviceRadixSort::SortKeys(temporary, bytes, in, out, n, 0, int(8 * sizeof(K)), stream);
  return cub::DeviceRadixSort::SortPairs(temporary, bytes, in, out, weights_in, weights_out, n, 0,
                                         int(8 * sizeof(K)), stream);
}
}  // namespace gi
#endif

namespace gi {
namespace {

#ifndef GI_MAX_THREADS  // the tests run these kernels on a CPU, with small numbers
#define GI_MAX_THREADS 1024
#define GI_MAX_ONE_CTA 8192
#endif
constexpr int kMaxThreads = GI_MAX_THREADS;
constexpr int kMaxOneCta = GI_MAX_ONE_CTA;
constexpr int kMaxCtas = 256;     // CTAs that take row after row, each with a workspace of its own
constexpr int kMaxGrid = 1024;

struct Cta {
  int rank, size;
  __device__ void sync() const { __syncthreads(); }
};
__device__ Cta this_cta() { return {int(threadIdx.x), int(blockDim.x)}; }

// --- memory --------------------------------------------------------------------------------------

// Hands out shared memory while there is enough, then the workspace. With base == nullptr it counts.
struct Arena {
  unsigned char* shared;
  size_t shared_left;
  unsigned char* base;
  size_t used;

  template <class V>
  __host__ __device__ V* take(int64_t count) {
    const size_t bytes = (size_t(count) * sizeof(V) + 15) / 16 * 16;
    if (bytes <= shared_left) {
      V* p = reinterpret_cast<V*>(shared);
      shared += bytes;
      shared_left -= bytes;
      return p;
    }
    V* p = reinterpret_cast<V*>(base + used);
    used += bytes;
    return p;
  }
  __host__ __device__ Cuts take_cuts(int64_t count) {
    Cuts cuts{};
    cuts.at = take<int>(count);
    cuts.mass = take<double>(count);
    cuts.sum = take<double>(count);
    return cuts;
  }
};

// Everything but the sorted values and the candidates; small, so it comes first.
template <class T>
__host__ __device__ void take_small(Arena& arena, Row<T>& row, bool weighted) {
  const int tree = row.shape.size, ends = row.k + 1;
  row.control = arena.take<Control>(1);
  for (int i = 0; i < 2; ++i) {
    row.low[i] = arena.take_cuts(ends);
    row.high[i] = arena.take_cuts(ends);
  }
  row.first = arena.take<int>(ends);
  row.last = arena.take<int>(ends);
  row.cuts_of = arena.take<int>(ends);
  row.bounds = arena.take<int>(ends);
  row.group_mass = arena.take<double>(row.k);
  row.group_sum = arena.take<double>(row.k);
  row.sums = arena.take<double>(tree);
  row.offsets = arena.take<double>(tree);
  row.counts = arena.take<int>(tree);
  row.count_offsets = arena.take<int>(tree);
  row.mass_sums = weighted ? arena.take<double>(tree) : nullptr;
  row.mass_offsets = weighted ? arena.take<double>(tree) : nullptr;
}

// Candidates, layers and cuts for windows of these sizes. The layer of cut 0 has one place.
template <class T>
__host__ __device__ void take_candidates(Arena& arena, Row<T>& row, int count, int widest, int64_t cuts) {
  row.best[0] = arena.take<double>(widest);
  row.best[1] = arena.take<double>(widest);
  row.candidates = arena.take_cuts(count);
  row.cut = arena.take<int>(cuts);
}
template <class T>
__host__ __device__ void take_most_candidates(Arena& arena, Row<T>& row) {
  take_candidates(arena, row, row.n + 1, row.n, int64_t(row.k - 1) * row.n + 1);
}

// --- what one CTA and the grid share -------------------------------------------------------------

template <class T>
struct Problem {
  const T* values;        // (n)
  const double* weights;  // (n) or null
  int32_t* group_ids;     // (n)
  double* thresholds;     // (K - 1)
  double* centers;        // (K)
  double* between;        // ()
  int* status;            // ()
};

template <class T>
__device__ Key<T> checked_key(const Problem<T>& problem, Control* control, int i) {
  int bits = finite(problem.values[i]) ? 0 : kBadValues;
  if (problem.weights) {
    const double w = problem.weights[i];
    if (!(finite(w) && w >= 0)) bits |= kBadWeights;
    if (w == 0) atomicOr(&control->some_weight_is_zero, 1);
  }
  if (bits) atomicOr(&control->status, bits);
  return to_key(problem.values[i]);
}

// One level of a layer: `lanes` threads, a power of two, look for the best cut of each node. All
// threads of the CTA come along; the loop ends at the same round for all.
template <class T>
__device__ void solve_level(const Row<T>& row, int g, int stride, int lanes, int block, int blocks) {
  __shared__ double values[kMaxThreads];
  __shared__ int places[kMaxThreads];
  const int nodes = row.nodes_of_level(row.last[g] - row.first[g] + 1, stride);
  const int at_once = blockDim.x / lanes, lane = threadIdx.x % lanes;
  const double* previous = row.best[(g - 1) % 2];
  const int previous_first = row.first[g - 1];
  const Cuts c = row.candidates;
  for (int64_t from = int64_t(block) * at_once; from < nodes; from += int64_t(blocks) * at_once) {
    const int64_t i = from + threadIdx.x / lanes;
    const int r = int(stride - 1 + 2 * stride * i);
    double best = -1;
    int place = 0;
    if (i < nodes) {
      const auto node = row.node(g, r, stride);
      const double mass = c.mass[node.j], sum = c.sum[node.j];
      place = node.lo;
      for (int j = node.lo + lane; j <= node.hi; j += lanes) {
        const double objective = previous[j - previous_first] + row.gain(mass - c.mass[j], sum - c.sum[j]);
        if (objective > best) {
          best = objective;
          place = j;
        }
      }
    }
    if (lanes > 1) {
      values[threadIdx.x] = best;
      places[threadIdx.x] = place;
      for (int half = lanes / 2; half; half /= 2) {
        __syncthreads();
        if (lane < half) {
          const double other = values[threadIdx.x + half];
          const int other_place = places[threadIdx.x + half];
          if (other > best || (other == best && other_place < place)) {
            values[threadIdx.x] = best = other;
            places[threadIdx.x] = place = other_place;
          }
        }
      }
      __syncthreads();
    }
    if (i < nodes && lane == 0) {
      row.best[g % 2][r] = best;
      row.cut[row.cuts_of[g] + r] = place;
    }
  }
}

template <class T>
__device__ void finish(const Row<T>& row, const Problem<T>& problem) {
  if (threadIdx.x == 0) row.walk_back();
  __syncthreads();
  for (int g = threadIdx.x; g < row.k; g += blockDim.x) {
    row.sum_group(g);
    problem.centers[g] = row.center(g);
    if (g) problem.thresholds[g - 1] = row.threshold(g);
  }
  __syncthreads();
  if (threadIdx.x == 0) {
    row.set_between();
    *problem.between = row.control->between;
    *problem.status = 0;
  }
}

template <class T>
__device__ int group_of_value(const Row<T>& row, T x) {
  const Key<T> key = to_key(x);
  int lo = 0, hi = row.k - 1;
  while (lo < hi) {
    const int middle = lo + (hi - lo + 1) / 2;
    if (key >= row.keys[row.bounds[middle]]) lo = middle;
    else hi = middle - 1;
  }
  return lo;
}

// A row that cannot be solved: nobody should read a number from it, so there is none.
template <class T>
__device__ void refuse(const Problem<T>& problem, int n, int k, int status, int rank, int size) {
  const double nan = sqrt(-1.0);
  for (int i = rank; i < n; i += size) problem.group_ids[i] = -1;
  for (int g = rank; g < k; g += size) {
    problem.centers[g] = nan;
    if (g) problem.thresholds[g - 1] = nan;
  }
  if (rank == 0) {
    *problem.between = nan;
    *problem.status = status;
  }
}

// --- one CTA a row -------------------------------------------------------------------------------

__host__ __device__ inline int next_power_of_two(int n) {
  int power = 1;
  while (power < n) power *= 2;
  return power;
}

// Bitonic, ascending; `index` breaks ties, so that it is stable, and may be null.
template <class K>
__device__ void sort_in_cta(K* keys, int* index, int count) {
  for (int size = 2; size <= count; size *= 2) {
    for (int stride = size / 2; stride; stride /= 2) {
      __syncthreads();
      for (int t = threadIdx.x; t < count / 2; t += blockDim.x) {
        const int i = 2 * t - (t & (stride - 1)), j = i + stride;
        const K a = keys[i], b = keys[j];
        const bool greater = a > b || (index && a == b && index[i] > index[j]);
        if (greater == ((i & size) == 0)) {
          keys[i] = b;
          keys[j] = a;
          if (index) {
            const int kept = index[i];
            index[i] = index[j];
            index[j] = kept;
          }
        }
      }
    }
  }
  __syncthreads();
}

template <class T>
__device__ void solve_in_cta(const Problem<T>& problem, int n, int k, int min_size, Arena arena) {
  const Cta cta = this_cta();
  const int rank = cta.rank, size = cta.size, padded = next_power_of_two(n);
  // One copy for all threads, which thread 0 fills in; it also keeps the arena.
  __shared__ __align__(16) unsigned char row_memory[sizeof(Row<T>)];
  __shared__ int* index;  // of the sorted values, with weights; where the candidates come later
  Row<T>& row = *reinterpret_cast<Row<T>*>(row_memory);
  if (rank == 0) {
    row = Row<T>{};
    row.n = n;
    row.k = k;
    row.min_size = min_size;
    row.shape = Shape(n);
    take_small(arena, row, problem.weights != nullptr);
    row.keys = arena.take<Key<T>>(padded);
    if (problem.weights) row.weights = arena.take<double>(n);
    Arena scratch = arena;
    index = problem.weights ? scratch.take<int>(padded) : nullptr;
    *row.control = Control{};
  }
  __syncthreads();
  for (int i = rank; i < padded; i += size) {
    row.keys[i] = i < n ? checked_key(problem, row.control, i) : ~Key<T>(0);
    if (index) index[i] = i;
  }
  __syncthreads();
  if (row.control->status) return refuse(problem, n, k, row.control->status, rank, size);
  sort_in_cta(row.keys, index, padded);

  const int chunks = row.shape.count[1];
  if (row.weights) {
    for (int i = rank; i < n; i += size) row.weights[i] = problem.weights[index[i]];
    __syncthreads();
    for (int c = rank; c < chunks; c += size) row.sum_masses(c);
    __syncthreads();
    sweep(cta, row.shape, row.mass_sums, row.mass_offsets);
  }
  if (rank == 0) row.set_centre();
  __syncthreads();
  for (int c = rank; c < chunks; c += size) row.sum_values(c);
  __syncthreads();
  sweep(cta, row.shape, row.sums, row.offsets);
  row.narrow(cta);
  if (row.control->status) return refuse(problem, n, k, row.control->status, rank, size);

  for (int c = rank; c < chunks; c += size) row.count_candidates(c);
  __syncthreads();
  sweep(cta, row.shape, row.counts, row.count_offsets);
  for (int g = rank; g <= k; g += size) row.find_window(g);
  __syncthreads();
  if (rank == 0) {
    row.allot_cuts();
    int widest = 1;
    for (int g = 1; g <= k; ++g) widest = larger(widest, row.last[g] - row.first[g] + 1);
    take_candidates(arena, row, row.number_of_candidates(), widest, row.cuts_of[k] + 1);
    row.best[0][0] = 0;
  }
  __syncthreads();
  for (int c = rank; c < chunks; c += size) row.write_candidates(c);
  __syncthreads();

  for (int g = 1; g <= k; ++g) {
    const int places = row.last[g] - row.first[g] + 1;
    for (int stride = row.first_stride(places); stride; stride /= 2) {
      int lanes = size;
      while (lanes > 1 && lanes * row.nodes_of_level(places, stride) > size) lanes /= 2;
      solve_level(row, g, stride, lanes, 0, 1);
      __syncthreads();
    }
  }
  finish(row, problem);
  for (int i = rank; i < n; i += size) problem.group_ids[i] = group_of_value(row, problem.values[i]);
}

template <class T>
__global__ void __launch_bounds__(kMaxThreads)
partition_rows(Problem<T> all, int64_t batch, int n, int k, int min_size, unsigned char* workspace,
               size_t bytes_a_cta, size_t shared_bytes) {
  GI_DYNAMIC_SHARED(shared);
  for (int64_t b = blockIdx.x; b < batch; b += gridDim.x) {
    const Problem<T> problem{all.values + b * n,
                             all.weights ? all.weights + b * n : nullptr,
                             all.group_ids + b * n,
                             all.thresholds + b * (k - 1),
                             all.centers + b * k,
                             all.between + b,
                             all.status + b};
    solve_in_cta(problem, n, k, min_size,
                 Arena{shared, shared_bytes, workspace + blockIdx.x * bytes_a_cta, 0});
    __syncthreads();  // before the next row takes the memory
  }
}

// --- the whole device a row ----------------------------------------------------------------------

template <class T>
__global__ void clear_control(Row<T> row) {
  *row.control = Control{};
}

template <class T>
__global__ void read_values(Row<T> row, Problem<T> problem, Key<T>* keys) {
  for (int64_t i = blockIdx.x * int64_t(blockDim.x) + threadIdx.x; i < row.n;
       i += int64_t(gridDim.x) * blockDim.x)
    keys[i] = checked_key(problem, row.control, int(i));
}

enum Phase { kMasses, kValues, kCount, kWrite };

template <class T>
__global__ void over_chunks(Row<T> row, Phase phase) {
  if (row.control->status) return;
  for (int c = blockIdx.x * blockDim.x + threadIdx.x; c < row.shape.count[1]; c += gridDim.x * blockDim.x) {
    if (phase == kMasses) row.sum_masses(c);
    if (phase == kValues) row.sum_values(c);
    if (phase == kCount) row.count_candidates(c);
    if (phase == kWrite) row.write_candidates(c);
  }
}

template <class T>
__global__ void __launch_bounds__(kMaxThreads) centre_values(Row<T> row) {
  if (row.control->status) return;
  if (row.weights) sweep(this_cta(), row.shape, row.mass_sums, row.mass_offsets);
  if (threadIdx.x == 0) row.set_centre();
}

template <class T>
__global__ void __launch_bounds__(kMaxThreads) narrow_windows(Row<T> row) {
  if (row.control->status) return;
  sweep(this_cta(), row.shape, row.sums, row.offsets);
  row.narrow(this_cta());
}

template <class T>
__global__ void __launch_bounds__(kMaxThreads) place_windows(Row<T> row) {
  if (row.control->status) return;
  sweep(this_cta(), row.shape, row.counts, row.count_offsets);
  for (int g = threadIdx.x; g <= row.k; g += blockDim.x) row.find_window(g);
  __syncthreads();
  if (threadIdx.x == 0) {
    row.allot_cuts();
    row.best[0][0] = 0;
  }
}

template <class T>
__global__ void __launch_bounds__(kMaxThreads) solve_level_on_grid(Row<T> row, int g, int stride, int lanes) {
  if (row.control->status || stride > row.last[g] - row.first[g] + 1) return;
  solve_level(row, g, stride, lanes, blockIdx.x, gridDim.x);
}

template <class T>
__global__ void __launch_bounds__(kMaxThreads) finish_row(Row<T> row, Problem<T> problem) {
  if (row.control->status == 0) finish(row, problem);
}

template <class T>
__global__ void write_groups(Row<T> row, Problem<T> problem) {
  const int rank = blockIdx.x * blockDim.x + threadIdx.x, size = gridDim.x * blockDim.x;
  if (row.control->status) return refuse(problem, row.n, row.k, row.control->status, rank, size);
  for (int64_t i = rank; i < row.n; i += size) problem.group_ids[i] = group_of_value(row, problem.values[i]);
}

template <class T>
struct GridMemory {
  Row<T> row{};
  Key<T>* keys_in;
  unsigned char* sort_memory;
  size_t sort_bytes = 0;
};

// Lays the arrays out in `arena`, whose `used` then says how much that took.
template <class T>
cudaError_t take_grid(Arena& arena, GridMemory<T>& memory, int n, int k, int min_size, bool weighted) {
  Row<T>& row = memory.row;
  row.n = n;
  row.k = k;
  row.min_size = min_size;
  row.shape = Shape(n);
  take_small(arena, row, weighted);
  memory.keys_in = arena.take<Key<T>>(n);
  row.keys = arena.take<Key<T>>(n);
  if (weighted) row.weights = arena.take<double>(n);
  take_most_candidates(arena, row);
  const double* any = weighted ? reinterpret_cast<const double*>(16) : nullptr;  // only asked for null
  const cudaError_t error = sort_on_device<Key<T>>(nullptr, memory.sort_bytes, memory.keys_in, row.keys, any,
                                                   row.weights, n, nullptr);
  memory.sort_memory = arena.take<unsigned char>(int64_t(memory.sort_bytes));
  return error;
}

template <class T>
cudaError_t solve_on_grid(const Problem<T>& problem, int n, int k, int min_size, unsigned char* workspace,
                          cudaStream_t stream) {
  Arena arena{nullptr, 0, workspace, 0};
  GridMemory<T> memory;
  cudaError_t error = take_grid(arena, memory, n, k, min_size, problem.weights != nullptr);
  if (error != cudaSuccess) return error;
  const Row<T> row = memory.row;
  constexpr int block = smaller(256, kMaxThreads);
  const int grid = smaller((n + block - 1) / block, kMaxGrid);
  const int chunk_grid = smaller((row.shape.count[1] + block - 1) / block, kMaxGrid);

  launch(clear_control<T>, 1, 1, 0, stream, row);
  launch(read_values<T>, grid, block, 0, stream, row, problem, memory.keys_in);
  error = sort_on_device<Key<T>>(memory.sort_memory, memory.sort_bytes, memory.keys_in, row.keys,
                                 problem.weights, row.weights, n, stream);
  if (error != cudaSuccess) return error;
  if (row.weights) launch(over_chunks<T>, chunk_grid, block, 0, stream, row, kMasses);
  launch(centre_values<T>, 1, kMaxThreads, 0, stream, row);
  launch(over_chunks<T>, chunk_grid, block, 0, stream, row, kValues);
  launch(narrow_windows<T>, 1, kMaxThreads, 0, stream, row);
  launch(over_chunks<T>, chunk_grid, block, 0, stream, row, kCount);
  launch(place_windows<T>, 1, kMaxThreads, 0, stream, row);
  launch(over_chunks<T>, chunk_grid, block, 0, stream, row, kWrite);
  for (int g = 1; g <= k; ++g)
    // How wide the windows are is known on the device only: levels that they do not have return at
    // once. The last layer has one place, the end.
    for (int stride = g == k ? 1 : row.first_stride(n); stride; stride /= 2) {
      // A node has some 2 * stride candidates; up to 8 a thread.
      int lanes = 1;
      while (lanes < kMaxThreads && lanes < stride / 4) lanes *= 2;
      if (g == k) lanes = kMaxThreads;
      const int64_t threads = int64_t(row.nodes_of_level(g == k ? 1 : n, stride)) * lanes;
      const int blocks = int(smaller<int64_t>((threads + kMaxThreads - 1) / kMaxThreads, kMaxGrid));
      launch(solve_level_on_grid<T>, blocks, kMaxThreads, 0, stream, row, g, stride, lanes);
    }
  launch(finish_row<T>, 1, kMaxThreads, 0, stream, row, problem);
  launch(write_groups<T>, grid, block, 0, stream, row, problem);
  return cudaGetLastError();
}

// --- entry ---------------------------------------------------------------------------------------

// Everything that one CTA may need; what does not fit into shared memory lies in the workspace.
template <class T>
size_t bytes_of_cta(int n, int k, bool weighted) {
  Row<T> row{};
  row.n = n;
  row.k = k;
  row.shape = Shape(n);
  Arena arena{nullptr, 0, nullptr, 0};
  take_small(arena, row, weighted);
  arena.take<Key<T>>(next_power_of_two(n));
  if (weighted) arena.take<double>(n);
  take_most_candidates(arena, row);
  return arena.used;
}

template <class T>
int64_t workspace_bytes(int64_t batch, int n, int k, bool weighted) {
  if (n <= kMaxOneCta) return int64_t(bytes_of_cta<T>(n, k, weighted)) * smaller<int64_t>(batch, kMaxCtas);
  Arena arena{nullptr, 0, nullptr, 0};
  GridMemory<T> memory;
  const cudaError_t error = take_grid(arena, memory, n, k, 1, weighted);
  return error == cudaSuccess ? int64_t(arena.used) : -int64_t(error);
}

template <class T>
cudaError_t partition(const Problem<T>& all, int64_t batch, int n, int k, int min_size,
                      unsigned char* workspace, cudaStream_t stream) {
  if (n > kMaxOneCta) {
    for (int64_t b = 0; b < batch; ++b) {
      const Problem<T> problem{all.values + b * n,
                               all.weights ? all.weights + b * n : nullptr,
                               all.group_ids + b * n,
                               all.thresholds + b * (k - 1),
                               all.centers + b * k,
                               all.between + b,
                               all.status + b};
      const cudaError_t error = solve_on_grid(problem, n, k, min_size, workspace, stream);
      if (error != cudaSuccess) return error;
    }
    return cudaSuccess;
  }
  int device = 0, most_shared = 0;
  cudaError_t error = cudaGetDevice(&device);
  if (error == cudaSuccess)
    error = cudaDeviceGetAttribute(&most_shared, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
  cudaFuncAttributes attributes{};
  if (error == cudaSuccess) error = cudaFuncGetAttributes(&attributes, partition_rows<T>);
  if (error != cudaSuccess) return error;
  const size_t bytes = bytes_of_cta<T>(n, k, all.weights != nullptr);
  const size_t shared = smaller(bytes, size_t(most_shared) - attributes.sharedSizeBytes) / 16 * 16;
  error = cudaFuncSetAttribute(partition_rows<T>, cudaFuncAttributeMaxDynamicSharedMemorySize, int(shared));
  if (error != cudaSuccess) return error;
  const int threads = smaller(n <= 512 ? 128 : n <= 2048 ? 256 : 1024, kMaxThreads);
  launch(partition_rows<T>, int(smaller<int64_t>(batch, kMaxCtas)), threads, shared, stream, all, batch, n, k,
         min_size, workspace, bytes, shared);
  return cudaGetLastError();
}

}  // namespace
}  // namespace gi

// The workspace in bytes, or minus a cudaError_t. status (batch, on the device): 0, or the bits of
// gi::Status; such a row gets group_ids -1 and NaN. Both return without waiting for the device.
#define GI_EXPORT(T, suffix)                                                                                \
  extern "C" int64_t gi_partition_cuda_workspace_##suffix(int64_t batch, int n, int k, int weighted) {      \
    return gi::workspace_bytes<T>(batch, n, k, weighted != 0);                                              \
  }                                                                                                         \
  extern "C" int gi_partition_cuda_##suffix(const T* values, const double* weights, int64_t batch, int n,   \
                                            int k, int min_size, int32_t* group_ids, double* thresholds,    \
                                            double* centers, double* between, int* status, void* workspace, \
                                            void* stream) {                                                 \
    return gi::partition(                                                                                   \
        gi::Problem<T>{values, weights, group_ids, thresholds, centers, between, status}, batch, n, k,      \
        min_size, static_cast<unsigned char*>(workspace), static_cast<cudaStream_t>(stream));               \
  }

GI_EXPORT(float, f32)
GI_EXPORT(double, f64)

extern "C" const char* gi_cuda_error(int error) { return cudaGetErrorString(cudaError_t(error)); }
