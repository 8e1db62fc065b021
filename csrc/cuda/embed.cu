// Embedding rows: the L2 normalisation, its gradient, and the potentials that centred keys lack. A row is a warp's or a
// block's, whose threads read it once and hold it where it fits, as it is: a block of few registers leaves room for the
// loads of others. Sums are in double, for rows of any finite magnitude; what is left of a unit row without the centre
// has float32's precision, also near collapse, where the two are almost equal.
#include "embed.cuh"
#include "launch.cuh"
#include "sums.cuh"

namespace bam::cuda {
namespace {

// The threads of a row: a warp, of several in a block, or (kWide) a block. A turn of them holds `turn` features: whole
// octets of each thread, neighbours' next to each other.
template <bool kWide>
struct Team {
  static constexpr int kOctetsHeld = kWide ? 4 : 1, kHeld = kOctetsHeld * kOctet;
  static constexpr int kWarps = 4;  // of a block of a wide row, at most
  static constexpr int kRows = 4;   // of a block otherwise
  static constexpr int kMostThreads = kWide ? kWarps * kWarp : kRows * kWarp;
  static constexpr int kSums = 3;  // that a row takes, at most

  __device__ Team()
      : row(kWide ? blockIdx.x : static_cast<int64_t>(blockIdx.x) * kRows + threadIdx.x / kWarp),
        threads(kWide ? static_cast<int>(blockDim.x) : kWarp),
        thread(static_cast<int>(kWide ? threadIdx.x : threadIdx.x % kWarp)),
        turn(static_cast<int64_t>(threads) * kHeld) {}

  // of_octet(o, its first feature) for octets of a turn that begins at feature `from`, as far as the row has them.
  template <class OfOctet>
  __device__ __forceinline__ void for_octets(int64_t from, int64_t d, OfOctet of_octet) const {
#pragma unroll
    for (int o = 0; o < kOctetsHeld; ++o) {
      const int64_t first = from + (o * threads + thread) * kOctet;
      if (first < d) of_octet(o, first);
    }
  }
  // Whether d features take more than one turn; a row of one warp never does.
  __device__ bool is_beyond_a_turn(int64_t d) const { return kWide && turn < d; }
  // of_turn(its first feature), turn by turn.
  template <class OfTurn>
  __device__ __forceinline__ void for_turns(int64_t d, OfTurn of_turn) const {
    if (kWide)
      for (int64_t from = 0; from < d; from += turn) of_turn(from);
    else of_turn(0);
  }
  // Sums x over the threads of a row; every thread gets the result. A kernel may call it once: a second sum would
  // overwrite shared memory that some threads still read.
  template <int kValues>
  __device__ void sum(double (&x)[kValues]) const {
    static_assert(kValues <= kSums, "there is room");
    if (kWide) over_block<kWarps>(x, static_cast<double*>(shared_memory()), Add());
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

// kUnitScale times a unit row without the centre, to float32's precision also where the two are almost equal: the
// factor of a row is two floats, and its product with a feature is not rounded before the centre is subtracted.
template <class T>
class Centred {
 public:
  __device__ explicit Centred(double inverse) {
    // float32 may hold it with few bits or not at all. Rows of fp16 are not so long.
    const bool tiny = !std::is_same_v<T, __half> && inverse < 0x1p-60;
    const double factor = inverse * (tiny ? kUnitScale * 0x1p100 : kUnitScale);
    high_ = static_cast<float>(factor);
    low_ = static_cast<float>(factor - high_);
    of_centre_ = tiny ? -kUnitScale * 0x1p100f : -kUnitScale;
    power_ = tiny ? 0x1p-100f : 1.0f;
  }
  __device__ __forceinline__ float operator()(float x, float centre) const {
    return fmaf(x, low_, fmaf(x, high_, centre * of_centre_)) * power_;
  }

 private:
  float high_, low_, of_centre_, power_;
};

// Adds an octet's squares and, with a centre, <x, centre> and <centre, centre>.
template <class T, int kSums>
__device__ __forceinline__ void add_octet(const T (&raw)[kOctet], const float (&centre)[kOctet],
                                          double (&sums)[kSums]) {
#pragma unroll
  for (int k = 0; k < kOctet; ++k) {
    const double x = as_float(raw[k]);
    sums[0] += x * x;
    if constexpr (kSums == 3) {
      const double c = centre[k];
      sums[1] += x * c;
      sums[2] += c * c;
    }
  }
}

template <class T>
__device__ __forceinline__ void store_features(T* row, int64_t first, const float (&x)[kOctet], int64_t d) {
  store_floats(row + first, x, d - first, is_aligned(row));
}

// What follows the features in a message's row: zeros, and the bias in the last two columns.
template <bool kWide>
__device__ __forceinline__ void end_message(const Normalize& p, const Team<kWide>& team, __half* sent, float bias) {
  const int64_t end = p.sent_columns - kBiasColumns;
  for (int64_t k = p.d + team.thread; k < end; k += team.threads) sent[k] = from_float<__half>(0.0f);
  if (team.thread == 0) *reinterpret_cast<float*>(sent + end) = bias;
}

// Blocks that a multiprocessor has registers for, at least, so that many rows are on their way together.
template <class T, bool kWide>
constexpr int kBlocks = kWide ? (sizeof(T) == 4 ? 5 : 7) : 12;

template <class T, bool kWide, bool kCentred>
__global__ void __launch_bounds__(Team<kWide>::kMostThreads, kBlocks<T, kWide>) normalize_kernel(const Normalize p) {
  follow_earlier_kernels();
  using Read = std::conditional_t<kCentred, __half, float>;
  const Team<kWide> team;
  if (team.row >= p.m) return;
  const Row<T> row(p.x, team.row);
  T x[Team<kWide>::kOctetsHeld][kOctet];
  const auto load = [&](int64_t from) {
    team.for_octets(from, p.d, [&](int o, int64_t first) { row.load(x[o], first, p.d); });
  };
  double sums[kCentred ? 3 : 1] = {};
  team.for_turns(p.d, [&](int64_t from) {
    load(from);
    team.for_octets(from, p.d, [&](int o, int64_t first) {
      float centre[kOctet];
      if constexpr (kCentred) load_floats(centre, p.centre, first, p.d);
      add_octet(x[o], centre, sums);
    });
  });
  team.sum(sums);
  // One root for both, which is infinite where the sum is 0, and 0 where the sum is infinite.
  const double root = inverse_sqrt(sums[0]);
  const double norm = sums[0] > 0.0 && root > 0.0 ? sums[0] * root : sums[0];
  const double inverse = norm <= kNormFloor ? 1.0 / kNormFloor : root;
  if (team.thread == 0) p.norm[team.row] = norm;
  __half* sent = nullptr;
  if constexpr (kCentred) {
    const double along = sums[1] * inverse;
    const auto bias = static_cast<float>((along - sums[2]) * (kUnitScale * kUnitScale));
    if (team.thread == 0) {
      p.bias[team.row] = bias;
      store_power(p.row, team.row, along * p.scale);
    }
    if (team.row < p.sent_rows) {
      sent = static_cast<__half*>(p.sent) + team.row * p.sent_columns;
      end_message(p, team, sent, bias);
    }
  } else if (!p.read) {
    return;
  }
  Read* const read = static_cast<Read*>(p.read) + team.row * p.d;
  const Centred<T> centred(inverse);
  team.for_turns(p.d, [&](int64_t from) {
    if (team.is_beyond_a_turn(p.d)) load(from);
    team.for_octets(from, p.d, [&](int o, int64_t first) {
      float out[kOctet];
      if constexpr (kCentred) load_floats(out, p.centre, first, p.d);
#pragma unroll
      for (int k = 0; k < kOctet; ++k) {
        const float value = as_float(x[o][k]);
        out[k] = kCentred ? centred(value, out[k]) : static_cast<float>(value * inverse);
      }
      store_features(read, first, out, p.d);
      if (kCentred && sent) store_features(sent, first, out, p.d);
    });
  });
}

template <bool kWide>
__global__ void __launch_bounds__(Team<kWide>::kMostThreads) centre_potential_kernel(const CentrePotential p) {
  follow_earlier_kernels();
  const Team<kWide> team;
  if (team.row >= p.m) return;
  double dot[1] = {};
  team.for_turns(p.d, [&](int64_t from) {
    team.for_octets(from, p.d, [&](int, int64_t first) {
      float x[kOctet], centre[kOctet];
      load_floats(x, p.read + team.row * p.d, first, p.d);
      load_floats(centre, p.centre, first, p.d);
#pragma unroll
      for (int k = 0; k < kOctet; ++k) dot[0] += static_cast<double>(x[k]) * centre[k];
    });
  });
  team.sum(dot);
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
__global__ void __launch_bounds__(Team<kWide>::kMostThreads, kBlocks<T, kWide>) project_kernel(const Project p) {
  follow_earlier_kernels();
  using Mine = Team<kWide>;
  const Mine team;
  if (team.row >= p.m) return;
  const Row<T> row(p.x, team.row);
  float* d = p.d + team.row * p.d_features;
  const double norm = p.norm[team.row];
  T x[Mine::kOctetsHeld][kOctet];
  float given[Mine::kOctetsHeld][kOctet];
  const auto load = [&](int64_t from) {
    team.for_octets(from, p.d_features, [&](int o, int64_t first) {
      row.load(x[o], first, p.d_features);
      load_floats(given[o], d, first, p.d_features);
    });
  };
  load(0);  // before the norm is used, so that they come together
  const double inverse = norm < kNormFloor ? 0.0 : 1.0 / norm;
  const Factor to_unit(inverse), factor(inverse * p.factor);
  const auto unit = [&](int o, int k) { return to_unit * as_float(x[o][k]); };
  double dot[1] = {};
  team.for_turns(p.d_features, [&](int64_t from) {
    if (from > 0) load(from);
    float held = 0.0f;
    team.for_octets(from, p.d_features, [&](int o, int64_t) {
#pragma unroll
      for (int k = 0; k < kOctet; ++k) held += given[o][k] * unit(o, k);
    });
    dot[0] += held;
  });
  team.sum(dot);
  const auto along = static_cast<float>(dot[0]);
  team.for_turns(p.d_features, [&](int64_t from) {
    if (team.is_beyond_a_turn(p.d_features)) load(from);
    team.for_octets(from, p.d_features, [&](int o, int64_t first) {
#pragma unroll
      for (int k = 0; k < kOctet; ++k) given[o][k] = factor * (given[o][k] - along * unit(o, k));
      store_octet(d + first, given[o], p.d_features - first, is_aligned(d));
    });
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
  const auto kernel = [&](auto wide, auto centred) {
    constexpr bool kWide = decltype(wide)::value, kCentred = decltype(centred)::value;
    return of_type<Normalize>(p.x.type, normalize_kernel<float, kWide, kCentred>,
                              normalize_kernel<__half, kWide, kCentred>,
                              normalize_kernel<__nv_bfloat16, kWide, kCentred>);
  };
  const auto start = [&](auto centred) {
    launch_rows("normalize_kernel", kernel(std::false_type(), centred), kernel(std::true_type(), centred), p.m, p.d,
                where, p);
  };
  if (p.centre) start(std::true_type());
  else start(std::false_type());
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
