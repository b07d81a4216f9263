// A row whose vocabulary is spread over ranks (kdkernels/ops/shards.py). Included after rows.inl, whose reading and sums it shares;
// KDKERNELS_SHARD_ENTRY names the entry point.
//
// What a rank computes of its slice before the exchange (sums) and after it (gradient) reads the slice twice and keeps nothing in
// between: the scratch is a block on the stack.

namespace kdkernels {
namespace {

// Of one row: see FACTORS in kdkernels/ops/shards.py.
struct ShardFactors {
  float Ms, Mz, tau, jsd_beta;
  float q_share, p_share, of_q, of_p, of_q1, of_label, centre;

  bool teaches() const { return of_q != 0.f || of_p != 0.f; }  // NaN teaches
};

// out = the gradient of one padded block, without its label.
template <Divergence KIND, One ONE>
void shard_gradient_block(const float* s, const float* z, int n, const ShardFactors& f, float* out) {
  const vf Ms = splat(f.Ms), Mz = splat(f.Mz), of_q = splat(f.of_q), of_p = splat(f.of_p), of_q1 = splat(f.of_q1);
  const vf centre = splat(f.centre), tau = splat(f.tau), zero = vf{};
  const bool teaches = f.teaches(), with_q1 = f.of_q1 != 0.f;
  for (int i = 0; i < n; i += W) {
    vf ds = load(s + i) - Ms, es = vexp(ds), g = zero;
    if (teaches) {
      vf dz = load(z + i) - Mz;
      if constexpr (KIND == Divergence::forward_kl) {
        g = es * of_q - vexp(dz) * of_p;
        g = ds == splat(NEG_INF) ? zero : g;  // a masked student token takes no gradient
      } else if constexpr (KIND == Divergence::reverse_kl) {
        g = es * of_q * ((ds - dz) + centre);
        g = es == zero ? zero : g;
      } else {
        vf q = es * splat(f.q_share), p = vexp(dz) * splat(f.p_share), log_p, log_q;
        jsd_logs(p, q, f.jsd_beta, log_p, log_q);
        g = es * of_q * (log_q - centre);
        g = q <= zero ? zero : g;
      }
    }
    if (with_q1) {
      if constexpr (ONE == One::same) g += es * of_q1;
      if constexpr (ONE == One::square) g += es * es * of_q1;
      if constexpr (ONE == One::own) g += vexp(ds * tau) * of_q1;
    }
    store(out + i, g);
  }
}

class ShardWorker : PairRow {
 public:
  explicit ShardWorker(const ShardProblem& problem)
      : PairRow(problem.source, problem.with_stats), S(problem), rows_(P.outer * P.inner) {
    add_ = pick<false>(cross_, one_, read_teacher_);
  }

  void row(std::int64_t r) {
    const auto* targets = reinterpret_cast<const std::int64_t*>(P.target);
    const bool ignored = targets && targets[r] == P.ignore_index;
    if (!ignored) {
      student_ = row_of(P.student, r, P.inner);
      const bool peak = S.part == ShardPart::audio_max;
      const float unknown = 0.f, *audio_max = S.audio_max ? reinterpret_cast<const float*>(S.audio_max) + r : nullptr;
      open_teacher(r, peak || read_teacher_, peak ? &unknown : audio_max);
      label_ = targets ? targets[r] - S.first : -1;
      if (label_ >= P.vocab) label_ = -1;
    }
    switch (S.part) {
      case ShardPart::audio_max: reinterpret_cast<float*>(S.out)[r] = ignored ? FLOOR : std::max(largest_audio(), FLOOR); return;
      case ShardPart::sums: return ignored ? no_sums(r) : sums(r);
      case ShardPart::jsd: return ignored ? write_jsd(r, 0, 0) : jsd(r);
      default: return ignored ? zero_gradient(r, 0) : gradient(r);
    }
  }

 private:
  const ShardProblem& S;
  const std::int64_t rows_;
  AddBlock add_;
  std::int64_t label_ = -1;  // its column of the slice; negative: it lies in another rank's

  double& sum(int k, std::int64_t r) { return reinterpret_cast<double*>(S.sums)[k * rows_ + r]; }
  float factor(int k, std::int64_t r) const { return reinterpret_cast<const float*>(S.factors)[k * rows_ + r]; }

  void no_sums(std::int64_t r) {
    for (int k = 0; k < (want_stats_ ? SHARD_SUMS + SHARD_STAT_SUMS : SHARD_SUMS); ++k) sum(k, r) = 0;
    sum(0, r) = sum(1, r) = FLOOR;
  }

  void sums(std::int64_t r) {
    PairSums p;
    for (std::int64_t b = 0; b < blocks_; ++b) {
      const float max_s = read_student_block(b), max_z = read_teacher_ ? read_teacher_block(b) : NEG_INF;
      add_(p, s_, z_, max_s, max_z, padded(b), P.temperature, nullptr, nullptr, nullptr);
    }
    const double label = label_ >= 0 && P.with_ce ? student_logit(label_) * (1.f / P.temperature) : 0.f;
    const double all[SHARD_SUMS] = {p.Ms, p.Mz, p.Ss, p.S1, p.Sz, p.cross, label};
    for (int k = 0; k < SHARD_SUMS; ++k) sum(k, r) = all[k];
    if (!want_stats_) return;
    const Moments m = moments(p);
    const auto top = [&](std::int64_t column) {  // of a slice without columns: none
      return P.vocab == 0 ? HUGE_VAL : double(S.first + std::max<std::int64_t>(column, 0));
    };
    const double more[SHARD_STAT_SUMS] = {m.of_s,     m.of_z,     top(m.top_s), top(m.top_z),  m.paths.Mz,
                                          m.paths.Ms, m.paths.Sz, m.paths.Ss,   m.paths.cross};
    for (int k = 0; k < SHARD_STAT_SUMS; ++k) sum(SHARD_SUMS + k, r) = more[k];
  }

  // `count`: how many of FACTORS there are.
  ShardFactors factors(std::int64_t r, int count) {
    ShardFactors f = {};
    f.Ms = float(sum(0, r)), f.Mz = float(sum(1, r)), f.tau = P.temperature, f.jsd_beta = P.jsd_beta;
    float* all[] = {&f.q_share, &f.p_share, &f.of_q, &f.of_p, &f.of_q1, &f.of_label, &f.centre};
    for (int k = 0; k < count; ++k) *all[k] = factor(k, r);
    return f;
  }

  void write_jsd(std::int64_t r, double p, double q) {
    double* out = reinterpret_cast<double*>(S.out);
    out[r] = p, out[rows_ + r] = q;
  }

  void jsd(std::int64_t r) {
    const ShardFactors f = factors(r, 2);
    const vf zero = vf{};
    double total_p = 0, total_q = 0;
    for (std::int64_t b = 0; b < blocks_; ++b) {
      read_student_block(b);
      read_teacher_block(b);
      vf sum_p = zero, sum_q = zero;
      for (int i = 0; i < padded(b); i += W) {
        vf q = vexp(load(s_ + i) - splat(f.Ms)) * splat(f.q_share), p = vexp(load(z_ + i) - splat(f.Mz)) * splat(f.p_share);
        vf log_p, log_q;
        jsd_logs(p, q, f.jsd_beta, log_p, log_q);
        vf term_p = p * log_p, term_q = q * log_q;
        sum_p += p <= zero ? zero : term_p;  // "not <= 0" rather than "> 0": NaN must stay in the sum
        sum_q += q <= zero ? zero : term_q;
      }
      total_p += hsum(sum_p);
      total_q += hsum(sum_q);
    }
    write_jsd(r, total_p, total_q);
  }

  template <Divergence KIND>
  void gradient_block(int n, const ShardFactors& f) {
    switch (one_) {
      case One::same: return shard_gradient_block<KIND, One::same>(s_, z_, n, f, g_);
      case One::square: return shard_gradient_block<KIND, One::square>(s_, z_, n, f, g_);
      default: return shard_gradient_block<KIND, One::own>(s_, z_, n, f, g_);
    }
  }

  void gradient(std::int64_t r) {
    const ShardFactors f = factors(r, SHARD_FACTORS);
    if (!f.teaches() && f.of_q1 == 0.f) {  // without a factor even NaN gives none
      zero_gradient(r, 0);
      return;
    }
    const bool label = label_ >= 0 && f.of_label != 0.f && student_logit(label_) != NEG_INF;
    RowPointer out = row_of(P.grad, r, P.inner);
    for (std::int64_t b = 0; b < blocks_; ++b) {
      const int n = padded(b);
      read_student_block(b);
      if (f.teaches()) read_teacher_block(b);
      switch (P.divergence) {
        case Divergence::forward_kl: gradient_block<Divergence::forward_kl>(n, f); break;
        case Divergence::reverse_kl: gradient_block<Divergence::reverse_kl>(n, f); break;
        default: gradient_block<Divergence::jsd>(n, f);
      }
      const std::int64_t local = label_ - b * BLOCK;
      if (label && local >= 0 && local < width(b)) g_[local] -= f.of_label;
      if (P.student_softcap > 0.f) {  // d softcap tanh(x / softcap) / dx = 1 - (value / softcap)^2
        const vf back = splat(P.temperature / P.student_softcap), zero = vf{};
        for (int i = 0; i < n; i += W) {
          vf ratio = load(s_ + i) * back, g = load(g_ + i), sloped = g * (splat(1.f) - ratio * ratio);
          store(g_ + i, g == zero ? zero : sloped);
        }
      }
      scale_block(g_, n, P.student_scale);
      store_block(out, b * BLOCK, width(b), g_);
    }
    zero_gradient(r, P.vocab);
  }
};

}  // namespace

void KDKERNELS_SHARD_ENTRY(const ShardProblem& problem) {
  const RowProblem& rows = problem.source;
  parallel_rows(rows.outer * rows.inner, rows.vocab, rows.threads, [&](auto&& next) {
    ShardWorker worker(problem);
    for (std::int64_t r; (r = next()) >= 0;) worker.row(r);
  });
}

}  // namespace kdkernels
