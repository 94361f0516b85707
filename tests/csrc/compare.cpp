// The CUDA kernels under emulation.h against the CPU's code: every result must have the same bits.
// Usage: compare <problems>. One line for a difference, and exit code 1.

#define GI_EMULATION
#define GI_MAX_THREADS 8
#define GI_MAX_ONE_CTA 400
#include "../../csrc/partition.cu"

extern "C" int gi_partition_cpu_f32(const float*, const double*, int64_t, int64_t, int, int, int, int32_t*,
                                    double*, double*, double*, int*);
extern "C" int gi_partition_cpu_f64(const double*, const double*, int64_t, int64_t, int, int, int, int32_t*,
                                    double*, double*, double*, int*);

#include <cmath>
#include <random>

namespace {

struct Result {
  std::vector<int32_t> ids;
  std::vector<double> thresholds, centers, between;
  std::vector<int> status;
  Result(int batch, int n, int k)
      : ids(batch * n, -7), thresholds(batch * (k - 1) + 1), centers(batch * k), between(batch), status(batch, -7) {}
};

template <class V>
bool same(const V& a, const V& b) {
  return memcmp(a.data(), b.data(), a.size() * sizeof a[0]) == 0;
}

int on_cpu(const std::vector<float>& v, const double* w, int b, int n, int k, int m, int threads, Result& r) {
  return gi_partition_cpu_f32(v.data(), w, b, n, k, m, threads, r.ids.data(), r.thresholds.data(),
                              r.centers.data(), r.between.data(), r.status.data());
}
int on_cpu(const std::vector<double>& v, const double* w, int b, int n, int k, int m, int threads, Result& r) {
  return gi_partition_cpu_f64(v.data(), w, b, n, k, m, threads, r.ids.data(), r.thresholds.data(),
                              r.centers.data(), r.between.data(), r.status.data());
}
int64_t workspace(float, int b, int n, int k, bool w) { return gi_partition_cuda_workspace_f32(b, n, k, w); }
int64_t workspace(double, int b, int n, int k, bool w) { return gi_partition_cuda_workspace_f64(b, n, k, w); }
int on_cuda(const std::vector<float>& v, const double* w, int b, int n, int k, int m, void* space, Result& r) {
  return gi_partition_cuda_f32(v.data(), w, b, n, k, m, r.ids.data(), r.thresholds.data(), r.centers.data(),
                               r.between.data(), r.status.data(), space, nullptr);
}
int on_cuda(const std::vector<double>& v, const double* w, int b, int n, int k, int m, void* space, Result& r) {
  return gi_partition_cuda_f64(v.data(), w, b, n, k, m, r.ids.data(), r.thresholds.data(), r.centers.data(),
                               r.between.data(), r.status.data(), space, nullptr);
}

template <class T>
bool agree(std::mt19937& random, int problem) {
  const auto below = [&](int n) { return int(random() % n); };
  const bool long_row = problem % 4 == 3;
  const int batch = long_row ? 1 : 1 + below(3);
  const int n = long_row ? 401 + below(700) : problem % 4 == 0 ? 1 + below(12) : 1 + below(400);
  const int k = 1 + below(gi::smaller(n, problem % 8 == 7 ? 20 : 5)), kind = below(6);
  const int min_size = below(2) ? 1 : 1 + below(gi::larger(n / k, 1));
  std::normal_distribution<double> normal;
  std::vector<T> values(batch * n);
  for (auto& v : values) {
    const double cluster = double(below(4)) * 5;
    v = T(kind == 0   ? normal(random)
          : kind == 1 ? cluster + 0.1 * normal(random)
          : kind == 2 ? double(below(7))
          : kind == 3 ? 1e8 + normal(random)
          : kind == 4 ? std::exp(4 * normal(random))
                      : -0.0 * below(2));
  }
  if (below(16) == 0) values[below(batch * n)] = below(2) ? T(NAN) : T(-INFINITY);
  std::vector<double> weights(batch * n);
  for (auto& w : weights) w = below(3) ? std::abs(normal(random)) : kind % 2 ? 0.0 : 1.0;
  if (below(16) == 0) weights[below(batch * n)] = -1;
  const double* w = below(2) ? weights.data() : nullptr;

  Result cpu(batch, n, k), cuda(batch, n, k);
  emulation::shared_limit = below(2) ? 64 << 10 : 1 << 10;
  std::vector<unsigned char> space(workspace(T(), batch, n, k, w != nullptr));
  const int threads = 1 + below(2);
  if (on_cpu(values, w, batch, n, k, min_size, threads, cpu) ||
      on_cuda(values, w, batch, n, k, min_size, space.data(), cuda))
    return false;
  if (!same(cpu.status, cuda.status)) return false;
  for (int b = 0; b < batch; ++b)
    if (cpu.status[b]) {  // the CPU leaves such a row alone, the GPU says NaN
      if (!std::isnan(cuda.between[b]) || cuda.ids[b * n] != -1) return false;
      for (int i = 0; i < n; ++i) cuda.ids[b * n + i] = cpu.ids[b * n + i];
      for (int g = 0; g < k; ++g) cuda.centers[b * k + g] = cpu.centers[b * k + g];
      for (int g = 0; g + 1 < k; ++g) cuda.thresholds[b * (k - 1) + g] = cpu.thresholds[b * (k - 1) + g];
      cuda.between[b] = cpu.between[b];
    }
  return same(cpu.ids, cuda.ids) && same(cpu.thresholds, cuda.thresholds) && same(cpu.centers, cuda.centers) &&
         same(cpu.between, cuda.between);
}

}  // namespace

int main(int, char** arguments) {
  const int problems = atoi(arguments[1]);
  for (int problem = 0; problem < problems; ++problem) {
    std::mt19937 random(problem);
    if (!(problem % 2 ? agree<float>(random, problem / 2) : agree<double>(random, problem / 2))) {
      printf("problem %d differs\n", problem);
      return 1;
    }
  }
  printf("%d problems agree\n", problems);
}
