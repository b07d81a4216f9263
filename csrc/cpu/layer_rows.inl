// Squared error of one row of hidden states against another, and its gradient. This file is included after rows.inl, because it
// uses the loads and stores from there. KDKERNELS_LAYER_ENTRY names the entry point.

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
    if (!P.normalize) {
      *loss = plain(r);
      return;
    }
    read(r);
    const float inverse_u = normalise(u_), inverse_v = normalise(v_);
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
    const float c = coefficient(r);
    // For unit vectors u (u - v) = |u - v|^2 / 2. This form avoids the cancellation in 1 - u v. A zero vector has no direction, so
    // its gradient is 0.
    const bool flat = inverse_u == 0.f || inverse_v == 0.f;
    const float along = float(total / 2);
    if (P.grad_u.data) write(P.grad_u, r, u_, v_, flat ? 0.f : c * inverse_u, along);
    if (P.grad_v.data) write(P.grad_v, r, v_, u_, flat ? 0.f : c * inverse_v, along);
  }

 private:
  const LayerProblem& P;
  std::vector<float> u_, v_;
  int padded_ = 0;
  alignas(64) float g_[BLOCK], t_[BLOCK];

  static RowPointer at(const RowTensor& t, std::int64_t r) { return row_of(t, r, 1); }

  float coefficient(std::int64_t r) const { return 2.f * reinterpret_cast<const float*>(P.coef)[r]; }
  float alpha(std::int64_t r) const { return P.text.data ? reinterpret_cast<const float*>(P.alpha)[r * P.alpha_stride] : 0.f; }

  // One sweep is enough, because the gradient coef * 2 (u - v) does not need the row's sum. A gradient may overwrite its input:
  // a block is written after it has been read, and a gradient's items are not larger than the input's.
  float plain(std::int64_t r) {
    const RowPointer u = at(P.u, r), v = at(P.v, r);
    const float contrast = alpha(r), c = coefficient(r);
    double total = 0;
    for (std::int64_t start = 0; start < P.width; start += BLOCK) {
      const int n = int(std::min<std::int64_t>(BLOCK, P.width - start));
      const float *x = items(u, start, n, &u_[0]), *y = items(v, start, n, &v_[0]);
      const float* t = contrast != 0.f ? items(at(P.text, r), start, n, t_) : nullptr;
      vf sum = vf{};
      for (int i = 0; i < n; i += W) {
        vf b = load(y + i);
        if (t) b += contrast * (b - load(t + i));  // NaN passes; with a contrast of 0 the text path is not read
        vf difference = load(x + i) - b;
        sum += difference * difference;
        store(g_ + i, difference * c);
      }
      total += hsum(sum);
      if (P.grad_u.data) store_block(at(P.grad_u, r), start, n, g_);
      if (P.grad_v.data) {
        for (int i = 0; i < n; i += W) store(g_ + i, -load(g_ + i));
        store_block(at(P.grad_v, r), start, n, g_);
      }
    }
    return float(total);
  }

  // Items [start, start + n) as fp32. The result points to the row itself, or to a copy in `memory` padded with zeros to whole vectors.
  static const float* items(RowPointer row, std::int64_t start, int n, float* memory) {
    if (row.dtype == DType::f32 && n % W == 0) return reinterpret_cast<const float*>(row.data) + start;
    load_block(row, start, n, 0.f, memory);
    return memory;
  }

  void read(std::int64_t r) {
    const float contrast = alpha(r);
    padded_ = 0;
    for (std::int64_t start = 0; start < P.width; start += BLOCK, padded_ += BLOCK) {
      const int n = int(std::min<std::int64_t>(BLOCK, P.width - start));
      float *u = &u_[std::size_t(start)], *v = &v_[std::size_t(start)];
      load_block(at(P.u, r), start, n, 0.f, u);
      load_block(at(P.v, r), start, n, 0.f, v);
      if (contrast != 0.f) {
        load_block(at(P.text, r), start, n, 0.f, t_);
        for (int i = 0; i < n; i += W) {
          vf a = load(v + i);
          store(v + i, a + contrast * (a - load(t_ + i)));
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
