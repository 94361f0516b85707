// Count, mean and M2 of groups on the CPU. A plain C interface: pointers, sizes, a number of threads.
//
// Two passes, sums and then squares about the mean, in double precision. Both are cut into the same
// spans whatever the number of threads is, and spans are added in their order: the same bits.

#include "cpu.h"

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <system_error>
#include <thread>
#include <vector>

namespace gi {
namespace {

// An addition to a group waits for the one before it, through memory. Tables side by side hide that,
// where they are small.
constexpr int kTables = 8;
constexpr int64_t kSmall = 512;

struct Sums {
  double count = 0, total = 0;
};

template <class T>
struct Grouped {
  const T* values;
  const int64_t* ids;
  const T* weights;  // or null: ones
  int64_t n, groups, span;

  int64_t spans() const { return (n + span - 1) / span; }
  double weight(int64_t i) const { return weights ? double(weights[i]) : 1.0; }
};

// Calls add(table, i) for the values of a span, with eight tables of `Entry` in turn or with one,
// and adds the tables up in `out`.
template <class Entry, class T, class Add, class Join>
GI_INLINE void tabulate(const Grouped<T>& g, int64_t span, Entry* out, Add add, Join join) {
  int64_t i = span * g.span;
  const int64_t end = std::min(g.n, i + g.span);
  std::fill(out, out + g.groups, Entry());
  if (g.groups <= kSmall) {
    std::vector<Entry> tables(kTables * g.groups);
    for (; i + kTables <= end; i += kTables)
#pragma GCC unroll 8
      for (int t = 0; t < kTables; ++t) add(tables.data() + t * g.groups, i + t);
    for (const Entry* from = tables.data(); from != tables.data() + tables.size(); from += g.groups)
      for (int64_t k = 0; k < g.groups; ++k) join(out[k], from[k]);
  }
  for (; i < end; ++i) add(out, i);
}

// False where an id lies outside, or a weight is negative, infinite or NaN: then nothing is stored.
template <class T>
bool sum(const Grouped<T>& g, int64_t span, Sums* out) {
  const int64_t first = span * g.span, end = std::min(g.n, first + g.span);
  bool fine = true;
  for (int64_t i = first; i < end; ++i) fine &= uint64_t(g.ids[i]) < uint64_t(g.groups);
  if (g.weights)
    for (int64_t i = first; i < end; ++i) fine &= g.weights[i] >= 0 && g.weights[i] < T(INFINITY);
  if (!fine) return false;
  const auto add = [&](Sums* table, int64_t i) __attribute__((always_inline)) {
    const double w = g.weight(i);
    Sums& to = table[g.ids[i]];
    to.count += w;
    to.total += w * double(g.values[i]);
  };
  tabulate(g, span, out, add, [](Sums& to, const Sums& from) {
    to.count += from.count;
    to.total += from.total;
  });
  return true;
}

template <class T>
void square(const Grouped<T>& g, int64_t span, const double* mean, double* out) {
  const auto add = [&](double* table, int64_t i) __attribute__((always_inline)) {
    const int64_t id = g.ids[i];
    const double d = double(g.values[i]) - mean[id];
    table[id] += g.weight(i) * (d * d);
  };
  tabulate(g, span, out, add, [](double& to, double from) { to += from; });
}

// Below a quarter of a million values a second thread costs more than it brings. One that cannot be
// started is no reason to fail: its share is done here.
template <class Work>
void share(int64_t n, int64_t spans, int threads, const Work& work) {
  threads = int(std::max<int64_t>(1, std::min<int64_t>(threads, n >> 18)));
  const auto part = [&](int t) {
    for (int64_t s = spans * t / threads; s < spans * (t + 1) / threads; ++s) work(s);
  };
  std::vector<std::thread> others;
  for (int t = 1; t < threads; ++t) {
    try {
      others.emplace_back(part, t);
    } catch (const std::system_error&) {
      part(t);
    }
  }
  part(0);
  for (std::thread& other : others) other.join();
}

template <class T>
bool group_stats(Grouped<T> g, int threads, double* count, double* mean, double* m2) {
  // Long enough for the tables of a span to be fewer than its values.
  g.span = std::max<int64_t>(1 << 15, 4 * g.groups);
  const int64_t spans = g.spans(), groups = g.groups;
  std::vector<Sums> sums(spans * groups);
  std::vector<char> fine(spans);
  share(g.n, spans, threads, [&](int64_t s) { fine[s] = sum(g, s, &sums[s * groups]); });
  if (!std::all_of(fine.begin(), fine.end(), [](char yes) { return yes; })) return false;
  std::fill(count, count + groups, 0.0);
  std::fill(mean, mean + groups, 0.0);
  std::fill(m2, m2 + groups, 0.0);
  for (int64_t s = 0; s < spans; ++s)
    for (int64_t k = 0; k < groups; ++k) {
      count[k] += sums[s * groups + k].count;
      mean[k] += sums[s * groups + k].total;
    }
  for (int64_t k = 0; k < groups; ++k) mean[k] /= count[k] > 0 ? count[k] : 1;
  std::vector<double> squares(spans * groups);
  share(g.n, spans, threads, [&](int64_t s) { square(g, s, mean, &squares[s * groups]); });
  for (int64_t s = 0; s < spans; ++s)
    for (int64_t k = 0; k < groups; ++k) m2[k] += squares[s * groups + k];
  return true;
}

}  // namespace
}  // namespace gi

// 1, or 0 where an id or a weight is not allowed: then the results are not written.
#define GI_GROUP_STATS(suffix, T)                                                                  \
  extern "C" int gi_group_stats_cpu_##suffix(const T* values, const int64_t* ids, const T* weights, \
                                             int64_t n, int64_t groups, int threads, double* count, \
                                             double* mean, double* m2) {                           \
    return gi::group_stats(gi::Grouped<T>{values, ids, weights, n, groups, 0}, threads, count,     \
                           mean, m2);                                                              \
  }

GI_GROUP_STATS(f32, float)
GI_GROUP_STATS(f64, double)
