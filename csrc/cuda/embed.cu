// Embedding rows: the L2 normalisation, its gradient, and the potentials that centred keys lack. A row is a warp's or a
// block's, whose threads read it once and hold it where it fits. Sums are in double, for rows of any finite magnitude,
// and so is what is left of a unit row without the centre: near collapse the two are almost equal.
#include "embed.cuh"
#include "launch.cuh"
#include "sums.cuh"

namespace bam::cuda {
namespace {

// The threads of a row: a warp, of several in a block, or (kWide) a block. A turn of them holds `turn` features: whole
// octets of each thread, neighbours' next to each other.
template <bool kWide>
struct Team {
  static constexpr int kOctetsHeld = kWide ? 2 : 1, kHeld = kOctetsHeld * kOctet;
  static constexpr int kWarps = 8;  // of a block of a wide row, at most
  static constexpr int kRows = 4;   // of a block otherwise
  static constexpr int kMostThreads = kWide ? kWarps * kWarp : kRows * kWarp;
  static constexpr int kSums = 3;  // that a row takes

  __device__ Team()
      : row(kWide ? blockIdx.x : static_cast<int64_t>(blockIdx.x) * kRows + threadIdx.x / kWarp),
        threads(kWide ? static_cast<int>(blockDim.x) : kWarp),
        thread(static_cast<int>(kWide ? threadIdx.x : threadIdx.x % kWarp)),
        turn(static_cast<int64_t>(threads) * kHeld) {}

  // Of octet o of a turn that begins at feature `from`.
  __device__ int64_t first(int64_t from, int o) const { return from + (o * threads + thread) * kOctet; }
  // What one warp holds has one turn.
  __device__ bool is_beyond_a_turn(int64_t d) const { return kWide && turn < d; }
  // of_turn(its first feature), turn by turn.
  template <class OfTurn>
  __device__ __forceinline__ void for_turns(int64_t d, OfTurn of_turn) const {
    if (kWide)
      for (int64_t from = 0; from < d; from += turn) of_turn(from);
    else of_turn(0);
  }
  // The same in every thread of the row. `used` counts the sums before, whose parts may still be read.
  template <int kValues>
  __device__ void sum(double (&x)[kValues], int used) const {
    if (kWide) over_block<kWarps>(x, static_cast<double*>(shared_memory()) + used * kWarps, Add());
    else over_lanes(x, Add());
  }
  static Shape shape(int64_t m, int64_t d) {
    if (!kWide) return {dim3(blocks_for(m, kRows)), kMostThreads};
    const int64_t warps = std::min<int64_t>((d + kWarp * kHeld - 1) / (kWarp * kHeld), kWarps);
    return {dim3(static_cast<unsigned>(m)), static_cast<int>(warps) * kWarp,
            kSums * kWarps * static_cast<int64_t>(sizeof(double))};
  }

  const int64_t row;
  const int threads, thread;
  const int64_t turn;
};
constexpr int64_t kNarrow = kWarp * Team<false>::kHeld;  // features that one turn of a warp holds

// 2^power of row i: mantissa in [1, 2].
__device__ __forceinline__ void store_power(const Potential& row, int64_t i, double power) {
  const double whole = floor(power);
  row.exponent[i] = static_cast<float>(whole);
  row.mantissa[i] = exp2f(static_cast<float>(power - whole));
}

// What a thread holds of a row, and of the centre where there is one.
template <class T, bool kWide>
struct Held {
  __device__ __forceinline__ void load(const Team<kWide>& team, const Row<T>& row, const float* other, int64_t from,
                                       int64_t d) {
    T raw[Team<kWide>::kOctetsHeld][kOctet];
#pragma unroll
    for (int o = 0; o < Team<kWide>::kOctetsHeld; ++o) {
      row.load(raw[o], team.first(from, o), d);
      if (other) load_floats(centre[o], other, team.first(from, o), d);
    }
#pragma unroll
    for (int o = 0; o < Team<kWide>::kOctetsHeld; ++o)
#pragma unroll
      for (int k = 0; k < kOctet; ++k) x[o][k] = as_float(raw[o][k]);
  }
  double x[Team<kWide>::kOctetsHeld][kOctet];
  float centre[Team<kWide>::kOctetsHeld][kOctet];
};

// An octet of read_i; sums += <u, centre>, <u - centre, centre>.
template <bool kCentred>
__device__ __forceinline__ void write_unit(const Normalize& p, int64_t row, int64_t first, const double (&x)[kOctet],
                                           const float (&centre)[kOctet], double inverse, double (&sums)[2]) {
  using Read = std::conditional_t<kCentred, __half, float>;
  float out[kOctet];
#pragma unroll
  for (int k = 0; k < kOctet; ++k) {
    const double unit = x[k] * inverse;
    if (kCentred) {
      const double c = centre[k], centred = unit - c;
      sums[0] += unit * c;
      sums[1] += centred * c;
      out[k] = static_cast<float>(centred) * kUnitScale;
    } else {
      out[k] = static_cast<float>(unit);
    }
  }
  Read* read = static_cast<Read*>(p.read) + row * p.d;
  store_floats(read + first, out, p.d - first, is_aligned(read));
}

template <class T, bool kWide>
__global__ void __launch_bounds__(Team<kWide>::kMostThreads) normalize_kernel(const Normalize p) {
  follow_earlier_kernels();
  const Team<kWide> team;
  if (team.row >= p.m) return;
  const Row<T> row(p.x, team.row);
  Held<T, kWide> held;
  double squares[1] = {};
  team.for_turns(p.d, [&](int64_t from) {
    held.load(team, row, p.centre, from, p.d);
#pragma unroll
    for (int k = 0; k < Team<kWide>::kHeld; ++k) {
      const double x = held.x[k / kOctet][k % kOctet];
      squares[0] += x * x;
    }
  });
  team.sum(squares, 0);
  // One root for both, which is infinite where the sum is 0, and 0 where the sum is infinite.
  const double root = inverse_sqrt(squares[0]);
  const double norm = squares[0] > 0.0 && root > 0.0 ? squares[0] * root : squares[0];
  const double inverse = norm <= kNormFloor ? 1.0 / kNormFloor : root;
  if (team.thread == 0) p.norm[team.row] = norm;
  if (!p.read) return;
  double sums[2] = {};
  team.for_turns(p.d, [&](int64_t from) {
    if (team.is_beyond_a_turn(p.d)) held.load(team, row, p.centre, from, p.d);
#pragma unroll
    for (int o = 0; o < Team<kWide>::kOctetsHeld; ++o) {
      const int64_t first = team.first(from, o);
      if (p.centre) write_unit<true>(p, team.row, first, held.x[o], held.centre[o], inverse, sums);
      else write_unit<false>(p, team.row, first, held.x[o], held.centre[o], inverse, sums);
    }
  });
  if (!p.centre) return;
  team.sum(sums, 1);
  if (team.thread != 0) return;
  p.bias[team.row] = static_cast<float>(sums[1] * (kUnitScale * kUnitScale));
  store_power(p.row, team.row, sums[0] * p.scale);
}

template <bool kWide>
__global__ void __launch_bounds__(Team<kWide>::kMostThreads) centre_potential_kernel(const CentrePotential p) {
  follow_earlier_kernels();
  const Team<kWide> team;
  if (team.row >= p.m) return;
  double dot[1] = {};
  team.for_turns(p.d, [&](int64_t from) {
#pragma unroll
    for (int o = 0; o < Team<kWide>::kOctetsHeld; ++o) {
      float x[kOctet], centre[kOctet];
      load_floats(x, p.read + team.row * p.d, team.first(from, o), p.d);
      load_floats(centre, p.centre, team.first(from, o), p.d);
#pragma unroll
      for (int k = 0; k < kOctet; ++k) dot[0] += static_cast<double>(x[k]) * centre[k];
    }
  });
  team.sum(dot, 0);
  if (team.thread == 0) store_power(p.row, team.row, dot[0] * p.scale);
}

// A factor of floats that float32 may hold with few bits or not at all: what is left of it by a power of two comes
// first, so that a product is rounded to a subnormal once.
class Factor {
 public:
  __device__ explicit Factor(double value) {
    const bool tiny = fabs(value) < 0x1p-60;
    normal_ = static_cast<float>(tiny ? value * 0x1p100 : value);
    power_ = tiny ? 0x1p-100f : 1.0f;
  }
  __device__ __forceinline__ float operator*(float x) const { return x * normal_ * power_; }

 private:
  float normal_, power_;
};

template <class T, bool kWide>
__global__ void __launch_bounds__(Team<kWide>::kMostThreads) project_kernel(const Project p) {
  follow_earlier_kernels();
  using Mine = Team<kWide>;
  const Mine team;
  if (team.row >= p.m) return;
  const Row<T> row(p.x, team.row);
  float* d = p.d + team.row * p.d_features;
  const double norm = p.norm[team.row], inverse = norm < kNormFloor ? 0.0 : 1.0 / norm;
  const Factor to_unit(inverse), factor(inverse * p.factor);
  T x[Mine::kOctetsHeld][kOctet];
  float given[Mine::kOctetsHeld][kOctet];
  const auto load = [&](int64_t from) {
#pragma unroll
    for (int o = 0; o < Mine::kOctetsHeld; ++o) {
      row.load(x[o], team.first(from, o), p.d_features);
      load_floats(given[o], d, team.first(from, o), p.d_features);
    }
  };
  const auto unit = [&](int o, int k) { return to_unit * as_float(x[o][k]); };
  double dot[1] = {};
  team.for_turns(p.d_features, [&](int64_t from) {
    load(from);
    float held = 0.0f;
#pragma unroll
    for (int k = 0; k < Mine::kHeld; ++k) held += given[k / kOctet][k % kOctet] * unit(k / kOctet, k % kOctet);
    dot[0] += held;
  });
  team.sum(dot, 0);
  const auto along = static_cast<float>(dot[0]);
  team.for_turns(p.d_features, [&](int64_t from) {
    if (team.is_beyond_a_turn(p.d_features)) load(from);
#pragma unroll
    for (int o = 0; o < Mine::kOctetsHeld; ++o) {
      const int64_t first = team.first(from, o);
#pragma unroll
      for (int k = 0; k < kOctet; ++k) given[o][k] = factor * (given[o][k] - along * unit(o, k));
      store_octet(d + first, given[o], p.d_features - first, is_aligned(d));
    }
  });
}

// m rows of d features.
template <class Params>
void launch_rows(const char* name, Kernel<Params> narrow, Kernel<Params> wide, int64_t m, int64_t d, const Where& where,
                 const Params& params) {
  if (d <= kNarrow) launch(name, narrow, Team<false>::shape(m, d), where, params);
  else launch(name, wide, Team<true>::shape(m, d), where, params);
}

}  // namespace

void normalize(const Normalize& p, const Where& where) {
  const auto kernel = [&](auto wide) {
    constexpr bool kWide = decltype(wide)::value;
    return of_type<Normalize>(p.x.type, normalize_kernel<float, kWide>, normalize_kernel<__half, kWide>,
                              normalize_kernel<__nv_bfloat16, kWide>);
  };
  launch_rows("normalize_kernel", kernel(std::false_type()), kernel(std::true_type()), p.m, p.d, where, p);
}

void centre_potential(const CentrePotential& p, const Where& where) {
  launch_rows<CentrePotential>("centre_potential_kernel", centre_potential_kernel<false>, centre_potential_kernel<true>,
                               p.m, p.d, where, p);
}

void project(const Project& p, const Where& where) {
  const auto kernel = [&](auto wide) {
    constexpr bool kWide = decltype(wide)::value;
    return of_type<Project>(p.x.type, project_kernel<float, kWide>, project_kernel<__half, kWide>,
                            project_kernel<__nv_bfloat16, kWide>);
  };
  launch_rows("project_kernel", kernel(std::false_type()), kernel(std::true_type()), p.m, p.d_features, where, p);
}

}  // namespace bam::cuda
