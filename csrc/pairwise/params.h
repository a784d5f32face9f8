// The pairwise kernels: one struct each. T tasks, S support, Q queries, N classes, J rows that queries are
// compared with (classes or support examples), D features. All arrays are dense and row-major behind the
// stated task strides (in elements; 0 where all tasks share one array). Scalars T are float or double.
#pragma once

#include "common/kernel.h"

namespace metafast {

// out = link(bias + sum_d weight_d * term(x_d, y_d)); math.h has the formulas.
enum class Metric { sqeuclidean, euclidean, cosine, cityblock, dot, relation_relu, relation_tanh };

// Class means of the support examples.
template <typename T>
struct Prototypes {
  const T* embeddings;    // [T, S, D]
  const int64_t* labels;  // [T, S], kIgnoreLabel allowed
  const int64_t* ways;    // [T] or null: classes from ways[t] on are absent, their prototype is 0
  T* prototypes;          // [T, N, D]
  int64_t tasks, support, way, features;

  int64_t items() const { return tasks; }
  int64_t item_cost() const { return (support + way) * features; }
};

// grad_embeddings[s] = sum_chunks grad[label[s]] / count[label[s]], 0 where the label is ignored or its class
// absent.
template <typename T>
struct PrototypesBackward {
  const T* grad;          // [T, chunks, N, D]
  const int64_t* labels;  // [T, S]
  const int64_t* ways;    // [T] or null
  T* grad_embeddings;     // [T, S, D]
  int64_t tasks, support, way, features;
  int64_t chunks;  // 1 on the CPU

  int64_t items() const { return tasks; }
  int64_t item_cost() const { return (support + way) * features; }
};

// What every pairwise comparison reads: x rows against y rows.
template <typename T>
struct Pairs {
  const T* x;       // [T, Q, D]
  const T* y;       // [T, J, D]
  const T* weight;  // [D] or null
  const T* bias;    // [1] or null
  Metric metric;
  int64_t tasks, queries, rows, features;
  int64_t x_task_stride, y_task_stride;
  // A work item is one chunk of one task's queries. How many there are follows from the shapes alone, never
  // from the number of threads, so that partial sums are always added in the same order.
  int64_t chunks;

  int64_t chunk_size() const {        // queries; the last chunk may have fewer
    constexpr int64_t kQuantum = 16;  // a multiple of all lane counts
    return ((queries + chunks - 1) / chunks + kQuantum - 1) / kQuantum * kQuantum;
  }
  int64_t items() const { return tasks * chunks; }
  int64_t item_cost() const { return (queries / chunks + 1) * rows * features; }
};

template <typename T>
struct Pairwise : Pairs<T> {
  T* out;  // [T, Q, J]
};

template <typename T>
struct PairwiseBackward : Pairs<T> {
  const T* out;    // [T, Q, J], of the forward kernel
  const T* grad;   // [T, Q, J]
  T* grad_x;       // [T, Q, D]
  T* grad_y;       // [T, chunks, J, D]: partial sums, to be added over the chunks
  T* grad_weight;  // [T, chunks, D], partial sums; null without weight
  T* grad_bias;    // [T, chunks], partial sums; null without bias
};

// Derivative of <gg_x, grad_x> + <gg_y, grad_y> + <gg_weight, grad_weight> + gg_bias * grad_bias.
template <typename T>
struct PairwiseDoubleBackward : Pairs<T> {
  const T* out;        // [T, Q, J]
  const T* grad;       // [T, Q, J]
  const T* gg_x;       // [T, Q, D]
  const T* gg_y;       // [T, J, D]
  const T* gg_weight;  // [D] or null
  const T* gg_bias;    // [1] or null
  T* grad_grad;        // [T, Q, J]
  T* grad_x;           // [T, Q, D]
  T* grad_y;           // [T, chunks, J, D], partial sums
  T* grad_weight;      // [T, chunks, D], partial sums; null without weight
  T* grad_bias;        // [T, chunks], partial sums; null without bias
};

// The first layer of a relation head, which splits: W [q; p] + b = (Wq q + b) + Wp p. On CUDA in float32; the
// others take the library's products.
template <typename T>
struct RelationLayer {
  struct Side {
    const T* rows;  // [count, D]
    T* out;         // [count, H]
    int64_t count;
  };
  Side queries, classes;
  const T* weight;  // [H, 2 D]: of queries, of classes
  const T* bias;    // [H], added to the queries'
  int64_t features, hidden;
};

// ---- around a matrix product of the library (large.h) ----

// The mean of rows.
template <typename T>
struct MeanRow {
  const T* rows;  // [count, D]
  T* mean;        // [D]
  int64_t count, features;

  int64_t items() const { return 1; }
  int64_t item_cost() const { return count * features; }
};

// Rows minus a centre, and the squares of their norms.
template <typename T>
struct CentreRows {
  const T* rows;    // [count, D]
  const T* centre;  // [D], or null: the rows are taken as they are, and only their squares wanted
  T* centred;       // [count, D], or null with centre
  T* squares;       // [count]
  int64_t count, features;

  int64_t items() const { return count; }
  int64_t item_cost() const { return features; }
};

// The rows of both sides as the product takes them: centred for squared differences, else as they are.
template <typename T>
struct ProductRows {
  const T* x;        // [Q, D]
  const T* y;        // [J, D]
  const T* given_x;  // the same before they were centred
  const T* given_y;
  const T* x_squares;  // [Q]
  const T* y_squares;  // [J]
  Metric metric;
  int64_t queries, rows, features;

  int64_t items() const { return queries; }
  int64_t item_cost() const { return rows; }
};

template <typename T>
struct FinishProducts : ProductRows<T> {
  T* out;  // [Q, J]: inner products, overwritten by distances
};

// grad_x = x_factor x - F y and grad_y = y_factor y - F^T x: finds F and both factors, writes x_factor x into
// grad_x, and leaves the products to the library. Pairs in which much cancels have no part in F: their
// differences are added to grad_x and grad_y here.
template <typename T>
struct ProductFactors : ProductRows<T> {
  const T* out;   // [Q, J]
  const T* grad;  // [Q, J]
  T* factors;     // [Q, J]: F
  T* y_factors;   // [J], added to
  T* grad_x;      // [Q, D]
  T* grad_y;      // [J, D], added to
};

// out += factor * row
template <typename T>
struct AddScaledRows {
  const T* factors;  // [count]
  const T* rows;     // [count, D]
  T* out;            // [count, D]
  int64_t count, features;

  int64_t items() const { return count; }
  int64_t item_cost() const { return features; }
};

// ---- classes ----

// Class log-probabilities of queries, from logits -scale * distance(query, row). `weight`, `bias` are null.
template <typename T>
struct Classes : Pairs<T> {     // x: the queries, y: prototypes (J = N) or support examples (J = S)
  const int64_t* row_labels;    // [T, J]: class of each row, kIgnoreLabel allowed; null: row j is class j
  const int64_t* query_labels;  // [T, Q], kIgnoreLabel allowed; null: log-probabilities are wanted, no loss
  const int64_t* ways;          // [T] or null
  int64_t way;                  // N
  T scale;
};

// One CUDA kernel goes from the support to the loss. On the CPU these are steps of their own, and null here.

// Where the rows are prototypes: what they are the means of.
template <typename T>
struct Means {
  const T* support;       // [T, S, D]; null: the rows are there already
  const int64_t* labels;  // [T, S]
  int64_t shots;          // S
  T* prototypes;          // [T, N, D], written: the rows
};

// Sum or mean over all queries.
template <typename T>
struct TotalLoss {
  T* loss;                      // [1]; null: not wanted
  T* valid;                     // [1], as ReduceLoss has it
  double* partial;              // [blocks, 2], where blocks leave their sums
  unsigned long long* counter;  // [1], 0: how many have; common/cuda.h, is_last_block
  bool mean;
};

template <typename T>
struct Classify : Classes<T> {
  T* log_probs;  // [T, Q, N]; null when query_labels is given
  T* nll;        // [T, Q], 0 where ignored; null when query_labels is null, or with total.loss
  Means<T> means;
  TotalLoss<T> total;
};

// Where the gradient of a loss comes from: element t * task_stride + q * query_stride of `grad`, divided by
// *divisor. Strides of 0 read the one gradient of a reduced loss without expanding it.
template <typename T>
struct LossGradient {
  const T* grad;         // of nll [T, Q], of the reduced loss [1] (null: 1), or of log_probs [T, Q, N]
  const T* divisor;      // [1] or null
  int64_t query_stride;  // 1 or 0 with query_labels, else N
};

template <typename T>
struct ClassifyBackward : Classes<T> {
  LossGradient<T> grad;
  T* nll;     // [T, Q], as Classify finds it; or null, and always on CUDA
  T* grad_x;  // [T, Q, D]
  T* grad_y;  // [T, chunks, J, D], partial sums
  // On CUDA, with a single chunk: of the support that the rows are the means of, in place of grad_y, which is
  // then a workspace. Null otherwise.
  T* grad_support;                // [T, S, D]
  const int64_t* support_labels;  // [T, S]
  int64_t shots;
};

template <typename T>
struct ClassifyDoubleBackward : Classes<T> {
  LossGradient<T> grad;
  const T* gg_x;  // [T, Q, D]
  const T* gg_y;  // [T, J, D]
  T* grad_grad;   // [T, Q] with query_labels (before the division and the sum), else [T, Q, N]
  T* grad_x;      // [T, Q, D]
  T* grad_y;      // [T, chunks, J, D], partial sums
};

// Sum and number of the valid entries of nll; mean = sum / count is NaN when nothing is valid, as in torch.
template <typename T>
struct ReduceLoss {
  const T* nll;                 // [count], or null: only `valid` is wanted
  const int64_t* query_labels;  // [count]
  T* loss;                      // [1], or null with nll
  T* valid;                     // [1]
  bool mean;
  int64_t count;

  int64_t items() const { return 1; }
  int64_t item_cost() const { return count; }
};

METAFAST_DECLARE_KERNEL(Prototypes)
METAFAST_DECLARE_KERNEL(PrototypesBackward)
METAFAST_DECLARE_KERNEL(Pairwise)
METAFAST_DECLARE_KERNEL(PairwiseBackward)
METAFAST_DECLARE_KERNEL(PairwiseDoubleBackward)
METAFAST_DECLARE_KERNEL(RelationLayer)
METAFAST_DECLARE_KERNEL(MeanRow)
METAFAST_DECLARE_KERNEL(CentreRows)
METAFAST_DECLARE_KERNEL(FinishProducts)
METAFAST_DECLARE_KERNEL(ProductFactors)
METAFAST_DECLARE_KERNEL(AddScaledRows)
METAFAST_DECLARE_KERNEL(Classify)
METAFAST_DECLARE_KERNEL(ClassifyBackward)
METAFAST_DECLARE_KERNEL(ClassifyDoubleBackward)
METAFAST_DECLARE_KERNEL(ReduceLoss)

namespace cuda {
// How many chunks a task's queries are split into on the GPU, from the shapes and its size.
int64_t query_chunks(int64_t tasks, int64_t queries, int64_t rows, int64_t features);
// The most support examples to which ClassifyBackward spreads the gradient of their means.
constexpr int64_t kMostSpread = 4096;
// How many blocks leave partial sums in Classify's total.
template <typename T>
int64_t loss_blocks(const Classify<T>& params);
}  // namespace cuda

}  // namespace metafast
