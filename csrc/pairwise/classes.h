// CPU: class probabilities of a tile of queries, and the gradients that reach their logarithms.
#pragma once

#include <limits>

#include "pairwise/params.h"
#include "pairwise/tile.h"

namespace metafast::METAFAST_ISA {

constexpr double kInfinity = std::numeric_limits<double>::infinity();

// Of one task: which rows and classes take part, and the probabilities of one tile of queries.
template <typename T>
class ClassProbabilities {
  using V = Vec<T>;

 public:
  explicit ClassProbabilities(const Classes<T>& p)
      : p_(p),
        all_(p.rows),
        own_(p.row_labels ? p.rows : 0),
        top_(p.row_labels ? p.way : 0),
        sum_(p.row_labels ? p.way : 0) {}

  void start_task(int64_t task) {
    ways_ = p_.ways ? p_.ways[task] : p_.way;
    labels_ = p_.row_labels ? p_.row_labels + task * p_.rows : nullptr;
  }

  int64_t ways() const { return ways_; }

  // The class of row j, or -1 where the row takes no part.
  int64_t class_of(int64_t j) const {
    const int64_t label = labels_ ? labels_[j] : j;
    return label >= 0 && label < ways_ ? label : -1;
  }

  // What the log-probabilities of a tile need, from the logits of its pairs.
  void set(const V* logits) {
    logits_ = logits;
    const V lowest = Math<V>::constant(-kInfinity);
    V top = lowest, bottom = Math<V>::constant(kInfinity);
    for (int64_t j = 0; j < p_.rows; ++j) {
      if (class_of(j) < 0) continue;
      top = logits[j] > top ? logits[j] : top;
      bottom = logits[j] < bottom ? logits[j] : bottom;
    }
    V sum{};
    for (int64_t j = 0; j < p_.rows; ++j) {
      all_[j] = class_of(j) >= 0 ? Math<V>::exp(logits[j] - top) : V{};
      sum += all_[j];
    }
    largest_ = top;
    log_sum_ = Math<V>::log(sum);
    inverse_sum_ = 1 / sum;
    if (labels_ == nullptr) return;

    // Each class's own maximum keeps the exponentials of unlikely classes from vanishing. Where all logits
    // are so close that none can, the exponentials are there already.
    const bool close = !any<T>(~(top - bottom < kClose));
    for (int64_t n = 0; n < p_.way; ++n) {
      top_[n] = close ? top : lowest;
      sum_[n] = V{};
    }
    for (int64_t j = 0; !close && j < p_.rows; ++j) {
      const int64_t n = class_of(j);
      if (n >= 0) top_[n] = logits[j] > top_[n] ? logits[j] : top_[n];
    }
    for (int64_t j = 0; j < p_.rows; ++j) {
      const int64_t n = class_of(j);
      if (n < 0) continue;
      own_[j] = close ? all_[j] : Math<V>::exp(logits[j] - top_[n]);
      sum_[n] += own_[j];
    }
  }

  // log p(n), for a class that takes part
  V log_prob(int64_t n) const {
    const V around = (labels_ ? top_[n] : logits_[n]) - largest_;
    return labels_ ? around + Math<V>::log(sum_[n]) - log_sum_ : around - log_sum_;
  }

  // log p(label) of each of `count` queries, 0 where the label is ignored.
  V label_log_probs(const int64_t* labels, int count) const {
    V top = largest_, sum = V{} + 1;
    Mask<T> valid{};
    for (int i = 0; i < count; ++i) {
      const int64_t n = labels[i];
      if (n < 0 || n >= ways_) continue;
      valid[i] = -1;
      top[i] = labels_ ? top_[n][i] : logits_[n][i];
      if (labels_) sum[i] = sum_[n][i];
    }
    V log_prob = top - largest_ - log_sum_;
    if (labels_) log_prob += Math<V>::log(sum);
    return valid ? log_prob : V{};
  }

  V all(int64_t j) const { return all_[j] * inverse_sum_; }  // probability of row j among all rows,
  V own(int64_t j) const {                                   // and among those of its class, which takes part
    return labels_ ? own_[j] / sum_[labels_[j]] : V{} + 1;
  }

 private:
  static constexpr T kClose = 64;  // exp(-64) is far from the smallest float

  const Classes<T>& p_;
  int64_t ways_ = 0;
  const int64_t* labels_ = nullptr;
  const V* logits_ = nullptr;
  Scratch<V> all_, own_, top_, sum_;         // exponentials of the rows; maximum and sum of each class
  V largest_{}, log_sum_{}, inverse_sum_{};  // logit of a row; of all rows' exponentials around it
};

// The gradients of the class log-probabilities of a tile, from those of log_probs or of the loss.
template <typename T>
class ClassGradients {
  using V = Vec<T>;

 public:
  ClassGradients(const Classes<T>& p, const LossGradient<T>& grad)
      : p_(p), grad_(grad), scale_(grad.divisor ? 1 / *grad.divisor : T(1)), per_class_(p.way) {}

  void set(int64_t task, int64_t q, int count, int64_t ways) {
    sum_ = V{};
    for (int64_t n = 0; n < p_.way; ++n) per_class_[n] = V{};
    for (int i = 0; i < count; ++i) {
      const int64_t query = task * p_.queries + q + i;
      const T* grad = grad_.grad != nullptr ? grad_.grad + query * grad_.query_stride : &kOne;
      if (p_.query_labels != nullptr) {
        const int64_t label = p_.query_labels[query];
        if (label < 0 || label >= ways) continue;
        lane<T>(per_class_.get(), label, i) = sum_[i] = -*grad * scale_;
      } else {
        for (int64_t n = 0; n < ways; ++n) {
          lane<T>(per_class_.get(), n, i) = grad[n];
          sum_[i] += grad[n];
        }
      }
    }
  }

  V of(int64_t n) const { return per_class_[n]; }
  V sum() const { return sum_; }

 private:
  static constexpr T kOne = 1;

  const Classes<T>& p_;
  const LossGradient<T>& grad_;
  T scale_;
  Scratch<V> per_class_;
  V sum_{};
};

}  // namespace metafast::METAFAST_ISA
