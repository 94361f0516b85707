// Exact partition of values into K groups of largest between-group variance, for the CPU and the GPU.
//
// Fisher: some best partition is a cut of the sorted values into K intervals. The total variance is
// fixed, so with S0 and S1 the prefix sums of the weights and of weight * value, we maximise
//     sum over groups (j ends, i begins) of  gain(i, j) = (S1[j] - S1[i])^2 / (S0[j] - S0[i]),
// one squared sum and one division a group, and no sum of squares that would cancel.
//
// Read downward, in the order in which it runs:
//   Row       the sorted values, centred on their median, where an offset of 1e8 costs no digits
//   Shape     prefix sums over a tree of 16 children: any number of threads gets the same bits
//   narrow    a window for each cut, outside of which no best cut can lie; usually it is tiny
//   choose    the possible cuts within the windows: never between equal values
//   layers    best[k][j], the best of the first j values in k groups, by monotone divide and conquer
//   finish    the cuts, walked back, and the groups' means
// A phase says what item `i` of it does, or takes its share as (rank, size). The host's threads, one
// CTA or a whole grid run it, with a barrier or a new launch after each phase. Every number that
// decides something comes from the same IEEE operations in the same order (compile with contraction
// into FMA switched off), so the CPU and the GPU agree bit for bit, ties included: of cuts whose
// computed objective is the same, the lowest wins.

#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#ifdef __CUDACC__
#define GI_HD __host__ __device__ inline
#else
#define GI_HD inline
#endif

namespace gi {

enum Status : int { kOk = 0, kBadValues = 1, kBadWeights = 2, kInfeasible = 4 };

template <class T>
GI_HD constexpr T smaller(T a, T b) { return b < a ? b : a; }
template <class T>
GI_HD constexpr T larger(T a, T b) { return a < b ? b : a; }

// --- keys: unsigned integers in the order of the floats, for radix sorts -------------------------

template <class T>
struct KeyOf;
template <>
struct KeyOf<float> {
  using type = uint32_t;
};
template <>
struct KeyOf<double> {
  using type = uint64_t;
};
template <class T>
using Key = typename KeyOf<T>::type;

template <class T>
GI_HD Key<T> to_key(T x) {
  constexpr Key<T> sign = Key<T>(1) << (8 * sizeof(T) - 1);
  x += T(0);  // -0 becomes +0: equal values must have equal keys
  Key<T> bits;
  memcpy(&bits, &x, sizeof x);
  return bits & sign ? ~bits : bits | sign;
}

template <class T>
GI_HD T from_key(Key<T> key) {
  constexpr Key<T> sign = Key<T>(1) << (8 * sizeof(T) - 1);
  key = key & sign ? key ^ sign : ~key;
  T x;
  memcpy(&x, &key, sizeof x);
  return x;
}

// x - x is 0 for every finite x and NaN for the rest.
template <class T>
GI_HD bool finite(T x) { return x - x == T(0); }

// --- prefix sums over a tree ---------------------------------------------------------------------

constexpr int kFan = 16;
constexpr int kMaxLevels = 8;  // 16^8 = 2^32 items

// Level 0 are the n items; each sum of level l is that of up to 16 neighbours of level l - 1, added
// from left to right. There is one sum more than needed, so that position n has a chunk as well.
struct Shape {
  int levels;
  int count[kMaxLevels + 1];
  int start[kMaxLevels + 1];  // of level l >= 1 in one flat array; level 1 starts at 0
  int size;                   // of that array

  GI_HD explicit Shape(int n) : levels(0), count{n}, start{0}, size(0) {
    do {
      ++levels;
      count[levels] = count[levels - 1] / kFan + 1;
      start[levels] = size;
      size += count[levels];
    } while (count[levels] > 1);
  }
};

template <class V, class Item>
GI_HD V sum_of_chunk(Item item, int chunk, int count) {
  V total = 0;
  const int end = smaller((chunk + 1) * kFan, count);
  for (int i = chunk * kFan; i < end; ++i) total += item(i);
  return total;
}

// From the sums of level 1, those of all levels above, and for each sum the total of what lies left
// of it. A prefix sum then is offsets[chunk] + the items of its own chunk up to it: a rounding error
// of 16 * levels steps, where a running sum would make n.
#ifdef __CUDACC__
#pragma nv_exec_check_disable
#endif
template <class Group, class V>
GI_HD void sweep(Group group, const Shape& shape, V* sums, V* offsets) {
  for (int l = 2; l <= shape.levels; ++l) {
    const V* below = sums + shape.start[l - 1];
    for (int i = group.rank; i < shape.count[l]; i += group.size)
      sums[shape.start[l] + i] =
          sum_of_chunk<V>([&](int c) { return below[c]; }, i, shape.count[l - 1]);
    group.sync();
  }
  if (group.rank == 0) offsets[shape.start[shape.levels]] = 0;
  group.sync();
  for (int l = shape.levels - 1; l >= 1; --l) {
    for (int i = group.rank; i < shape.count[l + 1]; i += group.size) {
      V left = offsets[shape.start[l + 1] + i];
      const int end = smaller((i + 1) * kFan, shape.count[l]);
      for (int c = i * kFan; c < end; ++c) {
        offsets[shape.start[l] + c] = left;
        left += sums[shape.start[l] + c];
      }
    }
    group.sync();
  }
}

// The sum of items lo..hi-1 through the highest sums that fit: small groups keep all their digits,
// which a difference of two long prefix sums would not.
template <class Item>
GI_HD double sum_of_range(Item item, const Shape& shape, const double* sums, int lo, int hi) {
  double total = 0;
  for (int l = 0; lo < hi; ++l, lo /= kFan, hi /= kFan) {
    while (lo < hi && lo % kFan) {
      total += l ? sums[shape.start[l] + lo] : item(lo);
      ++lo;
    }
    while (lo < hi && hi % kFan) {
      --hi;
      total += l ? sums[shape.start[l] + hi] : item(hi);
    }
  }
  return total;
}

// --- one row -------------------------------------------------------------------------------------

// A cut before the element `at`, and the prefix sums there. Index 0..K; 0 and K are the two ends.
struct Cuts {
  int* at;
  double* mass;
  double* sum;
};

struct Control {
  int status;
  int some_weight_is_zero;
  int window;  // which of the two buffers of `low` and `high` holds the result of narrow()
  double centre, scale;
  double between;
};

template <class T>
struct Row {
  int n, k, min_size;
  Shape shape{0};
  Control* control;

  Key<T>* keys;     // (n) sorted
  double* weights;  // (n) in the order of the keys; null: all 1
  double *mass_sums, *mass_offsets, *sums, *offsets;  // (shape.size), mass_* only with weights
  int *counts, *count_offsets;                        // (shape.size)

  Cuts low[2], high[2];          // (K + 1): the window of each cut
  int *first, *last, *cuts_of;   // (K + 1): the same as candidates, and where its cuts begin

  Cuts candidates;               // the possible cuts within the windows, ascending
  double* best[2];               // (largest window): of the layers k - 1 and k
  int* cut;                      // (sum of windows): candidate k - 1 that is best for candidate k
  int* bounds;                   // (K + 1): the cuts chosen
  double *group_mass, *group_sum;  // (K)

  // Scaled by a power of two so that squares neither overflow nor vanish, then centred.
  GI_HD double raw(int i) const { return double(from_key<T>(keys[i])); }
  GI_HD double value(int i) const { return raw(i) * control->scale - control->centre; }
  GI_HD double weight(int i) const { return weights ? weights[i] : 1.0; }
  GI_HD double weighted(int i) const { return weights ? weights[i] * value(i) : value(i); }

  GI_HD bool is_cut(int at) const { return at == 0 || at == n || keys[at - 1] != keys[at]; }

  // Half the weight lies left of the centre: a median keeps the digits of the bulk even where there
  // are outliers, or far-off values without weight. Any centre gives the right answer.
  GI_HD void set_centre() const {
    int exponent = 0;
    const double half_range = 0.5 * raw(n - 1) - 0.5 * raw(0);
    if (half_range > 0) frexp(half_range, &exponent);
    control->scale = ldexp(1.0, smaller(-exponent, 1023));
    int median = n / 2;
    if (weights) {
      const double half = 0.5 * mass_sums[shape.start[shape.levels]];
      int lo = 0, hi = shape.count[1] - 1;
      while (lo < hi) {
        const int middle = lo + (hi - lo + 1) / 2;
        if (mass_offsets[middle] <= half) lo = middle;
        else hi = middle - 1;
      }
      median = smaller(lo * kFan, n - 1);
    }
    control->centre = raw(median) * control->scale;
  }

  GI_HD void sum_masses(int chunk) const {
    mass_sums[chunk] = sum_of_chunk<double>([this](int i) { return weights[i]; }, chunk, n);
  }
  GI_HD void sum_values(int chunk) const {
    sums[chunk] = sum_of_chunk<double>([this](int i) { return weighted(i); }, chunk, n);
  }

  GI_HD void place(const Cuts& cuts, int g, int at) const {
    const int chunk = at / kFan;
    double mass = weights ? mass_offsets[chunk] : at, sum = offsets[chunk];
    for (int i = chunk * kFan; i < at; ++i) {
      if (weights) mass += weights[i];
      sum += weighted(i);
    }
    cuts.at[g] = at;
    cuts.mass[g] = mass;
    cuts.sum[g] = sum;
  }

  // --- narrow ------------------------------------------------------------------------------------
  // A best partition t obeys, for each cut g, with m the midpoint of the means of its two groups:
  // no value right of the cut is below m, or moving the equal values there to the left group would
  // strictly improve the objective, unless that leaves the right group fewer than min_size members.
  // So   t_g >= min(first value >= m(t), latest cut that leaves min_size before t_{g+1}),
  // and the right-hand side never falls when t rises, because the means do not. Start from the
  // lowest cuts that member counts allow, low <= t: then low <- right-hand side(low) <= t as well,
  // and so on for ever; `high` comes down in the same way. (Lloyd's map is monotone in one
  // dimension, and t is one of its fixed points.) For unimodal data the two meet but for a few
  // hundred values; with clusters the windows stay wide, and the layers below do more work.
  // A value of weight zero may lie on either side, so then we keep the windows of the counts.

  GI_HD int first_equal(int i) const {  // the first element of the run of element i
    int lo = 0, hi = i;
    while (lo < hi) {
      const int middle = lo + (hi - lo) / 2;
      if (keys[middle] < keys[i]) lo = middle + 1;
      else hi = middle;
    }
    return lo;
  }
  GI_HD int after_equal(int i) const {  // the first element after the run of element i
    int lo = i + 1, hi = n;
    while (lo < hi) {
      const int middle = lo + (hi - lo) / 2;
      if (keys[middle] > keys[i]) hi = middle;
      else lo = middle + 1;
    }
    return lo;
  }
  // The latest cut with min_size members between it and `at`, or -1; the earliest after, or n + 1.
  GI_HD int latest_before(int at) const {
    const int p = at - min_size;
    return p < 0 ? -1 : is_cut(p) ? p : first_equal(p);
  }
  GI_HD int earliest_after(int at) const {
    const int64_t p = int64_t(at) + min_size;
    return p > n ? n + 1 : is_cut(int(p)) ? int(p) : after_equal(int(p) - 1);
  }

  GI_HD void windows_of_counts() const {
    int at = 0;
    for (int g = 0; g < k; ++g) {
      low[0].at[g] = at;
      at = earliest_after(at);
      if (at > n) {
        control->status |= kInfeasible;
        return;
      }
    }
    low[0].at[k] = at = n;
    for (int g = k; g > 0; --g) {
      high[0].at[g] = at;
      at = latest_before(at);
    }
    high[0].at[0] = 0;
  }

  GI_HD void tighten(int g, bool lower, int from) const {
    const Cuts& old = lower ? low[from] : high[from];
    const Cuts& now = lower ? low[from ^ 1] : high[from ^ 1];
    const double left = old.mass[g] - old.mass[g - 1], right = old.mass[g + 1] - old.mass[g];
    int at = old.at[g];
    if (left > 0 && right > 0) {
      // The prefix sums carry an error of some 1e-14 of the total; the slack is well above it.
      const double slack = 1e-13 * old.mass[k] * (1 / left + 1 / right);
      const double mean = 0.5 * ((old.sum[g] - old.sum[g - 1]) / left) +
                          0.5 * ((old.sum[g + 1] - old.sum[g]) / right);
      const double middle_value = lower ? mean - slack : mean + slack;
      int lo = low[from].at[g], hi = high[from].at[g];  // the first value >= middle_value, in here
      while (lo < hi) {
        const int middle = lo + (hi - lo) / 2;
        if (value(middle) < middle_value) lo = middle + 1;
        else hi = middle;
      }
      at = lower ? larger(at, smaller(lo, latest_before(old.at[g + 1])))
                 : smaller(at, larger(lo, earliest_after(old.at[g - 1])));
    }
    if (at == old.at[g]) {
      now.at[g] = at;
      now.mass[g] = old.mass[g];
      now.sum[g] = old.sum[g];
    } else {
      place(now, g, at);
    }
  }

  GI_HD int64_t width(int buffer) const {
    int64_t total = 0;
    for (int g = 1; g < k; ++g) total += high[buffer].at[g] - low[buffer].at[g];
    return total;
  }

#ifdef __CUDACC__
#pragma nv_exec_check_disable
#endif
  template <class Group>
  GI_HD void narrow(Group group) const {
    if (group.rank == 0) windows_of_counts();
    group.sync();
    if (control->status) return;
    for (int g = group.rank; g <= k; g += group.size) {
      place(low[0], g, low[0].at[g]);
      place(high[0], g, high[0].at[g]);
      if (g == 0 || g == k) {
        place(low[1], g, low[0].at[g]);
        place(high[1], g, high[0].at[g]);
      }
    }
    group.sync();
    int now = 0;
    int64_t before = control->some_weight_is_zero ? 0 : width(0);
    while (before > 0) {
      for (int i = group.rank; i < 2 * (k - 1); i += group.size) tighten(i / 2 + 1, i % 2, now);
      group.sync();
      now ^= 1;
      const int64_t after = width(now);
      if (before - after <= 8 * k) break;  // a round costs about as much as that many candidates
      before = after;
    }
    group.sync();  // nobody is still adding up widths
    for (int g = group.rank; g <= k; g += group.size)
      high[now].at[g] = larger(high[now].at[g], low[now].at[g]);  // whatever rounding did
    if (group.rank == 0) control->window = now;
    group.sync();
  }

  // --- choose ------------------------------------------------------------------------------------

  // Calls f(chunk) for those of the chunks begin..end-1 that some window touches, ascending.
  template <class F>
  GI_HD void for_each_chunk(int begin, int end, F f) const {
    const Cuts &lo = low[control->window], &hi = high[control->window];
    int chunk = begin;
    for (int g = 0; g <= k; ++g)
      for (chunk = larger(chunk, lo.at[g] / kFan); chunk < end && chunk <= hi.at[g] / kFan; ++chunk) f(chunk);
  }

  // Calls f(at) for every possible cut of the chunk that lies in some window. Both ends of the
  // windows ascend with g, so the last window that begins before a place reaches furthest.
  template <class F>
  GI_HD void for_each_candidate(int chunk, F f) const {
    const int* lo = low[control->window].at;
    const int* hi = high[control->window].at;
    const int begin = chunk * kFan, end = smaller(begin + kFan - 1, n);
    int g = 0, g_end = k;
    while (g < g_end) {
      const int middle = g + (g_end - g + 1) / 2;
      if (lo[middle] <= end) g = middle;
      else g_end = middle - 1;
    }
    if (hi[g] < begin) return;
    while (g > 0 && lo[g] > begin) --g;
    for (int at = begin; at <= end; ++at) {
      while (g < k && lo[g + 1] <= at) ++g;
      if (at <= hi[g] && is_cut(at)) f(at);
    }
  }

  GI_HD void count_candidates(int chunk) const {
    int count = 0;
    for_each_candidate(chunk, [&](int) { ++count; });
    counts[chunk] = count;
  }

  GI_HD int number_of_candidates() const { return counts[shape.start[shape.levels]]; }

  GI_HD void write_candidates(int chunk) const {
    int index = count_offsets[chunk], i = chunk * kFan;
    double mass = weights ? mass_offsets[chunk] : i, sum = offsets[chunk];
    for_each_candidate(chunk, [&](int at) {
      for (; i < at; ++i) {
        mass += weight(i);
        sum += weighted(i);
      }
      candidates.at[index] = at;
      candidates.mass[index] = mass;
      candidates.sum[index] = sum;
      ++index;
    });
  }

  GI_HD int index_of(int at) const {
    int index = count_offsets[at / kFan];
    for_each_candidate(at / kFan, [&](int other) { index += other < at; });
    return index;
  }
  GI_HD void find_window(int g) const {
    first[g] = index_of(low[control->window].at[g]);
    last[g] = index_of(high[control->window].at[g]);
  }
  GI_HD void allot_cuts() const {
    int total = 0;
    for (int g = 0; g <= k; ++g) {
      cuts_of[g] = total;
      if (g) total += last[g] - first[g] + 1;
    }
  }

  // --- layers ------------------------------------------------------------------------------------
  // best[k][j] = max over i of best[k-1][i] + gain(i, j), where j runs over the window of cut k and i
  // over that of cut k - 1. gain obeys the inverse Monge condition, gain(i,j) + gain(i',j') >=
  // gain(i,j') + gain(i',j) for i < i' <= j < j', hence so does the sum, and the lowest best i never
  // falls when j rises. min_size keeps this: it allows i up to a limit that ascends with j, so
  // wherever (i', j) is allowed, (i, j) and (i', j') are too, and elsewhere -inf stands on the smaller side.
  // Level by level: with stride s the places r = s-1, 3s-1, ... are solved, all at once, between the
  // answers of their neighbours r - s and r + s. Rounding can drop a candidate that was as good as
  // another to 1e-16; a level loses no more than that, so all of them lose log2(n) * 1e-16.

  GI_HD double gain(double mass, double sum) const { return mass > 0 ? sum * sum / mass : 0.0; }

  struct Node {
    int j, lo, hi;  // candidate j, and the range in which its cut lies
  };
  GI_HD Node node(int g, int r, int stride) const {
    const int* cuts = cut + cuts_of[g];
    Node node{first[g] + r, first[g - 1], last[g - 1]};
    if (r >= stride) node.lo = cuts[r - stride];
    if (r + stride <= last[g] - first[g]) node.hi = cuts[r + stride];
    const int limit = candidates.at[node.j] - min_size;
    if (candidates.at[node.hi] > limit) {
      int lo = node.lo, hi = node.hi;
      while (lo < hi) {
        const int middle = lo + (hi - lo + 1) / 2;
        if (candidates.at[middle] <= limit) lo = middle;
        else hi = middle - 1;
      }
      node.hi = lo;
    }
    return node;
  }
  GI_HD static int first_stride(int places) {
    int stride = 1;
    while (stride <= places / 2) stride *= 2;
    return stride;
  }
  GI_HD static int nodes_of_level(int places, int stride) { return (places + stride) / (2 * stride); }

  // --- finish ------------------------------------------------------------------------------------

  GI_HD void walk_back() const {
    int index = number_of_candidates() - 1;
    bounds[k] = n;
    for (int g = k; g >= 1; --g) {
      index = cut[cuts_of[g] + index - first[g]];
      bounds[g - 1] = candidates.at[index];
    }
  }
  GI_HD void sum_group(int g) const {
    const int lo = bounds[g], hi = bounds[g + 1];
    group_mass[g] = weights ? sum_of_range([this](int i) { return weights[i]; }, shape, mass_sums, lo, hi)
                            : double(hi - lo);
    group_sum[g] = sum_of_range([this](int i) { return weighted(i); }, shape, sums, lo, hi);
  }
  // A group without weight has no mean: it is centred between its smallest and largest member.
  GI_HD double centred_mean(int g) const {
    return group_mass[g] > 0 ? group_sum[g] / group_mass[g]
                             : 0.5 * value(bounds[g]) + 0.5 * value(bounds[g + 1] - 1);
  }
  GI_HD double center(int g) const {
    return (centred_mean(g) + control->centre) / control->scale;
  }
  GI_HD double threshold(int g) const {  // between groups g - 1 and g
    return 0.5 * raw(bounds[g] - 1) + 0.5 * raw(bounds[g]);
  }
  GI_HD void set_between() const {
    double mass = 0, sum = 0, between = 0;
    for (int g = 0; g < k; ++g) {
      mass += group_mass[g];
      sum += group_sum[g];
    }
    for (int g = 0; mass > 0 && g < k; ++g) {
      const double deviation = centred_mean(g) - sum / mass;
      between += group_mass[g] / mass * deviation * deviation;
    }
    control->between = between / control->scale / control->scale;
  }
};

// The group of a value: how many groups begin at or below it. So no index is sorted along.
template <class T>
GI_HD int group_of(T x, const T* begins, int k) {  // begins[g]: the smallest value of group g
  int lo = 0, hi = k - 1;
  while (lo < hi) {
    const int middle = lo + (hi - lo + 1) / 2;
    if (x >= begins[middle]) lo = middle;
    else hi = middle - 1;
  }
  return lo;
}

}  // namespace gi
