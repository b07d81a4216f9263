// A student's row against a projected teacher (kdkernels/ops/projection.py). Included after rows.inl, whose reading of a student's
// row it shares; KDKERNELS_PROJECTED_ENTRY names the entry point.
//
// The teacher is known by its likeliest ids and by two numbers, so the row is the student's alone: one read, one write, and a
// few items that are written again.

namespace kdkernels {
namespace {

// grad = e_s student_factor (+ e_s^2 or e_1, times one_factor)
template <DType D, One ONE>
void write_student_gradient(const float* es, const float* e1, float student_factor, float one_factor, int n, char* grad) {
  for (int i = 0; i < n; i += W) {
    vf e = load(es + i);
    vf g = e * student_factor;
    if constexpr (ONE == One::square) g += e * e * one_factor;
    if constexpr (ONE == One::own) g += load(e1 + i) * one_factor;
    store_as<D>(grad, i, g);
  }
}

using WriteStudentGradient = void (*)(const float*, const float*, float, float, int, char*);

template <DType D>
WriteStudentGradient pick_write_student(One one) {
  if (one == One::square) return write_student_gradient<D, One::square>;
  if (one == One::own) return write_student_gradient<D, One::own>;
  return write_student_gradient<D, One::same>;
}

class ProjectedWorker : PairRow {
 public:
  explicit ProjectedWorker(const ProjectedProblem& problem) : PairRow(problem.source, problem.source.stats != 0), Q(problem) {
    store_ = P.grad.data != 0;
    add_ = store_ ? pick<true>(Cross::none, one_, false) : pick<false>(Cross::none, one_, false);
    const DType d = P.grad.dtype;
    write_ = d == DType::f32    ? pick_write_student<DType::f32>(one_)
             : d == DType::bf16 ? pick_write_student<DType::bf16>(one_)
                                : pick_write_student<DType::f16>(one_);
    if (store_) {
      const std::size_t padded = std::size_t(blocks_) * BLOCK;
      es_.resize(padded);
      if (one_ == One::own) e1_.resize(padded);
      used_.resize(std::size_t(blocks_));
    }
    top_.resize(std::size_t(Q.top_k));
  }

  void row(std::int64_t r) {
    const auto* targets = reinterpret_cast<const std::int64_t*>(P.target);
    const std::int64_t y = targets ? targets[r] : -1;
    if (targets && y == P.ignore_index) {
      write(r, 0.f, 0.f);
      for (int k = 0; want_stats_ && k < 2; ++k) stat(k, r) = 0.f;
      zero_gradient(r, 0);
      return;
    }
    student_ = row_of(P.student, r, P.inner);
    ids_ = reinterpret_cast<const std::int32_t*>(Q.ids) + r * Q.top_k;
    probabilities_ = reinterpret_cast<const float*>(Q.probabilities) + r * Q.top_k;
    const bool bad_target = targets && (y < 0 || y >= P.vocab);

    PairSums p;
    for (std::int64_t b = 0; b < blocks_; ++b) {
      const float maximum = read_student_block(b);
      add_(p, s_, nullptr, maximum, NEG_INF, padded(b), P.temperature, store_ ? es_.data() + b * BLOCK : nullptr, nullptr,
           store_ && one_ == One::own ? e1_.data() + b * BLOCK : nullptr);
      if (store_) used_[std::size_t(b)] = p.Ms;
    }
    const double kd = divergence(r, p);
    double ce = 0;
    float s_y = NEG_INF;  // divided by tau, like the row
    if (P.with_ce) {
      s_y = bad_target ? NOT_A_NUMBER : scaled_logit(y);
      ce = s_y == NEG_INF ? HUGE_VAL : std::log(p.S1) + (double(p.Ms) - s_y) * P.temperature;
      if (ce < 0) ce = 0;  // rounding; NaN passes
    }
    write(r, float(double(P.temperature) * P.temperature * kd), float(ce));
    if (want_stats_) statistics(r, p);
    if (store_) gradient(r, p, y, s_y, bad_target);
  }

 private:
  const ProjectedProblem& Q;
  bool store_;
  AddBlock add_;
  WriteStudentGradient write_;
  std::vector<float> es_, e1_, used_, top_;
  const std::int32_t* ids_ = nullptr;
  const float* probabilities_ = nullptr;

  float& stat(int k, std::int64_t r) { return reinterpret_cast<float*>(P.stats)[k * P.outer * P.inner + r]; }
  float mass(std::int64_t r) const { return reinterpret_cast<const float*>(Q.mass)[r]; }
  bool has(std::int64_t j) const { return ids_[j] >= 0 && ids_[j] < P.vocab && probabilities_[j] != 0.f; }

  void write(std::int64_t r, float kd, float ce) {
    reinterpret_cast<float*>(P.kd)[r] = kd;
    reinterpret_cast<float*>(P.ce)[r] = ce;
  }

  // One logit divided by tau, rounded as in a block.
  float scaled_logit(std::int64_t v) { return student_logit(v) * (1.f / P.temperature); }

  // kd / tau^2; top_ receives the logits of the likeliest ids, for the gradient may overwrite them.
  double divergence(std::int64_t r, const PairSums& p) {
    const double total = mass(r);
    if (!P.with_kd || total == 0) return 0;
    double seen = 0, cross = 0;  // of the likeliest ids: sum p, sum p (s / tau - M)
    bool infinite = p.Ss == 0;
    for (std::int64_t j = 0; j < Q.top_k; ++j) {
      if (!has(j)) continue;
      const float x = top_[std::size_t(j)] = scaled_logit(ids_[j]);
      infinite = infinite || x == NEG_INF;
      seen += probabilities_[j];
      cross += probabilities_[j] * (double(x) - p.Ms);
    }
    if (infinite) return HUGE_VAL;
    const double rest = reinterpret_cast<const double*>(Q.rest)[r];
    const double kd = total * std::log(p.Ss) + ((total - seen) * p.Ms + rest) - cross;
    return kd < 0 ? 0 : kd;  // rounding; NaN passes
  }

  void gradient(std::int64_t r, const PairSums& p, std::int64_t y, float s_y, bool bad_target) {
    const float scale = P.student_scale, tau = P.temperature;
    const float c_kd = P.with_kd ? reinterpret_cast<const float*>(P.kd_coef)[r] : 0.f;
    float c_ce = P.with_ce ? reinterpret_cast<const float*>(P.ce_coef)[r] : 0.f;
    if (c_kd == 0.f && c_ce == 0.f) {
      zero_gradient(r, 0);
      return;
    }
    if (bad_target && c_ce != 0.f) c_ce = NOT_A_NUMBER;
    const float k = c_kd * tau * scale, one = c_ce * scale, all = k * mass(r);
    const double inverse_s = p.Ss == 0 ? 0 : 1 / p.Ss, inverse_1 = p.S1 == 0 ? 0 : 1 / p.S1;
    RowPointer out = row_of(P.grad, r, P.inner);
    for (std::int64_t b = 0; b < blocks_; ++b) {
      const double below = double(used_[std::size_t(b)]) - p.Ms;
      float factor_s = float(all * std::exp(below) * inverse_s);
      const float factor_1 = one_ == One::none ? 0.f : float(one * std::exp(below * tau) * inverse_1);
      if (one_ == One::same) factor_s += factor_1;
      const float *es = es_.data() + b * BLOCK, *e1 = one_ == One::own ? e1_.data() + b * BLOCK : nullptr;
      char* here = const_cast<char*>(at(out, b));
      const int n = width(b);
      if (n % W == 0) {
        write_(es, e1, factor_s, factor_1, n, here);
        continue;
      }
      for (int i = 0; i < n; i += W) {
        vf e = load(es + i), g = e * factor_s;
        if (one_ == One::square) g += e * e * factor_1;
        if (one_ == One::own) g += load(e1 + i) * factor_1;
        store(g_ + i, g);
      }
      store_block(out, b * BLOCK, n, g_);
    }
    zero_gradient(r, P.vocab);
    // The likeliest ids and the label again: in one sum that is rounded once.
    bool label_written = c_ce == 0.f || s_y == NEG_INF || bad_target;
    for (std::int64_t j = 0; k != 0.f && j < Q.top_k; ++j) {
      if (!has(j)) continue;
      const bool label = ids_[j] == y && c_ce != 0.f;
      label_written = label_written || label;
      store_item(out, ids_[j], top_[std::size_t(j)], p, all * inverse_s, one * inverse_1, k * double(probabilities_[j]) + (label ? one : 0.f));
    }
    if (!label_written) store_item(out, y, s_y, p, all * inverse_s, one * inverse_1, one);
  }

  // At one id: q and q1 times their factors, less what the teacher and the label have there. A masked id keeps its 0.
  void store_item(RowPointer out, std::int64_t v, float x, const PairSums& p, double factor_s, double factor_1, double less) {
    if (x == NEG_INF) return;
    const double below = double(x) - p.Ms;
    double g = std::exp(below) * factor_s - less;
    if (one_ != One::none) g += std::exp(below * P.temperature) * factor_1;
    g_[0] = float(g);
    store_block(out, v, 1, g_);
  }

  // Entropy of q, and whether its likeliest id is the teacher's. Reads the row again.
  void statistics(std::int64_t r, const PairSums& p) {
    double sum = 0;
    std::int64_t top = -1;
    const vf M = splat(p.Ms), zero = vf{};
    for (std::int64_t b = 0; b < blocks_; ++b) {
      const int n = load_student(b);
      vf moment = zero;
      for (int i = 0; i < n; i += W) {
        vf d = load(s_ + i) - M, e = vexp(d), term = e * d;
        moment += e > zero ? term : zero;
      }
      sum += hsum(moment);
      for (int i = 0; top < 0 && i < width(b); ++i)
        if (s_[i] == p.Ms) top = b * BLOCK + i;
    }
    stat(0, r) = p.Ss == 0 ? 0.f : float(std::log(p.Ss) - sum / p.Ss);
    std::int64_t likeliest = -1;
    float best = 0.f;
    for (std::int64_t j = 0; j < Q.top_k; ++j) {
      if (has(j) && probabilities_[j] > best) {
        best = probabilities_[j];
        likeliest = ids_[j];
      }
    }
    stat(1, r) = top >= 0 && top == likeliest ? 1.f : 0.f;
  }
};

}  // namespace

void KDKERNELS_PROJECTED_ENTRY(const ProjectedProblem& problem) {
  const RowProblem& source = problem.source;
  parallel_rows(source.outer * source.inner, source.vocab, source.threads, [&](auto&& next) {
    ProjectedWorker worker(problem);
    for (std::int64_t r; (r = next()) >= 0;) worker.row(r);
  });
}

}  // namespace kdkernels
