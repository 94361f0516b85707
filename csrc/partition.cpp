// The partition on the CPU. A plain C interface: pointers, sizes, a number of threads.

#include "partition.h"

#include <atomic>
#include <cstdlib>
#include <memory>
#include <new>
#include <thread>
#include <vector>

#ifdef __linux__
#include <sys/mman.h>
#endif

// One library for every x86-64: the loader picks the widest clone this processor has. They agree bit
// for bit, because contraction into FMA is off. (A sanitiser is not yet up when the loader picks.)
#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__) && !defined(GI_SANITIZED)
#define GI_CLONES __attribute__((target_clones("avx512f", "avx2", "default")))
#else
#define GI_CLONES
#endif

namespace gi {
namespace {

constexpr int kNoMemory = 8;  // beside the row's own Status

// --- threads -------------------------------------------------------------------------------------

struct Alone {
  int rank = 0, size = 1;
  void sync() const {}
};

struct Barrier {
  std::atomic<int> waiting{0}, round{0};
};

struct Member {
  int rank, size;
  Barrier* barrier;
  // Phases last microseconds, so a member spins first and gives up its core after that.
  void sync() const {
    const int round = barrier->round.load();
    if (barrier->waiting.fetch_add(1) + 1 == size) {
      barrier->waiting.store(0);
      barrier->round.store(round + 1);
      return;
    }
    for (int spins = 0; barrier->round.load() == round; ++spins)
      if (spins > 2000) std::this_thread::yield();
  }
};

template <class F>
void together(int threads, F f) {
  Barrier barrier;
  std::vector<std::thread> others;
  for (int rank = 1; rank < threads; ++rank)
    others.emplace_back([&, rank] { f(Member{rank, threads, &barrier}); });
  f(Member{0, threads, &barrier});
  for (auto& other : others) other.join();
}

template <class Group>
int share(const Group& group, int64_t count, int rank) {
  return int(count * rank / group.size);
}

// --- memory --------------------------------------------------------------------------------------

// Not initialised, and in huge pages where large: faulting in 20 MB page by page takes longer than
// the passes that fill it.
template <class T>
class Buffer {
 public:
  T* allocate(int64_t count) {
    constexpr size_t huge = size_t(2) << 20;
    const size_t bytes = size_t(count) * sizeof(T) + 1;
    const size_t alignment = bytes >= 2 * huge ? huge : 64;
    data_.reset(static_cast<T*>(aligned_alloc(alignment, (bytes + alignment - 1) / alignment * alignment)));
#ifdef MADV_HUGEPAGE
    if (data_ && alignment == huge) madvise(data_.get(), bytes, MADV_HUGEPAGE);
#endif
    return data_.get();
  }
  T* get() const { return data_.get(); }

 private:
  struct Free {
    void operator()(T* p) const { free(p); }
  };
  std::unique_ptr<T, Free> data_;
};

// --- radix sort ----------------------------------------------------------------------------------

constexpr int kDigitBits = 11, kDigits = 1 << kDigitBits;

template <class T>
struct Sorter {
  Key<T>* keys[2];
  double* weights[2];  // null without weights
  int64_t* histogram;  // (threads, kDigits)
  int n;
};

// Least significant digit first, stable, so that weights come in a fixed order for any number of
// threads. Digits that all keys share are passed over. Returns which of the two buffers holds the result.
template <class T, class Group>
int radix_sort(Group group, const Sorter<T>& sorter) {
  const int begin = share(group, sorter.n, group.rank), end = share(group, sorter.n, group.rank + 1);
  int64_t* mine = sorter.histogram + int64_t(group.rank) * kDigits;
  int now = 0;
  for (int shift = 0; shift < int(8 * sizeof(T)); shift += kDigitBits) {
    const Key<T>* keys = sorter.keys[now];
    const auto digit = [=](Key<T> key) { return int(key >> shift) & (kDigits - 1); };
    memset(mine, 0, kDigits * sizeof *mine);
    for (int i = begin; i < end; ++i) ++mine[digit(keys[i])];
    group.sync();
    const int probe = digit(keys[0]);
    int64_t same = 0;
    for (int r = 0; r < group.size; ++r) same += sorter.histogram[int64_t(r) * kDigits + probe];
    group.sync();
    if (same == sorter.n) continue;
    if (group.rank == 0) {
      int64_t total = 0;
      for (int d = 0; d < kDigits; ++d)
        for (int r = 0; r < group.size; ++r) {
          const int64_t count = sorter.histogram[int64_t(r) * kDigits + d];
          sorter.histogram[int64_t(r) * kDigits + d] = total;
          total += count;
        }
    }
    group.sync();
    Key<T>* out = sorter.keys[now ^ 1];
    if (sorter.weights[0]) {
      const double* weights = sorter.weights[now];
      double* weights_out = sorter.weights[now ^ 1];
      for (int i = begin; i < end; ++i) {
        const int64_t place = mine[digit(keys[i])]++;
        out[place] = keys[i];
        weights_out[place] = weights[i];
      }
    } else {
      for (int i = begin; i < end; ++i) out[mine[digit(keys[i])]++] = keys[i];
    }
    group.sync();
    now ^= 1;
  }
  return now;
}

// --- layers --------------------------------------------------------------------------------------

struct Best {
  double value;
  int index;
};

// The first of the largest previous[i] + gain(i, j). Eight at a time: a vector division costs hardly
// more than a scalar one.
GI_CLONES Best best_of(const double* previous, const double* mass, const double* sum, double mass_j,
                       double sum_j, int count) {
  Best best{-1.0, 0};  // every objective is >= 0
  int i = 0;
  for (; i + 8 <= count; i += 8) {
    double objective[8];
    for (int t = 0; t < 8; ++t) {
      const double m = mass_j - mass[i + t], s = sum_j - sum[i + t];
      const double gain = s * s / m;
      objective[t] = previous[i + t] + (m > 0 ? gain : 0.0);
    }
    double highest = objective[0];
    for (int t = 1; t < 8; ++t) highest = objective[t] > highest ? objective[t] : highest;
    if (highest > best.value) {
      int t = 0;
      while (objective[t] != highest) ++t;
      best = {highest, i + t};
    }
  }
  for (; i < count; ++i) {
    const double m = mass_j - mass[i], s = sum_j - sum[i];
    const double objective = previous[i] + (m > 0 ? s * s / m : 0.0);
    if (objective > best.value) best = {objective, i};
  }
  return best;
}

template <class T>
void solve_node(const Row<T>& row, int g, int r, int stride) {
  const auto node = row.node(g, r, stride);
  const Cuts& c = row.candidates;
  const Best best = best_of(row.best[(g - 1) % 2] + (node.lo - row.first[g - 1]), c.mass + node.lo,
                            c.sum + node.lo, c.mass[node.j], c.sum[node.j], node.hi - node.lo + 1);
  row.best[g % 2][r] = best.value;
  row.cut[row.cuts_of[g] + r] = node.lo + best.index;
}

template <class T, class Group>
void solve_layers(Group group, const Row<T>& row) {
  if (group.rank == 0) row.best[0][0] = 0;
  group.sync();
  for (int g = 1; g <= row.k; ++g) {
    const int places = row.last[g] - row.first[g] + 1;
    const bool together = group.size > 1 && places > 4096;
    for (int stride = row.first_stride(places); stride; stride /= 2) {
      const int nodes = row.nodes_of_level(places, stride);
      // Blocks in turn, since one end of a level can cost far more than the other.
      const int block = together ? smaller(larger(nodes / (8 * group.size), 1), 256) : nodes;
      for (int from = group.rank * block; from < nodes; from += group.size * block)
        for (int i = from; i < smaller(from + block, nodes); ++i)
          solve_node(row, g, stride - 1 + 2 * stride * i, stride);
      if (together) group.sync();
    }
    group.sync();
  }
}

// --- one row -------------------------------------------------------------------------------------

template <class T>
struct Input {
  const T* values;        // (n)
  const double* weights;  // (n) or null
  int n, k, min_size;
};
struct Output {
  int32_t* group_ids;  // (n)
  double* thresholds;  // (K - 1)
  double* centers;     // (K)
  double* between;     // ()
};

// In blocks that stay in the first cache, so that the inner loop runs over values, one vector at a time.
template <class T>
GI_CLONES void write_groups(const T* values, int begin, int end, const T* begins, int k, int32_t* out) {
  constexpr int block = 2048;
  for (; begin < end; begin += block) {
    const int stop = smaller(begin + block, end);
    if (k > 16) {
      for (int i = begin; i < stop; ++i) out[i] = group_of(values[i], begins, k);
      continue;
    }
    for (int i = begin; i < stop; ++i) out[i] = 0;
    for (int g = 1; g < k; ++g)
      for (int i = begin; i < stop; ++i) out[i] += values[i] >= begins[g];
  }
}

template <class T>
class Solver {
 public:
  Solver(const Input<T>& in, const Output& out, int threads) : in_(in), out_(out), threads_(threads) {}

  int solve() {
    if (!allocate_for_values()) return kNoMemory;
    if (threads_ == 1) run(Alone{});
    else together(threads_, [this](Member member) { run(member); });
    return control_.status;
  }

 private:
  bool allocate_for_values() {
    const int64_t n = in_.n, k = in_.k;
    row_.n = in_.n;
    row_.k = in_.k;
    row_.min_size = in_.min_size;
    row_.control = &control_;
    row_.shape = Shape(in_.n);
    const int64_t tree = row_.shape.size;
    Key<T>* keys = keys_.allocate(2 * n);
    double* weights = in_.weights ? weights_.allocate(2 * n) : nullptr;
    double* reals = reals_.allocate(4 * tree + 8 * (k + 1) + 2 * k);
    int* ints = ints_.allocate(2 * tree + 8 * (k + 1));
    T* begins = begins_.allocate(k);
    int64_t* histogram = histogram_.allocate(int64_t(threads_) * kDigits);
    if (!keys || (in_.weights && !weights) || !reals || !ints || !begins || !histogram) return false;
    sorter_ = {{keys, keys + n}, {weights, weights ? weights + n : nullptr}, histogram, in_.n};
    const auto reals_of = [&](int64_t count) { return (reals += count) - count; };
    const auto ints_of = [&](int64_t count) { return (ints += count) - count; };
    for (double** p : {&row_.mass_sums, &row_.mass_offsets, &row_.sums, &row_.offsets}) *p = reals_of(tree);
    for (int** p : {&row_.counts, &row_.count_offsets}) *p = ints_of(tree);
    for (Cuts* c : {&row_.low[0], &row_.low[1], &row_.high[0], &row_.high[1]})
      *c = {ints_of(k + 1), reals_of(k + 1), reals_of(k + 1)};
    for (int** p : {&row_.first, &row_.last, &row_.cuts_of, &row_.bounds}) *p = ints_of(k + 1);
    row_.group_mass = reals_of(k);
    row_.group_sum = reals_of(k);
    return true;
  }

  // Only now is it known how few candidates are left.
  bool allocate_for_candidates() {
    int64_t cuts = 0, widest = 0;
    const int64_t count = row_.number_of_candidates();
    for (int g = 0; g <= in_.k; ++g) {
      const int64_t places = row_.last[g] - row_.first[g] + 1;
      cuts += g ? places : 0;
      widest = larger(widest, places);
    }
    if (cuts > INT32_MAX) return false;
    double* reals = candidate_reals_.allocate(2 * count + 2 * widest);
    int* ints = candidate_ints_.allocate(count + cuts);
    if (!reals || !ints) return false;
    row_.candidates = {ints, reals, reals + count};
    row_.cut = ints + count;
    row_.best[0] = reals + 2 * count;
    row_.best[1] = row_.best[0] + widest;
    return true;
  }

  void report(int bits) { __atomic_fetch_or(&control_.status, bits, __ATOMIC_RELAXED); }

  template <class Group>
  void ingest(Group group) {
    const int begin = share(group, in_.n, group.rank), end = share(group, in_.n, group.rank + 1);
    bool finite_values = true, good_weights = true, zero = false;
    for (int i = begin; i < end; ++i) {
      finite_values &= finite(in_.values[i]);
      sorter_.keys[0][i] = to_key(in_.values[i]);
    }
    if (in_.weights)
      for (int i = begin; i < end; ++i) {
        const double w = in_.weights[i];
        good_weights &= finite(w) && w >= 0;
        zero |= w == 0;
        sorter_.weights[0][i] = w;
      }
    report((finite_values ? 0 : kBadValues) | (good_weights ? 0 : kBadWeights));
    if (zero) __atomic_store_n(&control_.some_weight_is_zero, 1, __ATOMIC_RELAXED);
    group.sync();
  }

  template <class Group>
  void run(Group group) {
    ingest(group);
    if (control_.status) return;
    const int sorted = radix_sort(group, sorter_);
    if (group.rank == 0) {
      row_.keys = sorter_.keys[sorted];
      row_.weights = sorter_.weights[sorted];
    }
    group.sync();

    const Row<T>& row = row_;
    const int chunks = row.shape.count[1];
    const int begin = share(group, chunks, group.rank), end = share(group, chunks, group.rank + 1);
    if (row.weights) {
      for (int c = begin; c < end; ++c) row.sum_masses(c);
      group.sync();
      if (group.rank == 0) sweep(Alone{}, row.shape, row.mass_sums, row.mass_offsets);
    }
    if (group.rank == 0) row.set_centre();
    group.sync();
    for (int c = begin; c < end; ++c) row.sum_values(c);
    group.sync();
    if (group.rank == 0) {
      sweep(Alone{}, row.shape, row.sums, row.offsets);
      row.narrow(Alone{});
    }
    group.sync();
    if (control_.status) return;

    memset(row.counts + begin, 0, (end - begin) * sizeof *row.counts);
    row.for_each_chunk(begin, end, [&](int c) { row.count_candidates(c); });
    group.sync();
    if (group.rank == 0) {
      sweep(Alone{}, row.shape, row.counts, row.count_offsets);
      for (int g = 0; g <= row.k; ++g) row.find_window(g);
      row.allot_cuts();
      if (!allocate_for_candidates()) report(kNoMemory);
    }
    group.sync();
    if (control_.status) return;
    row.for_each_chunk(begin, end, [&](int c) { row.write_candidates(c); });
    group.sync();

    solve_layers(group, row);
    if (group.rank == 0) finish();
    group.sync();
    write_groups(in_.values, share(group, in_.n, group.rank), share(group, in_.n, group.rank + 1),
                 begins_.get(), in_.k, out_.group_ids);
  }

  void finish() {
    row_.walk_back();
    for (int g = 0; g < in_.k; ++g) {
      row_.sum_group(g);
      out_.centers[g] = row_.center(g);
      if (g) out_.thresholds[g - 1] = row_.threshold(g);
      begins_.get()[g] = from_key<T>(row_.keys[row_.bounds[g]]);
    }
    row_.set_between();
    *out_.between = control_.between;
  }

  Input<T> in_;
  Output out_;
  int threads_;
  Control control_{};
  Row<T> row_{};
  Sorter<T> sorter_{};
  Buffer<Key<T>> keys_;
  Buffer<double> weights_, reals_, candidate_reals_;
  Buffer<int> ints_, candidate_ints_;
  Buffer<int64_t> histogram_;
  Buffer<T> begins_;
};

// Below this a second thread costs more than it saves.
constexpr int kWorthThreads = 1 << 15;

template <class T>
int partition(const T* values, const double* weights, int64_t batch, int64_t n, int k, int min_size,
              int threads, int32_t* group_ids, double* thresholds, double* centers, double* between,
              int* status) {
  const auto solve = [&](int64_t b, int row_threads) {
    Solver<T> solver({values + b * n, weights ? weights + b * n : nullptr, int(n), k, min_size},
                     {group_ids + b * n, thresholds + b * (k - 1), centers + b * k, between + b}, row_threads);
    status[b] = solver.solve();
  };
  try {
    if (batch < threads || batch * n < kWorthThreads) {
      const int row_threads = n < kWorthThreads ? 1 : threads;
      for (int64_t b = 0; b < batch; ++b) solve(b, row_threads);
    } else {
      std::atomic<int64_t> next{0};
      together(threads, [&](Member) {
        for (int64_t b; (b = next.fetch_add(1)) < batch;) solve(b, 1);
      });
    }
  } catch (const std::exception&) {  // a thread that could not be started
    return 1;
  }
  return 0;
}

template <class T>
int sort(const T* values, int64_t n, int threads, T* out) {
  Buffer<Key<T>> keys;
  Buffer<int64_t> histogram;
  Sorter<T> sorter{{keys.allocate(2 * n), nullptr}, {nullptr, nullptr},
                   histogram.allocate(int64_t(threads) * kDigits), int(n)};
  if (!sorter.keys[0] || !sorter.histogram) return kNoMemory;
  sorter.keys[1] = sorter.keys[0] + n;
  together(threads, [&](Member member) {
    const int begin = share(member, n, member.rank), end = share(member, n, member.rank + 1);
    for (int i = begin; i < end; ++i) sorter.keys[0][i] = to_key(values[i]);
    member.sync();
    const int sorted = radix_sort(member, sorter);
    for (int i = begin; i < end; ++i) out[i] = from_key<T>(sorter.keys[sorted][i]);
  });
  return 0;
}

}  // namespace
}  // namespace gi

// status (batch): 0, or the bits of gi::Status, 8 for lack of memory; a row whose status is not 0 is
// left unwritten. Returns 0, or 1 where a thread could not be started.
#define GI_EXPORT(T, suffix)                                                                              \
  extern "C" int gi_partition_cpu_##suffix(                                                               \
      const T* values, const double* weights, int64_t batch, int64_t n, int k, int min_size, int threads, \
      int32_t* group_ids, double* thresholds, double* centers, double* between, int* status) {            \
    return gi::partition(values, weights, batch, n, k, min_size, threads, group_ids, thresholds, centers, \
                         between, status);                                                                \
  }                                                                                                       \
  /* The sort alone, for the benchmark that compares with it. */                                          \
  extern "C" int gi_sort_cpu_##suffix(const T* values, int64_t n, int threads, T* out) {                  \
    return gi::sort(values, n, threads, out);                                                             \
  }

GI_EXPORT(float, f32)
GI_EXPORT(double, f64)
