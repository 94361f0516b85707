// Experience on the CPU: penalised rewards, GAE, returns and the moments of the advantages, while a
// few sequences are in the cache. A plain C interface: pointers, sizes, a number of threads.
//
// What lies at masked places is read, which is cheaper than not to, and never used. Sums run in
// double precision in a fixed order, so the number of threads does not change a bit.

#include "cpu.h"

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <system_error>
#include <thread>
#include <vector>

namespace gi {
namespace {

// A scan waits for its own last step. Eight sequences side by side hide that.
constexpr int kLanes = 8;

// Tokens of all sequences in a row; sequence i has those from starts[i] to starts[i + 1].
template <class T>
struct Experience {
  const int64_t* starts;
  const T* logprobs;
  const T* ref_logprobs;
  const T* given_kl;  // or null, then logprobs - ref_logprobs
  const T* values;    // or null, then the advantage is the sequence's summed reward
  const uint8_t* mask;
  const T* scores;    // (sequences)
  const T* kl_coefs;  // (sequences)
  double gamma, decay;
  T *rewards, *kl, *advantages, *returns;
  T* seq_kl;        // (sequences)
  double* moments;  // (sequences, 3): count, mean, M2 of the advantages
};

// Eight partial sums, so that additions need not wait for each other.
template <class F>
GI_INLINE double sum_of(int64_t n, F term) {
  double sums[8] = {};
  int64_t s = 0;
  for (; s + 8 <= n; s += 8)
    for (int j = 0; j < 8; ++j) sums[j] += term(s + j);
  for (; s < n; ++s) sums[0] += term(s);
  for (int j = 1; j < 8; ++j) sums[0] += sums[j];
  return sums[0];
}

template <class T>
GI_INLINE void penalise(const Experience<T>& e, int64_t i) {
  const int64_t begin = e.starts[i], n = e.starts[i + 1] - begin;
  const uint8_t* __restrict mask = e.mask + begin;
  T* __restrict kl = e.kl + begin;
  T* __restrict rewards = e.rewards + begin;
  const T coef = -e.kl_coefs[i];
  if (e.given_kl) {
    const T* __restrict given = e.given_kl + begin;
    for (int64_t s = 0; s < n; ++s) kl[s] = mask[s] ? given[s] : T(0);
  } else {
    const T* __restrict logprobs = e.logprobs + begin;
    const T* __restrict ref_logprobs = e.ref_logprobs + begin;
    for (int64_t s = 0; s < n; ++s) {
      const T d = logprobs[s] - ref_logprobs[s];
      kl[s] = mask[s] ? d : T(0);
    }
  }
  for (int64_t s = 0; s < n; ++s) {
    const T penalty = coef * kl[s];
    rewards[s] = mask[s] ? penalty : T(0);  // a NaN coefficient times a masked zero
  }
  e.seq_kl[i] = T(sum_of(n, [&](int64_t s) { return double(kl[s]); }));
  int64_t last = n - 1;
  while (last >= 0 && !mask[last]) --last;
  if (last >= 0) rewards[last] += e.scores[i];
}

template <class T>
GI_INLINE void sum_rewards(const Experience<T>& e, int64_t i) {
  const int64_t begin = e.starts[i], n = e.starts[i + 1] - begin;
  const T total = T(sum_of(n, [&](int64_t s) { return double(e.rewards[begin + s]); }));
  for (int64_t at = begin; at < begin + n; ++at)
    e.advantages[at] = e.returns[at] = e.mask[at] ? total : T(0);
}

// A_t = r_t + gamma V_n - V_t + gamma lam A_n, n the next unmasked step, of sequences i, i + 1, ...
template <int lanes, class T>
GI_INLINE void scan(const Experience<T>& e, int64_t i) {
  const T* __restrict rewards = e.rewards;
  const T* __restrict values = e.values;
  const uint8_t* __restrict mask = e.mask;
  T* __restrict advantages = e.advantages;
  T* __restrict returns = e.returns;
  const double gamma = e.gamma, decay = e.decay;
  double next_value[lanes] = {}, next_advantage[lanes] = {};
  const auto step = [&](int j, int64_t at) __attribute__((always_inline)) {
    const bool kept = mask[at];
    const double reward = rewards[at], raw = values[at];
    const double value = kept ? raw : 0;
    const double delta = reward + gamma * next_value[j] - value;
    const double advantage = delta + decay * next_advantage[j];
    advantages[at] = kept ? T(advantage) : T(0);
    returns[at] = kept ? T(advantage + value) : T(0);
    next_value[j] = kept ? value : next_value[j];
    next_advantage[j] = kept ? advantage : next_advantage[j];
  };
  const int64_t* ends = e.starts + i + 1;
  int64_t shared = INT64_MAX;  // steps that all lanes have
  for (int j = 0; j < lanes; ++j) shared = std::min(shared, ends[j] - ends[j - 1]);
  for (int64_t back = 1; back <= shared; ++back)
#pragma GCC unroll 8
    for (int j = 0; j < lanes; ++j) step(j, ends[j] - back);
  for (int j = 0; j < lanes; ++j)
    for (int64_t at = ends[j] - shared; at-- > ends[j - 1];) step(j, at);
}

template <class T>
GI_INLINE void count_moments(const Experience<T>& e, int64_t i) {
  const int64_t begin = e.starts[i], n = e.starts[i + 1] - begin;
  const T* __restrict a = e.advantages + begin;
  const uint8_t* __restrict mask = e.mask + begin;
  int64_t count = 0;
  for (int64_t s = 0; s < n; ++s) count += mask[s];
  const double sum = sum_of(n, [&](int64_t s) { return double(a[s]); });
  const double mean = count ? sum / double(count) : 0;
  double* out = e.moments + 3 * i;
  out[0] = double(count);
  out[1] = mean;
  out[2] = sum_of(n, [&](int64_t s) {
    const double d = double(a[s]) - mean;
    return mask[s] ? d * d : 0.0;
  });
}

template <class T>
GI_INLINE void sequences(const Experience<T>& e, int64_t first, int64_t end) {
  for (int64_t i = first; i < end; i += kLanes) {
    const int64_t stop = std::min(end, i + kLanes);
    for (int64_t j = i; j < stop; ++j) penalise(e, j);
    if (!e.values)
      for (int64_t j = i; j < stop; ++j) sum_rewards(e, j);
    else if (stop - i == kLanes)
      scan<kLanes>(e, i);
    else
      for (int64_t j = i; j < stop; ++j) scan<1>(e, j);
    for (int64_t j = i; j < stop; ++j) count_moments(e, j);
  }
}

GI_CLONES void run(const Experience<float>& e, int64_t first, int64_t end) {
  sequences(e, first, end);
}

GI_CLONES void run(const Experience<double>& e, int64_t first, int64_t end) {
  sequences(e, first, end);
}

struct Moments {
  double count = 0, mean = 0, m2 = 0;
};

// Chan's merge, sequence after sequence: exact where sums of squares would cancel.
void merge(Moments& into, const double* part) {
  const double count = into.count + part[0], delta = part[1] - into.mean;
  if (part[0] == 0) return;
  into.m2 += part[2] + delta * delta * into.count * part[0] / count;
  into.mean += delta * part[0] / count;
  into.count = count;
}

template <class T>
struct Normalise {
  const int64_t* starts;
  const uint8_t* mask;
  const int64_t* groups;  // (sequences), or null: one group
  const double *means, *scales;  // (groups)
  T* advantages;
};

template <class T>
GI_INLINE void normalise(const Normalise<T>& e, int64_t i) {
  const int64_t begin = e.starts[i], n = e.starts[i + 1] - begin;
  const int64_t group = e.groups ? e.groups[i] : 0;
  const double mean = e.means[group], scale = e.scales[group];
  T* __restrict a = e.advantages + begin;
  const uint8_t* __restrict kept = e.mask + begin;
  for (int64_t s = 0; s < n; ++s) {
    const double normal = (double(a[s]) - mean) * scale;
    a[s] = kept[s] ? T(normal) : T(0);
  }
}

GI_CLONES void run(const Normalise<float>& e, int64_t first, int64_t end) {
  for (int64_t i = first; i < end; ++i) normalise(e, i);
}

GI_CLONES void run(const Normalise<double>& e, int64_t first, int64_t end) {
  for (int64_t i = first; i < end; ++i) normalise(e, i);
}

// Shares of about as many tokens each, in whole groups of lanes; a quarter of a million tokens take
// a millisecond, below which a second thread competes with those of PyTorch that still spin. A thread that cannot be started is
// no reason to fail: its share is done here.
template <class Work>
void share(const Work& work, int64_t count, int threads) {
  const int64_t* starts = work.starts;
  const int64_t tokens = starts[count] - starts[0];
  threads = int(std::max<int64_t>(1, std::min<int64_t>(threads, tokens >> 18)));
  std::vector<int64_t> bounds(threads + 1, count);
  bounds[0] = 0;
  for (int t = 1; t < threads; ++t) {
    const int64_t* at = std::lower_bound(starts, starts + count, starts[0] + tokens * t / threads);
    bounds[t] = std::max(bounds[t - 1], (at - starts) / kLanes * kLanes);
  }
  std::vector<std::thread> others;
  for (int t = 1; t < threads; ++t) {
    const auto part = [&work, from = bounds[t], to = bounds[t + 1]] { run(work, from, to); };
    try {
      others.emplace_back(part);
    } catch (const std::system_error&) {
      part();
    }
  }
  run(work, bounds[0], bounds[1]);
  for (std::thread& other : others) other.join();
}

template <class T>
void whole(Experience<T> e, int64_t count, int threads, const int64_t* groups, int64_t num_groups,
           double eps, bool apply, T* moments) {
  std::vector<double> parts(3 * count);
  e.moments = parts.data();
  share(e, count, threads);
  if (num_groups == 0) return;
  std::vector<Moments> merged(num_groups);
  for (int64_t i = 0; i < count; ++i) merge(merged[groups ? groups[i] : 0], &parts[3 * i]);
  std::vector<double> means, scales;
  for (const Moments& m : merged) {
    *moments++ = T(m.count), *moments++ = T(m.mean), *moments++ = T(m.m2);
    means.push_back(m.mean);
    scales.push_back(1 / std::sqrt(m.m2 / std::max(m.count, 1.0) + eps));
  }
  if (apply)
    share(Normalise<T>{e.starts, e.mask, groups, means.data(), scales.data(), e.advantages}, count,
          threads);
}

}  // namespace
}  // namespace gi

// num_groups 0: no moments. `apply` 0: moments alone, and advantages as they are.
#define GI_EXPERIENCE(suffix, T)                                                                   \
  extern "C" void gi_experience_cpu_##suffix(                                                      \
      const int64_t* starts, int64_t count, int threads, const T* logprobs, const T* ref_logprobs, \
      const T* given_kl, const T* values, const uint8_t* mask, const T* scores,                    \
      const T* kl_coefs, const int64_t* groups, int64_t num_groups, double gamma, double lam,      \
      double eps, int apply, T* rewards, T* kl, T* advantages, T* returns, T* seq_kl,              \
      T* moments) {                                                                                \
    gi::whole(gi::Experience<T>{starts, logprobs, ref_logprobs, given_kl, values, mask, scores,    \
                                kl_coefs, gamma, gamma * lam, rewards, kl, advantages, returns,    \
                                seq_kl, nullptr},                                                  \
              count, threads, groups, num_groups, eps, apply != 0, moments);                       \
  }

GI_EXPERIENCE(f32, float)
GI_EXPERIENCE(f64, double)
