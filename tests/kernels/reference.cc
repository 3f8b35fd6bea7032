#include "tests/kernels/reference.h"

#include <algorithm>
#include <cmath>

namespace tandem::kernels::testing {
namespace {

std::size_t at(std::int64_t row, std::int64_t columns, std::int64_t column) {
  return static_cast<std::size_t>(row * columns + column);
}
Values zeros(std::int64_t n) {
  return Values(static_cast<std::size_t>(n), 0.0);
}
double sigmoid(double x) {
  return 1.0 / (1.0 + std::exp(-x));
}

}  // namespace

Values matmul_nt(const Values& x, const Values& w, std::int64_t t, std::int64_t n, std::int64_t k) {
  Values y = zeros(t * n);
  for (std::int64_t i = 0; i < t; ++i)
    for (std::int64_t j = 0; j < n; ++j)
      for (std::int64_t l = 0; l < k; ++l) y[at(i, n, j)] += x[at(i, k, l)] * w[at(j, k, l)];
  return y;
}

Values matmul_nn(const Values& x, const Values& w, std::int64_t t, std::int64_t n, std::int64_t k) {
  Values y = zeros(t * n);
  for (std::int64_t i = 0; i < t; ++i)
    for (std::int64_t l = 0; l < k; ++l)
      for (std::int64_t j = 0; j < n; ++j) y[at(i, n, j)] += x[at(i, k, l)] * w[at(l, n, j)];
  return y;
}

Values matmul_tn(const Values& x, const Values& w, std::int64_t t, std::int64_t m, std::int64_t n) {
  Values y = zeros(m * n);
  for (std::int64_t i = 0; i < t; ++i)
    for (std::int64_t l = 0; l < m; ++l)
      for (std::int64_t j = 0; j < n; ++j) y[at(l, n, j)] += x[at(i, m, l)] * w[at(i, n, j)];
  return y;
}

double dot(const Values& a, const Values& b) {
  double sum = 0.0;
  for (std::size_t j = 0; j < a.size(); ++j) sum += a[j] * b[j];
  return sum;
}

RmsNormResult rms_norm(const Values& residual, const Values& delta, const Values& weight,
                       std::int64_t t, std::int64_t c, double eps) {
  RmsNormResult r{residual, zeros(t * c), zeros(t)};
  for (std::size_t j = 0; j < delta.size(); ++j) r.residual[j] += delta[j];
  for (std::int64_t i = 0; i < t; ++i) {
    double sum = 0.0;
    for (std::int64_t j = 0; j < c; ++j) sum += r.residual[at(i, c, j)] * r.residual[at(i, c, j)];
    const double rstd = 1.0 / std::sqrt(sum / static_cast<double>(c) + eps);
    r.rstd[at(i, 1, 0)] = rstd;
    for (std::int64_t j = 0; j < c; ++j)
      r.y[at(i, c, j)] = r.residual[at(i, c, j)] * rstd * weight[at(0, c, j)];
  }
  return r;
}

Values rms_norm_backward(const Values& dy, const Values& residual, const Values& weight,
                         std::int64_t t, std::int64_t c, double eps) {
  const Values rstd = rms_norm(residual, {}, weight, t, c, eps).rstd;
  Values dx = zeros(t * c);
  for (std::int64_t i = 0; i < t; ++i) {
    const double r = rstd[at(i, 1, 0)];
    double sum = 0.0;
    for (std::int64_t j = 0; j < c; ++j)
      sum += dy[at(i, c, j)] * weight[at(0, c, j)] * residual[at(i, c, j)];
    for (std::int64_t j = 0; j < c; ++j)
      dx[at(i, c, j)] = r * (dy[at(i, c, j)] * weight[at(0, c, j)] -
                             residual[at(i, c, j)] * r * r * sum / static_cast<double>(c));
  }
  return dx;
}

Values rope(Values qkv, const std::vector<std::int32_t>& positions, const Values& inv_freq,
            double factor, std::int64_t heads, std::int64_t head_dim, std::int64_t width,
            double sign) {
  const std::int64_t half = head_dim / 2;
  for (std::size_t row = 0; row < positions.size(); ++row)
    for (std::int64_t h = 0; h < heads; ++h)
      for (std::int64_t j = 0; j < half; ++j) {
        const std::size_t lo = at(static_cast<std::int64_t>(row), width, h * head_dim + j);
        const std::size_t hi = lo + static_cast<std::size_t>(half);
        // The angle is an f32 number by contract.
        const double angle = static_cast<float>(positions[row]) *
                             static_cast<float>(inv_freq[static_cast<std::size_t>(j)]);
        const double c = std::cos(angle) * factor, s = std::sin(angle) * factor * sign;
        const double x = qkv[lo], y = qkv[hi];
        qkv[lo] = x * c - y * s;
        qkv[hi] = y * c + x * s;
      }
  return qkv;
}

namespace {

/// Calls f(first element of a head, first element of its weight) for each head of q and k.
template <class F>
void for_heads(const QkvShape& s, const F& f) {
  for (std::int64_t row = 0; row < s.t; ++row)
    for (std::int64_t h = 0; h < s.heads + s.kv_heads; ++h)
      f(row * s.width() + h * s.head_dim, h < s.heads ? 0 : s.head_dim);
}
Values part_of(const Values& values, std::int64_t begin, std::int64_t count) {
  return {values.begin() + begin, values.begin() + begin + count};
}

}  // namespace

Values qk_norm(const QkvShape& s, const Values& raw, const Values& weight, double eps) {
  Values out = raw;
  for_heads(s, [&](std::int64_t head, std::int64_t of) {
    const Values y = rms_norm(part_of(raw, head, s.head_dim), {}, part_of(weight, of, s.head_dim),
                              1, s.head_dim, eps)
                         .y;
    std::copy(y.begin(), y.end(), out.begin() + head);
  });
  return out;
}

QkNormGrads qk_norm_backward(const QkvShape& s, const Values& dqkv, const Values& raw,
                             const Values& weight, double eps) {
  QkNormGrads grads{dqkv, zeros(2 * s.head_dim)};
  for_heads(s, [&](std::int64_t head, std::int64_t of) {
    const Values x = part_of(raw, head, s.head_dim), dy = part_of(dqkv, head, s.head_dim);
    const Values w = part_of(weight, of, s.head_dim);
    const Values dx = rms_norm_backward(dy, x, w, 1, s.head_dim, eps);
    std::copy(dx.begin(), dx.end(), grads.draw.begin() + head);
    const double rstd = rms_norm(x, {}, w, 1, s.head_dim, eps).rstd[0];
    for (std::int64_t j = 0; j < s.head_dim; ++j)
      grads.dweight[static_cast<std::size_t>(of + j)] +=
          dy[static_cast<std::size_t>(j)] * x[static_cast<std::size_t>(j)] * rstd;
  });
  return grads;
}

Values silu_mul(const Values& gate_up, std::int64_t t, std::int64_t f) {
  Values out = zeros(t * f);
  for (std::int64_t i = 0; i < t; ++i)
    for (std::int64_t j = 0; j < f; ++j) {
      const double g = gate_up[at(i, 2 * f, j)];
      out[at(i, f, j)] = g * sigmoid(g) * gate_up[at(i, 2 * f, f + j)];
    }
  return out;
}

Values silu_mul_backward(const Values& dout, const Values& gate_up, std::int64_t t,
                         std::int64_t f) {
  Values d = zeros(t * 2 * f);
  for (std::int64_t i = 0; i < t; ++i)
    for (std::int64_t j = 0; j < f; ++j) {
      const double g = gate_up[at(i, 2 * f, j)], u = gate_up[at(i, 2 * f, f + j)];
      const double s = sigmoid(g), o = dout[at(i, f, j)];
      d[at(i, 2 * f, j)] = o * u * s * (1.0 + g * (1.0 - s));
      d[at(i, 2 * f, f + j)] = o * g * s;
    }
  return d;
}

namespace {

/// Scores and probabilities of one query row of one head.
struct RowAttention {
  std::int64_t first = 0;
  Values capped, p;
  double lse = 0.0;
};

RowAttention attend(const AttentionSpec& spec, const Values& qkv, std::int64_t width,
                    std::int64_t begin, std::int64_t position, std::int64_t h) {
  const std::int64_t d = spec.head_dim, group = spec.heads / spec.kv_heads;
  RowAttention r;
  r.first = spec.window > 0 ? std::max<std::int64_t>(0, position - spec.window + 1) : 0;
  double top = -INFINITY;
  for (std::int64_t j = r.first; j <= position; ++j) {
    double s = 0.0;
    for (std::int64_t e = 0; e < d; ++e)
      s += qkv[at(begin + position, width, h * d + e)] *
           qkv[at(begin + j, width, (spec.heads + h / group) * d + e)];
    s *= static_cast<double>(spec.scale);
    if (spec.soft_cap > 0.0f) s = spec.soft_cap * std::tanh(s / spec.soft_cap);
    r.capped.push_back(s);
    top = std::max(top, s);
  }
  double sum = 0.0;
  for (double s : r.capped) sum += std::exp(s - top);
  r.lse = top + std::log(sum);
  for (double s : r.capped) r.p.push_back(std::exp(s - r.lse));
  return r;
}

}  // namespace

AttentionResult attention(const AttentionSpec& spec, const Values& qkv,
                          const std::vector<std::int32_t>& offsets, std::int64_t t) {
  const std::int64_t d = spec.head_dim, group = spec.heads / spec.kv_heads;
  const std::int64_t width = (spec.heads + 2 * spec.kv_heads) * d;
  AttentionResult r{zeros(t * spec.heads * d), zeros(t * spec.heads)};
  for (std::size_t s = 0; s + 1 < offsets.size(); ++s)
    for (std::int64_t row = offsets[s]; row < offsets[s + 1]; ++row)
      for (std::int64_t h = 0; h < spec.heads; ++h) {
        const RowAttention a = attend(spec, qkv, width, offsets[s], row - offsets[s], h);
        r.lse[at(row, spec.heads, h)] = a.lse;
        for (std::size_t j = 0; j < a.p.size(); ++j)
          for (std::int64_t e = 0; e < d; ++e)
            r.out[at(row, spec.heads * d, h * d + e)] +=
                a.p[j] * qkv[at(offsets[s] + a.first + static_cast<std::int64_t>(j), width,
                                (spec.heads + spec.kv_heads + h / group) * d + e)];
      }
  return r;
}

Values attention_backward(const AttentionSpec& spec, const Values& dout, const Values& qkv,
                          const std::vector<std::int32_t>& offsets, std::int64_t t) {
  const std::int64_t d = spec.head_dim, group = spec.heads / spec.kv_heads;
  const std::int64_t width = (spec.heads + 2 * spec.kv_heads) * d;
  Values g = zeros(t * width);
  for (std::size_t s = 0; s + 1 < offsets.size(); ++s)
    for (std::int64_t row = offsets[s]; row < offsets[s + 1]; ++row)
      for (std::int64_t h = 0; h < spec.heads; ++h) {
        const RowAttention a = attend(spec, qkv, width, offsets[s], row - offsets[s], h);
        const auto element = [&](std::size_t j, std::int64_t head, std::int64_t e) {
          return at(offsets[s] + a.first + static_cast<std::int64_t>(j), width, head * d + e);
        };
        const std::int64_t k_head = spec.heads + h / group, v_head = k_head + spec.kv_heads;
        Values dp(a.p.size(), 0.0);
        double mean = 0.0;
        for (std::size_t j = 0; j < a.p.size(); ++j) {
          for (std::int64_t e = 0; e < d; ++e) {
            const double o = dout[at(row, spec.heads * d, h * d + e)];
            dp[j] += o * qkv[element(j, v_head, e)];
            g[element(j, v_head, e)] += a.p[j] * o;
          }
          mean += a.p[j] * dp[j];
        }
        for (std::size_t j = 0; j < a.p.size(); ++j) {
          double ds = a.p[j] * (dp[j] - mean) * static_cast<double>(spec.scale);
          if (spec.soft_cap > 0.0f) {
            const double th = a.capped[j] / spec.soft_cap;
            ds *= 1.0 - th * th;
          }
          for (std::int64_t e = 0; e < d; ++e) {
            g[at(row, width, h * d + e)] += ds * qkv[element(j, k_head, e)];
            g[element(j, k_head, e)] += ds * qkv[at(row, width, h * d + e)];
          }
        }
      }
  return g;
}

std::int64_t LinearCase::slot_of(std::int64_t row) const {
  for (std::size_t s = 0; s < segment_slots.size(); ++s)
    if (row >= segment_offsets[s] && row < segment_offsets[s + 1]) return segment_slots[s];
  return -1;
}

Values linear(const LinearCase& c, const Values& x) {
  Values y = matmul_nt(x, c.w, c.t, c.n, c.i);
  for (std::int64_t row = 0; row < c.t; ++row) {
    if (!c.bias.empty())
      for (std::int64_t j = 0; j < c.n; ++j) y[at(row, c.n, j)] += c.bias[at(0, c.n, j)];
    const std::int64_t slot = c.slot_of(row);
    if (slot < 0) continue;
    for (const Site& site : c.sites) {
      const Adapter& a = site.slots[static_cast<std::size_t>(slot)];
      for (std::int64_t r = 0; r < a.rank; ++r) {
        double u = 0.0;
        for (std::int64_t j = 0; j < c.i; ++j)
          u += a.a[at(r, c.i, j)] * x[at(row, c.i, j)] *
               (site.mask.empty() ? 1.0 : site.mask[at(row, c.i, j)]);
        for (std::int64_t j = 0; j < site.n; ++j)
          y[at(row, c.n, site.n_begin + j)] += a.scale * u * a.b[at(j, a.rank, r)];
      }
    }
  }
  return y;
}

LinearGrads linear_backward(const LinearCase& c, const Values& x, const Values& dy) {
  LinearGrads g;
  g.dx = matmul_nn(dy, c.w, c.t, c.i, c.n);
  for (const Site& site : c.sites) {
    g.da.emplace_back();
    g.db.emplace_back();
    for (const Adapter& a : site.slots) {
      g.da.back().push_back(zeros(a.rank * c.i));
      g.db.back().push_back(zeros(site.n * a.rank));
    }
  }
  for (std::int64_t row = 0; row < c.t; ++row) {
    const std::int64_t slot = c.slot_of(row);
    if (slot < 0) continue;
    for (std::size_t s = 0; s < c.sites.size(); ++s) {
      const Site& site = c.sites[s];
      const auto k = static_cast<std::size_t>(slot);
      const Adapter& a = site.slots[k];
      for (std::int64_t r = 0; r < a.rank; ++r) {
        double u = 0.0, du = 0.0;
        const auto masked = [&](std::int64_t j) {
          return site.mask.empty() ? 1.0 : site.mask[at(row, c.i, j)];
        };
        for (std::int64_t j = 0; j < c.i; ++j)
          u += a.a[at(r, c.i, j)] * x[at(row, c.i, j)] * masked(j);
        for (std::int64_t j = 0; j < site.n; ++j) {
          const double d = dy[at(row, c.n, site.n_begin + j)];
          du += a.scale * d * a.b[at(j, a.rank, r)];
          g.db[s][k][at(j, a.rank, r)] += a.scale * d * u;
        }
        for (std::int64_t j = 0; j < c.i; ++j) {
          g.da[s][k][at(r, c.i, j)] += du * x[at(row, c.i, j)] * masked(j);
          g.dx[at(row, c.i, j)] += du * a.a[at(r, c.i, j)] * masked(j);
        }
      }
    }
  }
  return g;
}

CrossEntropyResult cross_entropy(const Values& x, const Values& w,
                                 const std::vector<std::int32_t>& labels, std::int64_t c,
                                 std::int64_t v, double scale) {
  const auto t = static_cast<std::int64_t>(labels.size());
  CrossEntropyResult r{zeros(t), zeros(t), zeros(t * c)};
  const Values logits = matmul_nt(x, w, t, v, c);
  for (std::int64_t row = 0; row < t; ++row) {
    const std::int64_t label = labels[static_cast<std::size_t>(row)];
    if (label < 0) continue;
    const auto begin = logits.begin() + row * v;
    const auto top = std::max_element(begin, begin + v);
    double sum = 0.0;
    for (std::int64_t j = 0; j < v; ++j) sum += std::exp(begin[j] - *top);
    const double lse = *top + std::log(sum);
    r.loss[at(row, 1, 0)] = lse - begin[label];
    r.correct[at(row, 1, 0)] = top - begin == label ? 1.0 : 0.0;
    for (std::int64_t j = 0; j < v; ++j) {
      const double d = scale * (std::exp(begin[j] - lse) - (j == label ? 1.0 : 0.0));
      for (std::int64_t e = 0; e < c; ++e) r.dx[at(row, c, e)] += d * w[at(j, c, e)];
    }
  }
  return r;
}

}  // namespace tandem::kernels::testing
