// Adds one teacher's row to the mixture of several (kdkernels/ops/mixture.py). This file is included after rows.inl, because it
// reads a teacher as that file does. KDKERNELS_MIX_ENTRY names the entry point.
//
// The first pass keeps what it computed for each thread, as in the row kernel: exponentials, or z itself for the geometric mixture.
// So the second pass does not read the logits and takes no exponential again.

namespace kdkernels {
namespace {

struct OnlineSums {
  float M = FLOOR;
  double S = 0, moment = 0;  // sum e^(x - M), sum e^(x - M) (x - M)
};

// Adds a padded block; the caller gives its maximum. `out`, if any, receives the exponentials.
template <bool MOMENT>
void add_online(OnlineSums& p, const float* x, float maximum, int n, float* out) {
  const float moved = std::max(p.M, maximum);
  if (moved != p.M) {
    const double step = double(p.M) - moved, keep = std::exp(step);
    p.moment = p.S == 0 ? 0 : keep * (p.moment + p.S * step);
    p.S *= keep;
    p.M = moved;
  }
  const vf M = splat(p.M), zero = vf{};
  vf sum = zero, moment = zero;
  for (int i = 0; i < n; i += W) {
    vf d = load(x + i) - M, e = vexp(d);
    sum += e;
    if constexpr (MOMENT) {
      vf term = e * d;
      moment += e > zero ? term : zero;  // 0 log 0 = 0
    }
    if (out) store(out + i, e);
  }
  p.S += hsum(sum);
  if constexpr (MOMENT) p.moment += hsum(moment);
}

// total (=, or +=) e * factor. With LAST, total becomes tau * log(total), and the result is the sum of total * log(total).
template <bool FIRST, bool LAST>
double add_probabilities(const float* e, float factor, float tau, int n, float* total) {
  const vf f = splat(factor), zero = vf{}, vtau = splat(tau), smallest = splat(std::numeric_limits<float>::min());
  vf sum = zero;
  for (int i = 0; i < n; i += W) {
    vf p = load(e + i) * f;
    if constexpr (!FIRST) p += load(total + i);
    if constexpr (!LAST) {
      store(total + i, p);
    } else {
      vf log_p = vlog(p) + (p - p);  // NaN stays NaN
      vf term = p * log_p;
      sum += p < smallest ? zero : term;
      vf z = log_p * vtau;
      store(total + i, p < smallest ? splat(NEG_INF) : z);
    }
  }
  return LAST ? hsum(sum) : 0;
}

// total (=, or +=) (z - maximum) * factor
template <bool FIRST>
void add_logits(const float* z, float maximum, float factor, int n, float* total) {
  const vf f = splat(factor), M = splat(maximum);
  for (int i = 0; i < n; i += W) {
    vf x = (load(z + i) - M) * f;
    if constexpr (!FIRST) x += load(total + i);
    store(total + i, x);
  }
}

class MixWorker : TeacherRow {
 public:
  explicit MixWorker(const MixProblem& problem) : TeacherRow(problem.source), M(problem) {
    geometric_ = P.divergence == Divergence::reverse_kl;
    kept_.resize(std::size_t(blocks_) * BLOCK);
    used_.resize(std::size_t(blocks_));
  }

  void row(std::int64_t r) {
    double* sums = reinterpret_cast<double*>(M.sums);
    double &mass = sums[r], &constant = sums[P.outer * P.inner + r];
    if (M.first) mass = constant = 0;
    const auto* targets = reinterpret_cast<const std::int64_t*>(P.target);
    if (targets && targets[r] == P.ignore_index) return;
    const float share = reinterpret_cast<const float*>(M.share)[r];
    OnlineSums p;
    bool counts = share != 0.f;  // NaN counts
    if (counts) {
      first_pass(r, p);
      counts = p.S != 0;  // a row in which every token is masked teaches nothing
    }
    if (counts) {
      const double log_S = std::log(p.S);
      mass += share;
      constant += geometric_ ? share * log_S : share * (p.moment / p.S - log_S);
    } else if (!M.first && !M.last) {
      return;
    } else {
      std::fill(kept_.begin(), kept_.end(), 0.f);
      std::fill(used_.begin(), used_.end(), 0.f);
      p.M = 0.f;
    }
    float* total = reinterpret_cast<float*>(const_cast<char*>(row_of(M.total, r, P.inner).data));
    const double factor = counts ? double(share) : 0.0;
    if (geometric_) {
      add_geometric(total, p.M, float(factor), mass, constant);
    } else {
      add_arithmetic(total, p, counts ? factor / p.S : 0.0, mass, constant);
    }
    if (M.last && constant < 0) constant = 0;  // rounding; NaN passes
  }

 private:
  const MixProblem& M;
  bool geometric_;
  std::vector<float> kept_, used_;
  alignas(64) float edge_[BLOCK];

  void first_pass(std::int64_t r, OnlineSums& p) {
    open_teacher(r, true);
    for (std::int64_t b = 0; b < blocks_; ++b) {
      const float maximum = read_teacher_block(b);
      float* kept = kept_.data() + b * BLOCK;
      if (geometric_) {
        std::memcpy(kept, z_, std::size_t(padded(b)) * sizeof(float));
        add_online<false>(p, z_, maximum, padded(b), nullptr);
      } else {
        add_online<true>(p, z_, maximum, padded(b), kept);
      }
      used_[std::size_t(b)] = p.M;
    }
  }

  // Calls block(b, its part of the total, padded to whole vectors). The last part of a row goes through a copy.
  template <typename Block>
  void each_block(float* total, Block block) {
    for (std::int64_t b = 0; b < blocks_; ++b) {
      const int n = width(b);
      float* part = total + b * BLOCK;
      if (n % W == 0) {
        block(b, part);
        continue;
      }
      std::fill(edge_, edge_ + padded(b), 0.f);
      if (!M.first) std::memcpy(edge_, part, std::size_t(n) * sizeof(float));
      block(b, edge_);
      std::memcpy(part, edge_, std::size_t(n) * sizeof(float));
    }
  }

  void add_arithmetic(float* total, const OnlineSums& p, double factor, double mass, double& constant) {
    double log_sum = 0;  // sum of total * log(total)
    const auto add = M.first ? (M.last ? add_probabilities<true, true> : add_probabilities<true, false>)
                             : (M.last ? add_probabilities<false, true> : add_probabilities<false, false>);
    each_block(total, [&](std::int64_t b, float* part) {
      const float f = float(factor * std::exp(double(used_[std::size_t(b)]) - p.M));
      log_sum += add(kept_.data() + b * BLOCK, f, P.temperature, padded(b), part);
    });
    if (M.last && mass != 0) constant += mass * std::log(mass) - log_sum;  // mass * the entropy of total / mass
  }

  void add_geometric(float* total, float maximum, float share, double mass, double& constant) {
    OnlineSums mean;
    const vf to_mean = splat(float(1 / mass)), tau = splat(P.temperature);
    each_block(total, [&](std::int64_t b, float* part) {
      const float* z = kept_.data() + b * BLOCK;
      const int n = padded(b);
      M.first ? add_logits<true>(z, maximum, share, n, part) : add_logits<false>(z, maximum, share, n, part);
      if (!M.last) return;
      if (mass == 0) {
        std::fill(part, part + n, NEG_INF);
        return;
      }
      for (int i = 0; i < n; i += W) store(z_ + i, load(part + i) * to_mean);
      for (int i = width(b); i < n; ++i) z_[i] = NEG_INF;
      add_online<false>(mean, z_, block_max(z_, n), n, nullptr);
      for (int i = 0; i < n; i += W) store(part + i, load(z_ + i) * tau);
    });
    if (M.last && mean.S != 0) constant -= mass * (mean.M + std::log(mean.S));
  }
};

}  // namespace

void KDKERNELS_MIX_ENTRY(const MixProblem& problem) {
  parallel_rows(problem.source.outer * problem.source.inner, problem.source.vocab, problem.source.threads, [&](auto&& next) {
    MixWorker worker(problem);
    for (std::int64_t r; (r = next()) >= 0;) worker.row(r);
  });
}

}  // namespace kdkernels
