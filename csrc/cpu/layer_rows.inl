// Squared error of one row of hidden states against another, and its gradient. Included after rows.inl, whose loads and stores
// it uses; KDKERNELS_LAYER_ENTRY names the entry point.

namespace kdkernels {
namespace {

class LayerWorker {
 public:
  explicit LayerWorker(const LayerProblem& problem) : P(problem) {
    std::size_t padded = std::size_t(P.width + BLOCK - 1) / BLOCK * BLOCK;
    u_.resize(padded);
    v_.resize(padded);
  }

  void row(std::int64_t r) {
    float* loss = reinterpret_cast<float*>(P.loss) + r;
    if (P.valid && !reinterpret_cast<const std::uint8_t*>(P.valid)[r]) {
      *loss = 0.f;
      clear(P.grad_u, r);
      clear(P.grad_v, r);
      return;
    }
    read(r);
    float inverse_u = 1.f, inverse_v = 1.f;
    if (P.normalize) {
      inverse_u = normalise(u_);
      inverse_v = normalise(v_);
    }
    double total = 0;
    for (int i = 0; i < padded_; i += BLOCK) {
      vf sum = vf{};
      for (int k = i; k < i + BLOCK; k += W) {
        vf difference = load(&u_[std::size_t(k)]) - load(&v_[std::size_t(k)]);
        sum += difference * difference;
      }
      total += hsum(sum);
    }
    *loss = float(total);
    const float c = 2.f * reinterpret_cast<const float*>(P.coef)[r];
    // Of unit vectors u (u - v) = |u - v|^2 / 2, free of the cancellation in 1 - u v. A zero vector has no direction: gradient 0.
    const bool flat = P.normalize && (inverse_u == 0.f || inverse_v == 0.f);
    const float along = P.normalize ? float(total / 2) : 0.f;
    if (P.grad_u.data) write(P.grad_u, r, u_, v_, flat ? 0.f : c * inverse_u, along);
    if (P.grad_v.data) write(P.grad_v, r, v_, u_, flat ? 0.f : c * inverse_v, along);
  }

 private:
  const LayerProblem& P;
  std::vector<float> u_, v_;
  int padded_ = 0;
  alignas(64) float g_[BLOCK], t_[BLOCK];

  static RowPointer at(const RowTensor& t, std::int64_t r) { return row_of(t, r, 1); }

  void read(std::int64_t r) {
    const float alpha = P.text.data ? reinterpret_cast<const float*>(P.alpha)[r * P.alpha_stride] : 0.f;
    padded_ = 0;
    for (std::int64_t start = 0; start < P.width; start += BLOCK, padded_ += BLOCK) {
      const int n = int(std::min<std::int64_t>(BLOCK, P.width - start));
      float *u = &u_[std::size_t(start)], *v = &v_[std::size_t(start)];
      load_block(at(P.u, r), start, n, 0.f, u);
      load_block(at(P.v, r), start, n, 0.f, v);
      if (alpha != 0.f) {  // NaN passes; where it is 0 the text path is not read
        load_block(at(P.text, r), start, n, 0.f, t_);
        for (int i = 0; i < n; i += W) {
          vf a = load(v + i);
          store(v + i, a + alpha * (a - load(t_ + i)));
        }
      }
      for (int i = n; i < BLOCK; ++i) u[i] = v[i] = 0.f;
    }
  }

  // x becomes x / |x|; returns 1 / |x|, or 0 for a zero vector
  float normalise(std::vector<float>& x) {
    double squares = 0;
    for (int i = 0; i < padded_; i += BLOCK) {
      vf sum = vf{};
      for (int k = i; k < i + BLOCK; k += W) sum += load(&x[std::size_t(k)]) * load(&x[std::size_t(k)]);
      squares += hsum(sum);
    }
    const float inverse = squares == 0 ? 0.f : float(1.0 / std::sqrt(squares));
    for (int i = 0; i < padded_; i += W) store(&x[std::size_t(i)], load(&x[std::size_t(i)]) * inverse);
    return inverse;
  }

  // gradient of the first vector: factor ((x - y) - along x)
  void write(const RowTensor& to, std::int64_t r, const std::vector<float>& x, const std::vector<float>& y, float factor, float along) {
    for (std::int64_t start = 0; start < P.width; start += BLOCK) {
      const int n = int(std::min<std::int64_t>(BLOCK, P.width - start));
      for (int i = 0; i < n; i += W) {
        vf a = load(&x[std::size_t(start + i)]), g = (a - load(&y[std::size_t(start + i)])) - a * along;
        store(g_ + i, g * factor);
      }
      store_block(at(to, r), start, n, g_);
    }
  }

  void clear(const RowTensor& to, std::int64_t r) {
    if (!to.data) return;
    const std::size_t item = to.dtype == DType::f32 ? 4 : 2;
    std::memset(const_cast<char*>(at(to, r).data), 0, std::size_t(P.width) * item);
  }
};

}  // namespace

void KDKERNELS_LAYER_ENTRY(const LayerProblem& problem) {
  parallel_rows(problem.rows, problem.width, problem.threads, [&](auto&& next) {
    LayerWorker worker(problem);
    for (std::int64_t r; (r = next()) >= 0;) worker.row(r);
  });
}

}  // namespace kdkernels
