// The fused row kernel. rows_<isa>.cpp include this file after vec.h. KDKERNELS_ENTRY names the entry point.
//
// A row is read once, in blocks that fit L1. Each block is converted to fp32, the contrast is formed, the running maxima are updated,
// and the exponentials are taken relative to them. Each thread keeps its exponentials (fp32, in L2) and the maxima that each block
// used. So the gradient pass needs multiply-adds only, and no second exponential: q = e_s * exp(M_block - M) / S.
//
// Notation: s student, a audio, t text, z contrast, all divided by tau; M running maximum, S sum of exponentials.

#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

#include "parallel.h"
#include "row_problem.h"

namespace kdkernels {
namespace {

constexpr int BLOCK = 1024;
// Every running maximum starts here. It is finite, so differences of maxima never give inf - inf. A logit below it has
// probability 0 in any row with a logit above it.
constexpr float FLOOR = -1e30f;
constexpr float NEG_INF = -std::numeric_limits<float>::infinity();
constexpr float NOT_A_NUMBER = std::numeric_limits<float>::quiet_NaN();

struct RowPointer {
  const char* data;
  DType dtype;
};

RowPointer row_of(const RowTensor& t, std::int64_t row, std::int64_t inner) {
  std::int64_t offset = (row / inner) * t.stride_outer + (row % inner) * t.stride_inner;
  std::int64_t item = t.dtype == DType::f32 ? 4 : 2;
  return {reinterpret_cast<const char*>(t.data) + offset * item, t.dtype};
}

// Loads items [start, start + n) as fp32. The rest of the last vector becomes `fill`.
void load_block(RowPointer row, std::int64_t start, int n, float fill, float* out) {
  if (row.dtype == DType::f32) {
    std::memcpy(out, row.data + start * 4, std::size_t(n) * 4);
  } else {
    auto source = reinterpret_cast<const std::uint16_t*>(row.data) + start;
    int whole = n / W * W;
    bool bf16 = row.dtype == DType::bf16;
    for (int i = 0; i < whole; i += W) store(out + i, bf16 ? from_bf16(load16(source + i)) : from_f16(load16(source + i)));
    if (whole < n) {
      std::uint16_t tail[W] = {};
      std::memcpy(tail, source + whole, std::size_t(n - whole) * 2);
      store(out + whole, bf16 ? from_bf16(load16(tail)) : from_f16(load16(tail)));
    }
  }
  for (int i = n; i % W != 0; ++i) out[i] = fill;
}

void store_block(RowPointer row, std::int64_t start, int n, const float* in) {
  char* data = const_cast<char*>(row.data);
  if (row.dtype == DType::f32) {
    std::memcpy(data + start * 4, in, std::size_t(n) * 4);
    return;
  }
  auto target = reinterpret_cast<std::uint16_t*>(data) + start;
  int whole = n / W * W;
  bool bf16 = row.dtype == DType::bf16;
  for (int i = 0; i < whole; i += W) store16(target + i, bf16 ? to_bf16(load(in + i)) : to_f16(load(in + i)));
  if (whole < n) {
    std::uint16_t tail[W];
    store16(tail, bf16 ? to_bf16(load(in + whole)) : to_f16(load(in + whole)));
    std::memcpy(target + whole, tail, std::size_t(n - whole) * 2);
  }
}

// One vector of logits of a known dtype, as fp32.
template <DType D>
inline vf load_as(const char* row, std::int64_t i) {
  if constexpr (D == DType::f32) return load(reinterpret_cast<const float*>(row) + i);
  vh half = load16(reinterpret_cast<const std::uint16_t*>(row) + i);
  return D == DType::bf16 ? from_bf16(half) : from_f16(half);
}

template <DType D>
inline void store_as(char* row, std::int64_t i, vf x) {
  if constexpr (D == DType::f32) {
    store(reinterpret_cast<float*>(row) + i, x);
  } else {
    store16(reinterpret_cast<std::uint16_t*>(row) + i, D == DType::bf16 ? to_bf16(x) : to_f16(x));
  }
}

// A logit below FLOOR, as libraries write masks, counts as -inf. Left finite, it could make a contrast +inf or NaN. NaN passes.
inline vf masked(vf x) { return x < splat(FLOOR) ? splat(NEG_INF) : x; }

// The three sweeps below take whole blocks of plain logits (no softcap, no scale). They do what Worker does step by step.

// out = s * inverse_tau; returns the maximum
template <DType D>
float read_student(const char* student, float inverse_tau, float* out) {
  vf m0 = splat(NEG_INF), m1 = m0;
  for (int i = 0; i < BLOCK; i += 2 * W) {
    vf x0 = masked(load_as<D>(student, i)) * inverse_tau, x1 = masked(load_as<D>(student, i + W)) * inverse_tau;
    store(out + i, x0);
    store(out + i + W, x1);
    m0 = vmax(x0, m0);
    m1 = vmax(x1, m1);
  }
  return hmax(vmax(m0, m1));
}

// out = (a + alpha (a - t)) * inverse_tau, -inf where either is; returns the maximum
template <DType D>
float read_contrast(const char* audio, const char* text, float alpha, float inverse_tau, float* out) {
  const vf none = splat(NEG_INF);
  vf m = none;
  for (int i = 0; i < BLOCK; i += W) {
    vf a = masked(load_as<D>(audio, i)), t = masked(load_as<D>(text, i));
    vf z = (a + alpha * (a - t)) * inverse_tau;
    vi hidden = (a == none) | (t == none);
    z = hidden ? none : z;
    store(out + i, z);
    m = vmax(z, m);
  }
  return hmax(m);
}

// grad = e_s student_factor - e_z teacher_factor (+ e_s^2 square_factor)
template <DType D, bool SQUARE>
void write_gradient(const float* es, const float* ez, float student_factor, float teacher_factor, float square_factor, char* grad) {
  for (int i = 0; i < BLOCK; i += W) {
    vf e = load(es + i);
    vf g = e * student_factor - load(ez + i) * teacher_factor;
    if constexpr (SQUARE) g += e * e * square_factor;
    store_as<D>(grad, i, g);
  }
}

using ReadStudent = float (*)(const char*, float, float*);
using ReadContrast = float (*)(const char*, const char*, float, float, float*);
using WriteGradient = void (*)(const float*, const float*, float, float, float, char*);

ReadStudent pick_read_student(DType d) {
  return d == DType::f32 ? read_student<DType::f32> : d == DType::bf16 ? read_student<DType::bf16> : read_student<DType::f16>;
}

ReadContrast pick_read_contrast(DType d) {
  return d == DType::f32 ? read_contrast<DType::f32> : d == DType::bf16 ? read_contrast<DType::bf16> : read_contrast<DType::f16>;
}

WriteGradient pick_write_gradient(DType d, bool square) {
  if (d == DType::f32) return square ? write_gradient<DType::f32, true> : write_gradient<DType::f32, false>;
  if (d == DType::bf16) return square ? write_gradient<DType::bf16, true> : write_gradient<DType::bf16, false>;
  return square ? write_gradient<DType::f16, true> : write_gradient<DType::f16, false>;
}

// l -> softcap * tanh(scale * l / softcap), or scale * l
void transform_block(float* x, int n, float scale, float softcap) {
  if (softcap > 0.f) {
    for (int i = 0; i < n; i += W) store(x + i, splat(softcap) * vtanh(load(x + i) * splat(scale / softcap)));
  } else if (scale != 1.f) {
    for (int i = 0; i < n; i += W) store(x + i, load(x + i) * splat(scale));
  }
}

// What a kernel computes with: transformed, and masked.
void logits_of(float* x, int n, float scale, float softcap) {
  transform_block(x, n, scale, softcap);
  for (int i = 0; i < n; i += W) store(x + i, masked(load(x + i)));
}

void scale_block(float* x, int n, float factor) {
  if (factor == 1.f) return;
  for (int i = 0; i < n; i += W) store(x + i, load(x + i) * splat(factor));
}

float block_max(const float* x, int n) {
  vf m0 = splat(NEG_INF), m1 = m0;
  int i = 0;
  for (; i + 2 * W <= n; i += 2 * W) {
    m0 = vmax(load(x + i), m0);
    m1 = vmax(load(x + i + W), m1);
  }
  for (; i < n; i += W) m0 = vmax(load(x + i), m0);
  return hmax(vmax(m0, m1));
}

// Which sums a pass over a pair (s, z) takes.
enum class Cross { none, of_z, of_s };     // sum e_z ((z - Mz) - (s - Ms)), or sum e_s ((s - Ms) - (z - Mz))
enum class One { none, same, square, own };  // the sum at temperature 1: absent, tau = 1, tau = 2, any tau

struct PairSums {
  float Ms = FLOOR, Mz = FLOOR;
  double Ss = 0, S1 = 0, Sz = 0, cross = 0;
};

// Rescales the sums to new maxima. With `of_z`, cross = sum e_z (dz - ds), where ds and dz are relative to the maxima.
template <Cross CROSS>
void move_maxima(PairSums& p, float Ms, float Mz, float tau) {
  if (Ms == p.Ms && Mz == p.Mz) return;
  double step_s = double(p.Ms) - Ms, step_z = double(p.Mz) - Mz;
  double rs = std::exp(step_s), rz = std::exp(step_z);
  if constexpr (CROSS == Cross::of_z) {
    if (!std::isinf(p.cross)) p.cross = rz * (p.Sz == 0 ? 0 : p.cross + p.Sz * (step_z - step_s));
  } else if constexpr (CROSS == Cross::of_s) {
    if (!std::isinf(p.cross)) p.cross = rs * (p.Ss == 0 ? 0 : p.cross + p.Ss * (step_s - step_z));
  }
  p.Ss *= rs;
  p.S1 *= std::exp(step_s * tau);
  p.Sz *= rz;
  p.Ms = Ms;
  p.Mz = Mz;
}

// Adds one block; the caller gives its maxima. es receives e_s. ez receives e_z, or with of_s the difference ds - dz.
// e1 receives the exponentials at temperature 1.
template <Cross CROSS, One ONE, bool HAS_Z, bool STORE>
void add_block(PairSums& p, const float* s, const float* z, float max_s, float max_z, int n, float tau, float* es_out,
               float* ez_out, float* e1_out) {
  move_maxima<CROSS>(p, std::max(p.Ms, max_s), HAS_Z ? std::max(p.Mz, max_z) : p.Mz, tau);
  const vf Ms = splat(p.Ms), Mz = splat(p.Mz), vtau = splat(tau), zero = vf{};
  vf sum_s = zero, sum_1 = zero, sum_z = zero, sum_c = zero;
  for (int i = 0; i < n; i += W) {
    vf ds = load(s + i) - Ms;
    vf es = vexp(ds);
    sum_s += es;
    if constexpr (STORE) store(es_out + i, es);
    if constexpr (ONE == One::square) sum_1 += es * es;
    if constexpr (ONE == One::own) {
      vf e1 = vexp(ds * vtau);
      sum_1 += e1;
      if constexpr (STORE) store(e1_out + i, e1);
    }
    if constexpr (HAS_Z) {
      vf dz = load(z + i) - Mz;
      vf ez = vexp(dz);
      sum_z += ez;
      if constexpr (CROSS == Cross::of_z) {
        vf term = ez * (dz - ds);
        sum_c += ez > zero ? term : zero;  // 0 log 0 = 0
      }
      if constexpr (CROSS == Cross::of_s) {
        vf difference = ds - dz;
        vf term = es * difference;
        sum_c += es > zero ? term : zero;
        if constexpr (STORE) store(ez_out + i, difference);
      } else if constexpr (STORE) {
        store(ez_out + i, ez);
      }
    }
  }
  p.Ss += hsum(sum_s);
  if constexpr (ONE == One::same) p.S1 = p.Ss;
  if constexpr (ONE == One::square || ONE == One::own) p.S1 += hsum(sum_1);
  if constexpr (HAS_Z) p.Sz += hsum(sum_z);
  if constexpr (CROSS != Cross::none) p.cross += hsum(sum_c);
}

using AddBlock = void (*)(PairSums&, const float*, const float*, float, float, int, float, float*, float*, float*);

template <Cross CROSS, bool HAS_Z, bool STORE>
AddBlock pick_one(One one) {
  switch (one) {
    case One::none: return add_block<CROSS, One::none, HAS_Z, STORE>;
    case One::same: return add_block<CROSS, One::same, HAS_Z, STORE>;
    case One::square: return add_block<CROSS, One::square, HAS_Z, STORE>;
    default: return add_block<CROSS, One::own, HAS_Z, STORE>;
  }
}

template <bool STORE>
AddBlock pick(Cross cross, One one, bool has_z) {
  if (!has_z) return pick_one<Cross::none, false, STORE>(one);
  switch (cross) {
    case Cross::of_z: return pick_one<Cross::of_z, true, STORE>(one);
    case Cross::of_s: return pick_one<Cross::of_s, true, STORE>(one);
    default: return pick_one<Cross::none, true, STORE>(one);
  }
}

// log(x / m) where x / m = 1 + change: near 1 from the change, which is exact there; far below 1 from the ratio itself.
inline vf log_ratio(vf x, vf m, vf change) {
  vf ratio = x / m;
  vf smallest = splat(std::numeric_limits<float>::min());
  vf direct = vlog(ratio < smallest ? smallest : ratio);
  return ratio < splat(0.5f) ? direct : vlog1p(change);
}

// log(p / m) and log(q / m) with m = beta p + (1 - beta) q.
inline void jsd_logs(vf p, vf q, float beta, vf& log_p, vf& log_q) {
  const vf of_p = splat(beta), of_q = splat(1.f - beta);
  vf m = of_p * p + of_q * q, gap = q - p;
  m = m <= vf{} ? splat(1.f) : m;  // also where the smallest p or q times its weight is 0
  log_q = log_ratio(q, m, of_p * gap / m);
  log_p = log_ratio(p, m, -(of_q * gap) / m);
}

// The teacher's side of a row: z_ holds the contrast, divided by tau, one block at a time.
class TeacherRow {
 protected:
  explicit TeacherRow(const RowProblem& problem) : P(problem) {
    blocks_ = (P.vocab + BLOCK - 1) / BLOCK;
    read_plain_teacher_ = P.teacher_softcap == 0.f && P.teacher_scale == 1.f && !P.has_plausibility &&
                          (!P.text.data || P.text.dtype == P.audio.dtype);
    read_audio_ = pick_read_student(P.audio.dtype);
    read_contrast_ = pick_read_contrast(P.audio.dtype);
  }

  const RowProblem& P;
  ReadStudent read_audio_;
  ReadContrast read_contrast_;
  bool read_plain_teacher_;
  std::int64_t blocks_;
  RowPointer audio_{}, text_{};
  float alpha_ = 0.f, threshold_ = 0.f;
  bool use_text_ = false;
  alignas(64) float z_[BLOCK], a_[BLOCK], t_[BLOCK];

  // Moves to row r. The teacher's logits are not read when no term needs them. `audio_max` is the largest audio logit, if known.
  void open_teacher(std::int64_t r, bool wanted, const float* audio_max = nullptr) {
    if (wanted) audio_ = row_of(P.audio, r, P.inner);
    float alpha = P.text.data ? reinterpret_cast<const float*>(P.alpha)[r * P.alpha_stride] : 0.f;
    if (!(alpha >= 0.f) || std::isinf(alpha)) alpha = NOT_A_NUMBER;
    use_text_ = wanted && P.text.data && alpha != 0.f;
    alpha_ = alpha;
    if (P.text.data) text_ = row_of(P.text, r, P.inner);
    threshold_ = NEG_INF;
    if (wanted && P.has_plausibility) threshold_ = (audio_max ? *audio_max : largest_audio()) + P.log_plausibility;
  }

  // Fills z_ and pads it with -inf to a whole vector; returns its maximum.
  float read_teacher_block(std::int64_t b) {
    if (width(b) == BLOCK && read_plain_teacher_)
      return use_text_ ? read_contrast_(at(audio_, b), at(text_, b), alpha_, 1.f / P.temperature, z_)
                       : read_audio_(at(audio_, b), 1.f / P.temperature, z_);
    load_contrast(b);
    return block_max(z_, padded(b));
  }

  // The b-th block of a row.
  static const char* at(RowPointer row, std::int64_t b) { return row.data + b * BLOCK * (row.dtype == DType::f32 ? 4 : 2); }

  int width(std::int64_t b) const { return int(std::min<std::int64_t>(BLOCK, P.vocab - b * BLOCK)); }
  int padded(std::int64_t b) const { return (width(b) + W - 1) / W * W; }

  int load_audio(std::int64_t b) {
    int n = width(b), padded = (n + W - 1) / W * W;
    load_block(audio_, b * BLOCK, n, NEG_INF, a_);
    logits_of(a_, padded, P.teacher_scale, P.teacher_softcap);
    for (int i = n; i < padded; ++i) a_[i] = NEG_INF;
    return padded;
  }

  int load_text(std::int64_t b) {
    int n = width(b), padded = (n + W - 1) / W * W;
    load_block(text_, b * BLOCK, n, NEG_INF, t_);
    logits_of(t_, padded, P.teacher_scale, P.teacher_softcap);
    for (int i = n; i < padded; ++i) t_[i] = NEG_INF;
    return padded;
  }

  // z_ = contrast / tau; a_ (and t_) keep the paths' own logits
  void load_contrast(std::int64_t b) {
    int n = load_audio(b);
    const vf inverse_tau = splat(1.f / P.temperature), none = splat(NEG_INF);
    if (use_text_) {
      load_text(b);
      const vf alpha = splat(alpha_);
      for (int i = 0; i < n; i += W) {
        vf a = load(a_ + i), t = load(t_ + i);
        vf z = (a + alpha * (a - t)) * inverse_tau;
        vi hidden = (a == none) | (t == none);
        store(z_ + i, hidden ? none : z);
      }
    } else {
      for (int i = 0; i < n; i += W) store(z_ + i, load(a_ + i) * inverse_tau);
    }
    if (P.has_plausibility) {
      for (int i = 0; i < n; i += W) {
        vf z = load(z_ + i);
        store(z_ + i, load(a_ + i) < splat(threshold_) ? none : z);
      }
    }
  }

  float largest_audio() {
    float best = NEG_INF;
    for (std::int64_t b = 0; b < blocks_; ++b) {
      int n = load_audio(b);
      best = std::max(best, block_max(a_, n));
    }
    return best;
  }
};

// Both sides of a row: s_ holds the student's logits, divided by tau, one block at a time.
class PairRow : protected TeacherRow {
 protected:
  PairRow(const RowProblem& problem, bool want_stats) : TeacherRow(problem) {
    want_stats_ = want_stats;
    read_teacher_ = P.with_kd || want_stats_;
    jsd_ = P.divergence == Divergence::jsd;
    cross_ = !P.with_kd ? Cross::none : jsd_ ? Cross::none : P.divergence == Divergence::forward_kl ? Cross::of_z : Cross::of_s;
    one_ = !P.with_ce                ? One::none
           : P.temperature == 1.f ? One::same
           : P.temperature == 2.f ? One::square
                                  : One::own;
    read_student_ = P.student_softcap == 0.f && P.student_scale == 1.f ? pick_read_student(P.student.dtype) : nullptr;
  }

  bool want_stats_, read_teacher_, jsd_;
  Cross cross_;
  One one_;
  ReadStudent read_student_;  // null where the student's logits are not plain
  RowPointer student_{};
  alignas(64) float s_[BLOCK], g_[BLOCK];

  // Fills s_, padded with -inf to a whole vector; returns its maximum.
  float read_student_block(std::int64_t b) {
    if (width(b) == BLOCK && read_student_) return read_student_(at(student_, b), 1.f / P.temperature, s_);
    return block_max(s_, load_student(b));
  }

  // s_ = logits / tau, padded with -inf to a whole vector; returns the padded length
  int load_student(std::int64_t b) {
    int n = width(b);
    load_block(student_, b * BLOCK, n, NEG_INF, s_);
    int padded = (n + W - 1) / W * W;
    logits_of(s_, padded, P.student_scale, P.student_softcap);
    for (int i = n; i < padded; ++i) s_[i] = NEG_INF;  // a softcap makes -inf finite
    scale_block(s_, padded, 1.f / P.temperature);
    return padded;
  }

  float student_logit(std::int64_t v) {
    load_block(student_, v, 1, NEG_INF, g_);
    logits_of(g_, W, P.student_scale, P.student_softcap);
    return g_[0];
  }

  void zero_gradient(std::int64_t r, std::int64_t from) {
    if (!P.grad.data) return;
    RowPointer out = row_of(P.grad, r, P.inner);
    std::int64_t item = out.dtype == DType::f32 ? 4 : 2;
    std::memset(const_cast<char*>(out.data) + from * item, 0, std::size_t((P.student_width - from) * item));
  }

  struct Moments {
    double of_s = 0, of_z = 0;               // sum e_s (s - Ms), sum e_z (z - Mz)
    std::int64_t top_s = -1, top_z = -1;     // the first columns of the maxima
    PairSums paths;                          // (s, z) := (text, audio): cross gives KL(audio || text)
  };

  // This is off the hot path, so it reads the row again.
  Moments moments(const PairSums& p) {
    Moments m;
    const vf Ms = splat(p.Ms), Mz = splat(p.Mz), zero = vf{};
    for (std::int64_t b = 0; b < blocks_; ++b) {
      int n = load_student(b);
      load_contrast(b);
      vf sum_s = zero, sum_z = zero;
      for (int i = 0; i < n; i += W) {
        vf ds = load(s_ + i) - Ms, dz = load(z_ + i) - Mz;
        vf es = vexp(ds), ez = vexp(dz);
        vf hs = es * ds, hz = ez * dz;
        sum_s += es > zero ? hs : zero;
        sum_z += ez > zero ? hz : zero;
      }
      m.of_s += hsum(sum_s);
      m.of_z += hsum(sum_z);
      for (int i = 0; i < width(b) && (m.top_s < 0 || m.top_z < 0); ++i) {
        if (m.top_s < 0 && s_[i] == p.Ms) m.top_s = b * BLOCK + i;
        if (m.top_z < 0 && z_[i] == p.Mz) m.top_z = b * BLOCK + i;
      }
      if (P.text.data) {
        if (!use_text_) load_text(b);
        scale_block(a_, n, 1.f / P.temperature);
        scale_block(t_, n, 1.f / P.temperature);
        add_block<Cross::of_z, One::none, true, false>(m.paths, t_, a_, block_max(t_, n), block_max(a_, n), n, 1.f, nullptr, nullptr,
                                                       nullptr);
      }
    }
    return m;
  }
};

class Worker : PairRow {
 public:
  explicit Worker(const RowProblem& problem) : PairRow(problem, problem.stats != 0) {
    want_grad_ = P.grad.data != 0;
    store_ = want_grad_ || (jsd_ && P.with_kd);
    add_ = store_ ? pick<true>(cross_, one_, read_teacher_) : pick<false>(cross_, one_, read_teacher_);
    const bool forward = P.with_kd && P.divergence == Divergence::forward_kl;
    write_gradient_ = read_student_ && forward && one_ != One::own ? pick_write_gradient(P.grad.dtype, one_ == One::square) : nullptr;
    if (store_) {
      std::size_t padded = std::size_t(blocks_) * BLOCK;
      es_.resize(padded);
      if (read_teacher_) ez_.resize(padded);
      if (one_ == One::own) e1_.resize(padded);
      used_Ms_.resize(std::size_t(blocks_));
      used_Mz_.resize(std::size_t(blocks_));
    }
  }

  void row(std::int64_t r) {
    const auto* targets = reinterpret_cast<const std::int64_t*>(P.target);
    std::int64_t y = targets ? targets[r] : -1;
    if (targets && y == P.ignore_index) {
      write(r, 0.f, 0.f);
      for (int k = 0; want_stats_ && k < 4; ++k) stat(k, r) = 0.f;
      zero_gradient(r, 0);
      return;
    }
    student_ = row_of(P.student, r, P.inner);
    open_teacher(r, read_teacher_);
    bool bad_target = targets && (y < 0 || y >= P.vocab);

    PairSums p;
    for (std::int64_t b = 0; b < blocks_; ++b) {
      const float max_s = read_student_block(b), max_z = read_teacher_ ? read_teacher_block(b) : NEG_INF;
      float* es = store_ ? es_.data() + b * BLOCK : nullptr;
      float* ez = store_ && read_teacher_ ? ez_.data() + b * BLOCK : nullptr;
      float* e1 = store_ && one_ == One::own ? e1_.data() + b * BLOCK : nullptr;
      add_(p, s_, z_, max_s, max_z, padded(b), P.temperature, es, ez, e1);
      if (store_) {
        used_Ms_[std::size_t(b)] = p.Ms;
        used_Mz_[std::size_t(b)] = p.Mz;
      }
    }

    float tau = P.temperature;
    bool no_teacher = p.Sz == 0;  // every token masked: there is nothing to learn from
    double raw_kd = 0;            // D(p, q), without tau^2
    if (P.with_kd && !no_teacher) {
      if (jsd_) {
        raw_kd = jsd_pass(p);
      } else if (P.divergence == Divergence::forward_kl) {
        raw_kd = p.Ss == 0 || std::isinf(p.cross) ? HUGE_VAL : p.cross / p.Sz - std::log(p.Sz) + std::log(p.Ss);
      } else {
        raw_kd = p.Ss == 0 ? 0 : std::isinf(p.cross) ? HUGE_VAL : p.cross / p.Ss - std::log(p.Ss) + std::log(p.Sz);
      }
      if (raw_kd < 0) raw_kd = 0;  // rounding; NaN passes
    }
    double ce = 0;
    float s_y = 0.f;
    if (P.with_ce) {
      s_y = bad_target ? NOT_A_NUMBER : student_logit(y);
      // Scaled as the row was. So the maximum cancels exactly when the label has the maximum.
      double below_max = double(p.Ms) - s_y * (1.f / tau);
      ce = s_y == NEG_INF ? HUGE_VAL : std::log(p.S1) + below_max * tau;
      if (ce < 0) ce = 0;
    }
    write(r, float(double(tau) * tau * raw_kd), float(ce));
    if (want_stats_) statistics(r, p);
    if (want_grad_) gradient(r, p, raw_kd, no_teacher, y, s_y, bad_target);
  }

 private:
  bool want_grad_, store_;
  AddBlock add_;
  WriteGradient write_gradient_;  // null if there is no short way
  std::vector<float> es_, ez_, e1_, used_Ms_, used_Mz_;

  float& stat(int k, std::int64_t r) { return reinterpret_cast<float*>(P.stats)[k * P.outer * P.inner + r]; }

  void write(std::int64_t r, float kd, float ce) {
    reinterpret_cast<float*>(P.kd)[r] = kd;
    reinterpret_cast<float*>(P.ce)[r] = ce;
    if (!P.loss) return;
    auto term = [r](std::uintptr_t coefs, float value) {
      const float coef = reinterpret_cast<const float*>(coefs)[r];
      return coef == 0.f ? 0.f : coef * value;  // a factor of 0 silences a term even where that is infinite
    };
    // Each product is rounded, as in every other implementation: no fused multiply-add.
    const volatile float of_kd = term(P.kd_coef, kd), of_ce = term(P.ce_coef, ce);
    reinterpret_cast<float*>(P.loss)[r] = of_kd + of_ce;
  }

  // Second pass of the Jensen-Shannon divergence: m = b p + (1 - b) q; ez_ becomes log(q / m).
  double jsd_pass(const PairSums& p) {
    const float beta = P.jsd_beta;
    double total_p = 0, total_q = 0;
    const vf zero = vf{};
    for (std::int64_t b = 0; b < blocks_; ++b) {
      int n = (width(b) + W - 1) / W * W;
      float* es = es_.data() + b * BLOCK;
      float* ez = ez_.data() + b * BLOCK;
      vf fs = splat(rescale(used_Ms_[std::size_t(b)], p.Ms, p.Ss)), fz = splat(rescale(used_Mz_[std::size_t(b)], p.Mz, p.Sz));
      vf sum_p = zero, sum_q = zero;
      for (int i = 0; i < n; i += W) {
        vf q = load(es + i) * fs, pr = load(ez + i) * fz;
        vf log_p, log_q;
        jsd_logs(pr, q, beta, log_p, log_q);
        vf term_q = q * log_q, term_p = pr * log_p;
        // "not <= 0" rather than "> 0": NaN must stay in the sum.
        sum_q += q <= zero ? zero : term_q;
        sum_p += pr <= zero ? zero : term_p;
        store(ez + i, q <= zero ? zero : log_q);
      }
      total_q += hsum(sum_q);
      total_p += hsum(sum_p);
    }
    jsd_q_ = total_q;
    return double(beta) * total_p + double(1.f - beta) * total_q;
  }
  double jsd_q_ = 0;

  // e * rescale(...) = probability, for an e taken relative to the maximum `used`
  static float rescale(float used, float final, double sum) {
    return sum == 0 ? 0.f : float(std::exp(double(used) - final) / sum);
  }

  void gradient(std::int64_t r, const PairSums& p, double raw_kd, bool no_teacher, std::int64_t y, float s_y, bool bad_target) {
    const float tau = P.temperature;
    float c_kd = P.with_kd ? reinterpret_cast<const float*>(P.kd_coef)[r] : 0.f;
    float c_ce = P.with_ce ? reinterpret_cast<const float*>(P.ce_coef)[r] : 0.f;
    const bool infinite_kd = std::isinf(raw_kd);
    if (no_teacher || (infinite_kd && P.divergence != Divergence::forward_kl)) c_kd = 0.f;
    if (std::isnan(alpha_) && c_kd != 0.f) c_kd = NOT_A_NUMBER;
    if (bad_target && c_ce != 0.f) c_ce = NOT_A_NUMBER;
    const float k = c_kd * tau;
    // A masked student token gets no gradient. Only rows with an infinite loss could give it one, namely -p.
    const bool mask_student = infinite_kd;
    const bool softcap = P.student_softcap > 0.f;
    const float log_ratio = float(std::log(p.Sz) - std::log(p.Ss));
    RowPointer out = row_of(P.grad, r, P.inner);
    const vf zero = vf{};
    const bool short_way = write_gradient_ && !mask_student && c_kd != 0.f;
    // The factors change only where the running maxima changed, which is seldom.
    float used_s = NOT_A_NUMBER, used_z = NOT_A_NUMBER, fs = 0.f, fz = 0.f, f1 = 0.f;
    for (std::int64_t b = 0; b < blocks_; ++b) {
      int n = width(b), padded = (n + W - 1) / W * W;
      const float* es = es_.data() + b * BLOCK;
      const float* ez = read_teacher_ ? ez_.data() + b * BLOCK : nullptr;
      const float* e1 = one_ == One::own ? e1_.data() + b * BLOCK : nullptr;
      if (used_Ms_[std::size_t(b)] != used_s) {
        used_s = used_Ms_[std::size_t(b)];
        fs = rescale(used_s, p.Ms, p.Ss);
        f1 = one_ == One::none ? 0.f : one_ == One::same ? c_ce * fs : c_ce * rescale_one(used_s, p);
      }
      if (used_Mz_[std::size_t(b)] != used_z) {
        used_z = used_Mz_[std::size_t(b)];
        fz = rescale(used_z, p.Mz, p.Sz);
      }
      const std::int64_t local = y - b * BLOCK;
      const bool has_label = c_ce != 0.f && local >= 0 && local < n && s_y != NEG_INF;
      if (short_way && n == BLOCK) {
        const bool same = one_ == One::same;
        const float factor_s = k * fs + (same ? f1 : 0.f), factor_z = k * fz, factor_1 = same ? 0.f : f1;
        char* here = const_cast<char*>(at(out, b));
        write_gradient_(es, ez, factor_s, factor_z, factor_1, here);
        if (has_label) {  // the label's vector again: in fp32, less 1 there, rounded once
          const int start = int(local) / W * W;
          vf e = load(es + start);
          store(g_, e * factor_s - load(ez + start) * factor_z + e * e * factor_1);
          g_[local - start] -= c_ce;
          store_block(out, b * BLOCK + start, W, g_);
        }
        continue;
      }
      if (softcap || mask_student) load_student(b);  // before this block of a shared row is overwritten
      if (c_kd == 0.f) {
        for (int i = 0; i < padded; i += W) store(g_ + i, zero);
      } else if (P.divergence == Divergence::forward_kl) {
        const vf kq = splat(k * fs), kp = splat(k * fz);
        for (int i = 0; i < padded; i += W) store(g_ + i, load(es + i) * kq - load(ez + i) * kp);
      } else if (P.divergence == Divergence::reverse_kl) {
        // log(q / p) = (s - Ms) - (z - Mz) + log(Sz / Ss), with the maxima moved from the block's to the row's
        const vf kq = splat(k * fs);
        const vf shift = splat(float((double(used_s) - p.Ms) - (double(used_z) - p.Mz)) + log_ratio - float(raw_kd));
        for (int i = 0; i < padded; i += W) {
          vf e = load(es + i);
          vf g = e * kq * (load(ez + i) + shift);
          store(g_ + i, e == zero ? zero : g);
        }
      } else {
        const vf kq = splat(k * (1.f - P.jsd_beta) * fs), mean = splat(float(jsd_q_));
        for (int i = 0; i < padded; i += W) store(g_ + i, load(es + i) * kq * (load(ez + i) - mean));
      }
      if (c_ce != 0.f) {
        const vf factor = splat(f1);
        if (one_ == One::own) {
          for (int i = 0; i < padded; i += W) store(g_ + i, load(g_ + i) + load(e1 + i) * factor);
        } else if (one_ == One::square) {
          for (int i = 0; i < padded; i += W) {
            vf e = load(es + i);
            store(g_ + i, load(g_ + i) + e * e * factor);
          }
        } else {
          for (int i = 0; i < padded; i += W) store(g_ + i, load(g_ + i) + load(es + i) * factor);
        }
        if (has_label) g_[local] -= c_ce;
      }
      if (mask_student) {
        for (int i = 0; i < padded; i += W) {
          vf g = load(g_ + i);
          store(g_ + i, load(s_ + i) == splat(NEG_INF) ? zero : g);
        }
      }
      if (softcap) {  // d softcap tanh(x / softcap) / dx = 1 - (value / softcap)^2
        const vf back = splat(tau / P.student_softcap);
        for (int i = 0; i < padded; i += W) {
          vf ratio = load(s_ + i) * back;
          store(g_ + i, load(g_ + i) * (splat(1.f) - ratio * ratio));
        }
      }
      scale_block(g_, padded, P.student_scale);
      store_block(out, b * BLOCK, n, g_);
    }
    zero_gradient(r, P.vocab);
  }

  float rescale_one(float used, const PairSums& p) const {
    return p.S1 == 0 ? 0.f : float(std::exp((double(used) - p.Ms) * P.temperature) / p.S1);
  }

  void statistics(std::int64_t r, const PairSums& p) {
    const Moments m = moments(p);
    stat(0, r) = p.Ss == 0 ? 0.f : float(std::log(p.Ss) - m.of_s / p.Ss);
    stat(1, r) = p.Sz == 0 ? 0.f : float(std::log(p.Sz) - m.of_z / p.Sz);
    stat(2, r) = m.top_s == m.top_z ? 1.f : 0.f;
    double between = 0;
    const PairSums& paths = m.paths;
    if (P.text.data && paths.Sz != 0) {
      between = paths.Ss == 0 || std::isinf(paths.cross) ? HUGE_VAL : paths.cross / paths.Sz - std::log(paths.Sz) + std::log(paths.Ss);
      if (between < 0) between = 0;
    }
    stat(3, r) = float(between);
  }
};

}  // namespace

void KDKERNELS_ENTRY(const RowProblem& problem) {
  parallel_rows(problem.outer * problem.inner, problem.vocab, problem.threads, [&](auto&& next) {
    Worker worker(problem);
    for (std::int64_t r; (r = next()) >= 0;) worker.row(r);
  });
}

}  // namespace kdkernels
