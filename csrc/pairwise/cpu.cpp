// CPU kernels of the pairwise family. Each run() takes work items [begin, end): a task, or one chunk of a
// task's queries, which it walks in tiles of one query per SIMD lane. Every tile is finished, from features
// to gradients, while it is in the cache; nothing of the size [Q, J, D], and in the losses nothing of [Q, J],
// reaches memory.
#include "pairwise/classes.h"
#include "pairwise/comparison.h"
#include "pairwise/products.h"

namespace metafast::METAFAST_ISA {

// ---- prototypes ----

template <typename T>
void run(const Prototypes<T>& p, int64_t begin, int64_t end) {
  // Of a large support, sums of sums: one running sum would lose the digits of what it adds.
  constexpr int64_t kBlock = 1024;
  const int64_t size = p.way * p.features, blocks = div_up(p.support, kBlock);
  Scratch<T> count(p.way), block_sums(blocks > 1 ? size : 0);
  for (int64_t t = begin; t < end; ++t) {
    const int64_t* labels = p.labels + t * p.support;
    const int64_t ways = p.ways ? p.ways[t] : p.way;
    T* out = p.prototypes + t * size;
    clear(out, size);
    clear(count.get(), p.way);
    for (int64_t block = 0; block < blocks; ++block) {
      T* sums = blocks > 1 ? block_sums.get() : out;
      if (blocks > 1) clear(sums, size);
      for (int64_t s = block * kBlock; s < std::min(p.support, (block + 1) * kBlock); ++s) {
        if (labels[s] < 0 || labels[s] >= ways) continue;
        count[labels[s]] += 1;
        const T* row = p.embeddings + (t * p.support + s) * p.features;
        T* sum = sums + labels[s] * p.features;
        for (int64_t d = 0; d < p.features; ++d) sum[d] += row[d];
      }
      for (int64_t i = 0; i < size && blocks > 1; ++i) out[i] += sums[i];
    }
    for (int64_t n = 0; n < p.way; ++n) {
      if (count[n] <= 1) continue;
      for (int64_t d = 0; d < p.features; ++d) out[n * p.features + d] /= count[n];
    }
  }
}

template <typename T>
void run(const PrototypesBackward<T>& p, int64_t begin, int64_t end) {
  Scratch<T> count(p.way);
  for (int64_t t = begin; t < end; ++t) {
    const int64_t* labels = p.labels + t * p.support;
    const int64_t ways = p.ways ? p.ways[t] : p.way;
    clear(count.get(), p.way);
    for (int64_t s = 0; s < p.support; ++s) {
      if (labels[s] >= 0 && labels[s] < ways) count[labels[s]] += 1;
    }
    for (int64_t s = 0; s < p.support; ++s) {
      T* out = p.grad_embeddings + (t * p.support + s) * p.features;
      if (labels[s] < 0 || labels[s] >= ways) {
        clear(out, p.features);
        continue;
      }
      const T* grad = p.grad + (t * p.way + labels[s]) * p.features;
      const T divisor = count[labels[s]];
      for (int64_t d = 0; d < p.features; ++d) out[d] = grad[d] / divisor;
    }
  }
}

// ---- pairwise ----

template <class M, bool kWeighted, typename T>
void walk(const Pairwise<T>& p, int64_t begin, int64_t end) {
  Scratch<Vec<T>> out(p.rows);
  Comparison<M, kWeighted, T> compare(p);
  for (int64_t item = begin; item < end; ++item) {
    const Chunk<T> chunk = chunk_of(p, item);
    compare.start(chunk);
    for_each_tile(p, chunk, [&](int64_t q, const Queries<T>& x) {
      compare.distances(x, out.get());
      store_tile(out.get(), p.rows, x.count, p.out + (chunk.task * p.queries + q) * p.rows);
    });
  }
}

template <class M, bool kWeighted, typename T>
void walk(const PairwiseBackward<T>& p, int64_t begin, int64_t end) {
  Scratch<Vec<T>> out(p.rows), grad(p.rows);
  Comparison<M, kWeighted, T> compare(p);
  for (int64_t item = begin; item < end; ++item) {
    const Chunk<T> chunk = chunk_of(p, item);
    T* grad_y = p.grad_y + chunk.index * p.rows * p.features;
    T* grad_weight = p.grad_weight ? p.grad_weight + chunk.index * p.features : nullptr;
    clear(grad_y, p.rows * p.features);
    clear(grad_weight, p.features);
    Vec<T> bias{};
    compare.start(chunk);
    for_each_tile(p, chunk, [&](int64_t q, const Queries<T>& x) {
      const int64_t query = chunk.task * p.queries + q;
      if constexpr (M::kCosine) {
        compare.distances(x, out.get());
      } else if constexpr (!std::is_same_v<typename M::Link, IdentityLink>) {
        load_tile(p.out + query * p.rows, p.rows, x.count, out.get());
      }
      load_tile(p.grad + query * p.rows, p.rows, x.count, grad.get());
      bias += compare.backward(x, out.get(), grad.get(), p.grad_x + query * p.features, grad_y, grad_weight);
    });
    compare.finish_backward(grad_y);
    if (p.grad_bias != nullptr) p.grad_bias[chunk.index] = sum_of_lanes<T>(bias);
  }
}

template <class M, bool kWeighted, typename T>
void walk(const PairwiseDoubleBackward<T>& p, int64_t begin, int64_t end) {
  Scratch<Vec<T>> out(p.rows), grad(p.rows), tangent(p.rows), first(p.rows);
  const T bias_tangent = p.gg_bias ? *p.gg_bias : T(0);
  Comparison<M, kWeighted, T> compare(p);
  for (int64_t item = begin; item < end; ++item) {
    const Chunk<T> chunk = chunk_of(p, item);
    const T* v = p.gg_y + chunk.task * p.rows * p.features;
    T* grad_y = p.grad_y + chunk.index * p.rows * p.features;
    T* grad_weight = p.grad_weight ? p.grad_weight + chunk.index * p.features : nullptr;
    clear(grad_y, p.rows * p.features);
    clear(grad_weight, p.features);
    Vec<T> bias{};
    compare.start(chunk);
    for_each_tile(p, chunk, [&](int64_t q, const Queries<T>& x) {
      const int64_t query = chunk.task * p.queries + q;
      const Queries<T> u{p.gg_x + query * p.features, p.features, x.count};
      compare.distances(x, out.get());
      compare.tangents(x, u, v, p.gg_weight, bias_tangent, out.get(), tangent.get());
      store_tile(tangent.get(), p.rows, x.count, p.grad_grad + query * p.rows);
      load_tile(p.grad + query * p.rows, p.rows, x.count, grad.get());
      std::fill_n(first.get(), p.rows, Vec<T>{});
      bias += compare.double_backward(x, u, v, p.gg_weight, out.get(), tangent.get(), grad.get(), first.get(),
                                      p.grad_x + query * p.features, grad_y, grad_weight);
    });
    compare.finish_double_backward(v, grad_y);
    if (p.grad_bias != nullptr) p.grad_bias[chunk.index] = sum_of_lanes<T>(bias);
  }
}

// ---- classify ----

template <class Params, typename T>
void store_nll(const Params& p, const ClassProbabilities<T>& probabilities, int64_t query, int count) {
  const Vec<T> nll = -probabilities.label_log_probs(p.query_labels + query, count);
  for (int i = 0; i < count; ++i) p.nll[query + i] = nll[i];
}

template <class M, typename T>
void walk(const Classify<T>& p, int64_t begin, int64_t end) {
  Scratch<Vec<T>> logits(p.rows);
  Comparison<M, false, T> compare(p, p.row_labels != nullptr);
  ClassProbabilities<T> probabilities(p);
  for (int64_t item = begin; item < end; ++item) {
    const Chunk<T> chunk = chunk_of(p, item);
    probabilities.start_task(chunk.task);
    compare.start(chunk, [&](int64_t j) { return probabilities.class_of(j) >= 0; });
    for_each_tile(p, chunk, [&](int64_t q, const Queries<T>& x) {
      const int64_t query = chunk.task * p.queries + q;
      compare.distances(x, logits.get());
      scale_tile(logits.get(), p.rows, -p.scale, logits.get());
      probabilities.set(logits.get());
      for (int64_t n = 0; n < p.way && p.log_probs != nullptr; ++n) {
        const Vec<T> log_prob =
            n < probabilities.ways() ? probabilities.log_prob(n) : Math<Vec<T>>::constant(-kInfinity);
        for (int i = 0; i < x.count; ++i) p.log_probs[(query + i) * p.way + n] = log_prob[i];
      }
      if (p.nll != nullptr) store_nll(p, probabilities, query, x.count);
    });
  }
}

template <class M, typename T>
void walk(const ClassifyBackward<T>& p, int64_t begin, int64_t end) {
  Scratch<Vec<T>> out(p.rows), grad(p.rows);
  ClassGradients<T> gradients(p, p.grad);
  Comparison<M, false, T> compare(p, p.row_labels != nullptr);
  ClassProbabilities<T> probabilities(p);
  for (int64_t item = begin; item < end; ++item) {
    const Chunk<T> chunk = chunk_of(p, item);
    T* grad_y = p.grad_y + chunk.index * p.rows * p.features;
    clear(grad_y, p.rows * p.features);
    probabilities.start_task(chunk.task);
    compare.start(chunk, [&](int64_t j) { return probabilities.class_of(j) >= 0; });
    for_each_tile(p, chunk, [&](int64_t q, const Queries<T>& x) {
      compare.distances(x, out.get());
      scale_tile(grad.get(), p.rows, -p.scale, out.get());
      probabilities.set(grad.get());
      if (p.nll != nullptr) store_nll(p, probabilities, chunk.task * p.queries + q, x.count);
      gradients.set(chunk.task, q, x.count, probabilities.ways());
      for (int64_t j = 0; j < p.rows; ++j) {
        const int64_t n = probabilities.class_of(j);
        grad[j] = n < 0 ? Vec<T>{}
                        : -p.scale * logit_gradient<Vec<T>>(gradients.of(n), probabilities.own(j),
                                                            gradients.sum(), probabilities.all(j));
      }
      compare.backward(x, out.get(), grad.get(), p.grad_x + (chunk.task * p.queries + q) * p.features, grad_y,
                       nullptr);
    });
    compare.finish_backward(grad_y);
  }
}

template <class M, typename T>
void walk(const ClassifyDoubleBackward<T>& p, int64_t begin, int64_t end) {
  using V = Vec<T>;
  Scratch<V> out(p.rows), logits(p.rows), grad(p.rows), tangent(p.rows), first(p.rows), class_mean(p.way);
  ClassGradients<T> gradients(p, p.grad);
  Comparison<M, false, T> compare(p, p.row_labels != nullptr);
  ClassProbabilities<T> probabilities(p);
  for (int64_t item = begin; item < end; ++item) {
    const Chunk<T> chunk = chunk_of(p, item);
    const T* v = p.gg_y + chunk.task * p.rows * p.features;
    T* grad_y = p.grad_y + chunk.index * p.rows * p.features;
    clear(grad_y, p.rows * p.features);
    probabilities.start_task(chunk.task);
    compare.start(chunk, [&](int64_t j) { return probabilities.class_of(j) >= 0; });
    for_each_tile(p, chunk, [&](int64_t q, const Queries<T>& x) {
      const int64_t query = chunk.task * p.queries + q;
      const Queries<T> u{p.gg_x + query * p.features, p.features, x.count};
      compare.distances(x, out.get());
      scale_tile(logits.get(), p.rows, -p.scale, out.get());
      probabilities.set(logits.get());
      gradients.set(chunk.task, q, x.count, probabilities.ways());
      compare.tangents(x, u, v, nullptr, T(0), out.get(), tangent.get());

      // Means of the logits' tangents -scale * tangent, over all rows and over those of each class.
      V mean{};
      std::fill_n(class_mean.get(), p.way, V{});
      for (int64_t j = 0; j < p.rows; ++j) {
        const int64_t n = probabilities.class_of(j);
        if (n < 0) continue;
        const V change = -p.scale * tangent[j];
        mean += probabilities.all(j) * change;
        class_mean[n] += probabilities.own(j) * change;
      }
      for (int64_t j = 0; j < p.rows; ++j) {
        const int64_t n = probabilities.class_of(j);
        grad[j] = first[j] = V{};
        if (n < 0) continue;
        const V g = gradients.of(n), own = probabilities.own(j), all = probabilities.all(j);
        grad[j] = -p.scale * logit_gradient<V>(g, own, gradients.sum(), all);
        first[j] = -p.scale *
                   logit_second<V>(g, own, gradients.sum(), all, -p.scale * tangent[j], class_mean[n], mean);
      }
      for (int i = 0; i < x.count; ++i) {
        if (p.query_labels != nullptr) {
          const int64_t label = p.query_labels[query + i];
          const bool valid = label >= 0 && label < probabilities.ways();
          p.grad_grad[query + i] = valid ? mean[i] - class_mean[label][i] : T(0);
        } else {
          for (int64_t n = 0; n < p.way; ++n) {
            p.grad_grad[(query + i) * p.way + n] =
                n < probabilities.ways() ? class_mean[n][i] - mean[i] : T(0);
          }
        }
      }
      compare.double_backward(x, u, v, nullptr, out.get(), tangent.get(), grad.get(), first.get(),
                              p.grad_x + query * p.features, grad_y, nullptr);
    });
    compare.finish_double_backward(v, grad_y);
  }
}

// ---- from the metric of the arguments to the kernel compiled for it ----

template <class Params>
void run_metric(const Params& p, int64_t begin, int64_t end) {
  const bool weighted = p.weight != nullptr;
  switch (p.metric) {
    case Metric::sqeuclidean:
      return weighted ? walk<SqEuclidean, true>(p, begin, end) : walk<SqEuclidean, false>(p, begin, end);
    case Metric::euclidean:
      return walk<Euclidean, false>(p, begin, end);
    case Metric::cosine:
      return walk<Cosine, false>(p, begin, end);
    case Metric::cityblock:
      return weighted ? walk<CityBlock, true>(p, begin, end) : walk<CityBlock, false>(p, begin, end);
    case Metric::dot:
      return walk<Dot, false>(p, begin, end);
    case Metric::relation_relu:
      return walk<RelationRelu, true>(p, begin, end);
    case Metric::relation_tanh:
      return walk<RelationTanh, true>(p, begin, end);
  }
}

template <class Params>
void run_distance(const Params& p, int64_t begin, int64_t end) {
  switch (p.metric) {
    case Metric::sqeuclidean:
      return walk<SqEuclidean>(p, begin, end);
    case Metric::euclidean:
      return walk<Euclidean>(p, begin, end);
    case Metric::cosine:
      return walk<Cosine>(p, begin, end);
    case Metric::cityblock:
      return walk<CityBlock>(p, begin, end);
    case Metric::dot:
      return walk<Dot>(p, begin, end);
    default:
      __builtin_unreachable();  // op.cpp lets only the five distances through
  }
}

template <typename T>
void run(const Pairwise<T>& p, int64_t begin, int64_t end) {
  run_metric(p, begin, end);
}

template <typename T>
void run(const PairwiseBackward<T>& p, int64_t begin, int64_t end) {
  run_metric(p, begin, end);
}

template <typename T>
void run(const PairwiseDoubleBackward<T>& p, int64_t begin, int64_t end) {
  run_metric(p, begin, end);
}

template <class Params>
void run_products(const Params& p, int64_t begin, int64_t end) {
  switch (p.metric) {
    case Metric::sqeuclidean:
      return walk<SqEuclidean>(p, begin, end);
    case Metric::euclidean:
      return walk<Euclidean>(p, begin, end);
    case Metric::cosine:
      return walk<Cosine>(p, begin, end);
    case Metric::dot:
      return walk<Dot>(p, begin, end);
    default:
      __builtin_unreachable();  // large.h lets only these through
  }
}

template <typename T>
void run(const FinishProducts<T>& p, int64_t begin, int64_t end) {
  run_products(p, begin, end);
}

template <typename T>
void run(const ProductFactors<T>& p, int64_t begin, int64_t end) {
  run_products(p, begin, end);
}

template <typename T>
void run(const Classify<T>& p, int64_t begin, int64_t end) {
  run_distance(p, begin, end);
}

template <typename T>
void run(const ClassifyBackward<T>& p, int64_t begin, int64_t end) {
  run_distance(p, begin, end);
}

template <typename T>
void run(const ClassifyDoubleBackward<T>& p, int64_t begin, int64_t end) {
  run_distance(p, begin, end);
}

// ---- sums ----

template <typename T>
void run(const ReduceLoss<T>& p, int64_t, int64_t) {
  constexpr int kSums = 8;  // additions that need not wait for each other
  double sums[kSums] = {}, sum = 0;
  int64_t valids[kSums] = {}, valid = 0;
  const auto add = [&](int k, int64_t i) {
    if (p.nll != nullptr) sums[k] += p.nll[i];  // 0 where the label is ignored
    valids[k] += p.query_labels[i] != kIgnoreLabel;
  };
  int64_t i = 0;
  for (; i + kSums <= p.count; i += kSums) {
    for (int k = 0; k < kSums; ++k) add(k, i + k);
  }
  for (; i < p.count; ++i) add(0, i);
  for (int k = 0; k < kSums; ++k) {
    sum += sums[k];
    valid += valids[k];
  }
  *p.valid = static_cast<T>(valid);
  if (p.loss != nullptr) *p.loss = static_cast<T>(p.mean ? sum / static_cast<double>(valid) : sum);
}

#define METAFAST_INSTANTIATE(Params)                         \
  template void run(const Params<float>&, int64_t, int64_t); \
  template void run(const Params<double>&, int64_t, int64_t);
METAFAST_INSTANTIATE(Prototypes)
METAFAST_INSTANTIATE(PrototypesBackward)
METAFAST_INSTANTIATE(Pairwise)
METAFAST_INSTANTIATE(PairwiseBackward)
METAFAST_INSTANTIATE(PairwiseDoubleBackward)
METAFAST_INSTANTIATE(MeanRow)
METAFAST_INSTANTIATE(CentreRows)
METAFAST_INSTANTIATE(FinishProducts)
METAFAST_INSTANTIATE(ProductFactors)
METAFAST_INSTANTIATE(AddScaledRows)
METAFAST_INSTANTIATE(Classify)
METAFAST_INSTANTIATE(ClassifyBackward)
METAFAST_INSTANTIATE(ClassifyDoubleBackward)
METAFAST_INSTANTIATE(ReduceLoss)
#undef METAFAST_INSTANTIATE

}  // namespace metafast::METAFAST_ISA
