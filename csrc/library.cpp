// Every op of metafast and its schema: the table of contents. csrc/<family>/op.cpp implements them for CPU
// and CUDA, autograd.cpp differentiates them, metafast/_dispatch/fakes.py gives their shapes to
// torch.compile.
//
// "..." are leading batch dimensions, the same on all tensors of a call. T tasks, S support, Q queries, N
// classes, D features, K steps, L layers, I inputs and O outputs of a layer. Labels are int64; -100 means
// ignored.
#include <torch/library.h>

// TORCH_LIBRARY pastes its argument, so the macro has to be expanded before.
#define METAFAST_LIBRARY(name, m) TORCH_LIBRARY(name, m)

METAFAST_LIBRARY(METAFAST_NAMESPACE, m) {
  // ---- pairwise ----

  // Class means: embeddings [..., S, D], labels [..., S] -> [..., N, D].
  m.def("prototypes(Tensor embeddings, Tensor labels, SymInt num_classes) -> Tensor");
  // grad[label] / number of examples of the label, 0 where ignored: grad [..., N, D], labels [..., S] ->
  // [..., S, D].
  m.def("prototypes_backward(Tensor grad, Tensor labels) -> Tensor");

  // x [..., Q, D], y [..., N, D], weight [D], bias [1] -> [..., Q, N]: link(bias + sum_d weight_d * term(x_d,
  // y_d)).
  //   metric         term        link
  //   sqeuclidean    (x - y)^2   identity; weight optional
  //   euclidean      (x - y)^2   square root, with gradient 0 at 0
  //   cityblock      |x - y|     identity; weight optional
  //   dot            -x y        identity
  //   cosine         -x y        1 + sum / (max(|x|, 1e-8) max(|y|, 1e-8))
  //   relation_relu  relu(x + y) sigmoid; weight and bias required
  //   relation_tanh  tanh(x + y) sigmoid; weight and bias required
  m.def("pairwise(Tensor x, Tensor y, Tensor? weight, Tensor? bias, str metric) -> Tensor");
  // -> grad_x, grad_y, grad_weight, grad_bias; the last two of size 0 without weight, without bias.
  m.def(
      "pairwise_backward(Tensor grad, Tensor x, Tensor y, Tensor? weight, Tensor? bias, Tensor out, "
      "str metric) -> (Tensor, Tensor, Tensor, Tensor)");
  // -> grad_grad, grad_x, grad_y, grad_weight, grad_bias
  m.def(
      "pairwise_double_backward(Tensor gg_x, Tensor gg_y, Tensor? gg_weight, Tensor? gg_bias, Tensor grad, "
      "Tensor x, Tensor y, Tensor? weight, Tensor? bias, Tensor out, str metric) -> (Tensor, Tensor, "
      "Tensor, Tensor, Tensor)");

  // The first layer of a relation head, split: query [..., Q, D], prototypes [..., N, D], weight [H, 2 D],
  // bias [H], float or double -> Wq q + bias [..., Q, H], Wp p [..., N, H]. Leading dimensions may differ.
  m.def("relation_layer(Tensor query, Tensor prototypes, Tensor weight, Tensor bias) -> (Tensor, Tensor)");
  // A relation head: relation_layer, then pairwise with metric relation_relu or relation_tanh. Arguments as
  // theirs, but out_weight [H] or [1, H], out_bias [] or [1] -> [..., Q, N].
  m.def(
      "relation_scores(Tensor query, Tensor prototypes, Tensor weight, Tensor bias, Tensor out_weight, "
      "Tensor out_bias, str metric) -> Tensor");

  // Class log-probabilities or their loss, from logits -scale * distance(query, row):
  //   method prototypical  rows are the class means of the support; softmax over classes
  //   method matching      rows are the support examples; softmax over them, summed within each class
  // support [..., S, D], support_labels [..., S], query [..., Q, D], query_labels [..., Q], ways [...] ->
  // out, rows, valid. Without query_labels out is log p [..., Q, N]; with them -log p of the label: reduction
  // 0 [..., Q], 0 where ignored; 1 their mean over the valid queries; 2 their sum. Classes from ways[t] on
  // are absent: -inf, no gradient. The backward takes rows (prototypes, else size 0) and valid (how many
  // queries, size 0 without reduction).
  m.def(
      "classify(Tensor support, Tensor support_labels, Tensor query, Tensor? query_labels, Tensor? ways, "
      "SymInt num_classes, str method, str metric, float scale, int reduction) -> (Tensor, Tensor, Tensor)");
  // classify with a reduction, and on its way the gradients of the result: -> out, rows, valid, grad_support,
  // grad_query. It cannot be differentiated.
  m.def(
      "classify_with_gradients(Tensor support, Tensor support_labels, Tensor query, Tensor query_labels, "
      "Tensor? ways, SymInt num_classes, str method, str metric, float scale, int reduction) -> (Tensor, "
      "Tensor, Tensor, Tensor, Tensor)");
  // -> grad_support, grad_query
  m.def(
      "classify_backward(Tensor grad, Tensor support, Tensor support_labels, Tensor query, "
      "Tensor? query_labels, Tensor? ways, Tensor rows, Tensor valid, SymInt num_classes, str method, "
      "str metric, float scale, int reduction) -> (Tensor, Tensor)");
  // -> grad_grad, grad_support, grad_query
  m.def(
      "classify_double_backward(Tensor gg_support, Tensor gg_query, Tensor grad, Tensor support, "
      "Tensor support_labels, Tensor query, Tensor? query_labels, Tensor? ways, Tensor rows, Tensor valid, "
      "SymInt num_classes, str method, str metric, float scale, int reduction) -> (Tensor, Tensor, Tensor)");

  // ---- inner loop ----
  //
  // An MLP is params = [W1, b1, ..., WL, bL], each shared by all tasks ([O, I], [O]) or of each task ([T, O,
  // I], [T, O]). x [T, S, D], y [T, S, O] for loss mse or int64 [T, S] for cross_entropy. lr is one tensor,
  // [] or [K, L], or one for each parameter, of its shape. activation: relu, tanh or none.

  // K = steps steps of SGD on each task -> the adapted parameters, each [T, ...]. example_weights [T, S]: of
  // the examples in their task's mean; 0 leaves one out, whatever it holds.
  m.def(
      "inner_sgd(Tensor[] params, Tensor x, Tensor y, Tensor[] lr, Tensor? example_weights, str loss, "
      "int steps, str activation, float momentum, bool first_order) -> Tensor[]");
  // grads: of the adapted parameters. -> gradients of params, lr, x, y, example_weights, in one list; of size
  // 0 where not wanted (wanted: params, lr, x, y, example_weights). It cannot be differentiated.
  m.def(
      "inner_sgd_backward(Tensor[] grads, Tensor[] params, Tensor x, Tensor y, Tensor[] lr, "
      "Tensor? example_weights, str loss, int steps, str activation, float momentum, bool first_order, "
      "bool[5] wanted) -> Tensor[]");

  // The query loss after inner_sgd on the support: [T], or with `mean` their mean []. With step_weights [K],
  // the sum of the losses after each step, weighed. support_weights [T, S], query_weights [T, Q]: as
  // example_weights.
  m.def(
      "maml_loss(Tensor[] params, Tensor support_x, Tensor support_y, Tensor query_x, Tensor query_y, "
      "Tensor[] lr, Tensor? step_weights, Tensor? support_weights, Tensor? query_weights, str loss, "
      "int steps, str activation, float momentum, bool first_order, bool mean) -> Tensor");
  // grad: of the result. -> the result again, and gradients as of inner_sgd_backward (wanted: params, lr,
  // support_x, support_y, query_x, query_y, step_weights, support_weights, query_weights).
  m.def(
      "maml_loss_backward(Tensor grad, Tensor[] params, Tensor support_x, Tensor support_y, "
      "Tensor query_x, Tensor query_y, Tensor[] lr, Tensor? step_weights, Tensor? support_weights, "
      "Tensor? query_weights, str loss, int steps, str activation, float momentum, bool first_order, "
      "bool mean, bool[9] wanted) -> (Tensor, Tensor[])");

  // One step of SGD on many tensors. lr: one tensor, or one for each of params, that broadcasts to it.
  // momentum_buffers may be empty: zeros. -> the new params, the new buffers (none without momentum).
  m.def(
      "sgd_update(Tensor[] params, Tensor[] grads, Tensor[] lr, Tensor[] momentum_buffers, float momentum, "
      "float weight_decay, bool nesterov) -> (Tensor[], Tensor[])");
  // x [T, B, I], weight [T, O, I], bias [T, O] -> [T, B, O].
  m.def("task_linear(Tensor x, Tensor weight, Tensor bias) -> Tensor");

  // ---- convolutional networks ----
  //
  // A chain of L blocks: convolution (or linear), batch norm, activation, pooling. network: 17 numbers a
  // block,
  //   kernel (height, width; 0, 0: linear, over all of the map), stride (2), padding (2), bias (0, 1),
  //   norm (0 none, 1 without, 2 with gamma and beta), activation (0 none, 1 relu, 2 tanh),
  //   pool (0 none, 1 max, 2 average), its kernel (2; 0, 0: the whole map), stride (2), padding (2),
  //   whether it stands before the activation (0, 1)
  // and eps, a number a block. params are, block by block, weight [O, C, kh, kw] (linear: [O, C H W]), bias
  // [O] if any, gamma [O] and beta [O] if any, each shared by all tasks or of each task ([T, ...]). x [T, B,
  // C, H, W]. Batch norm uses the statistics of the task's images. The last block is linear. product_dtype:
  // of what convolutions multiply, where params are float32 on CUDA: bfloat16; float16, whose mantissa TF32
  // has; None: as torch's switch for TF32 says. Results, and all between products, are float32.

  // K = steps steps of SGD on each task; y [T, B, O] for loss mse or int64 [T, B] for cross_entropy; lr as of
  // inner_sgd, [K, L] by block. example_weights [T, B]: of the examples in their task's mean; with 0 batch
  // norm alone sees one. -> the adapted parameters, each [T, ...]; the mean and the variance (divided
  // by the number of pixels) of each step's batch, [K, 2, T, channels of all blocks with norm]; and what
  // the backward needs of the steps, [keep, K, T, P]: with keep 1 the parameters, with 2 the momentum buffers
  // as well, for gradients of lr; with 0 size 0.
  m.def(
      "conv_inner_sgd(Tensor[] params, Tensor x, Tensor y, Tensor[] lr, Tensor? example_weights, "
      "int[] network, float[] eps, str loss, int steps, float momentum, bool first_order, "
      "ScalarType? product_dtype, int keep) -> (Tensor[], Tensor, Tensor)");
  // grads: of the adapted parameters. -> gradients of params, lr, x, y, example_weights, in one list; of size
  // 0 where not wanted (wanted: params, lr, x, y, example_weights). It cannot be differentiated.
  m.def(
      "conv_inner_sgd_backward(Tensor[] grads, Tensor[] params, Tensor x, Tensor y, Tensor[] lr, "
      "Tensor? example_weights, Tensor kept, int[] network, float[] eps, str loss, int steps, "
      "float momentum, bool first_order, ScalarType? product_dtype, bool[5] wanted) -> Tensor[]");
  // The networks' outputs [T, B, O], and, if `keep`, what the backward needs, else size 0.
  m.def(
      "conv_forward(Tensor[] params, Tensor x, int[] network, float[] eps, ScalarType? product_dtype, bool "
      "keep) -> (Tensor, Tensor)");
  // grad: of the outputs. -> gradients of params and x, in one list; of size 0 where not wanted (wanted:
  // params, x). It cannot be differentiated.
  m.def(
      "conv_forward_backward(Tensor grad, Tensor[] params, Tensor x, Tensor kept, int[] network, float[] "
      "eps, ScalarType? product_dtype, bool[2] wanted) -> Tensor[]");

  // A convolution of each task's own: x [T, B, C, H, W], weight [T, O, C, kh, kw], bias [T, O] -> [T, B, O,
  // H', W'].
  m.def(
      "task_conv2d(Tensor x, Tensor weight, Tensor? bias=None, SymInt[2] stride=1, SymInt[2] padding=0) -> "
      "Tensor");
  // Its products: maps [T, B, O, H', W'], and the gradients of x and of weight from that of the maps, with
  // the size [H, W] of the images or [kh, kw] of the kernels. Each one's derivatives are the other two.
  m.def("task_conv2d_maps(Tensor x, Tensor weight, SymInt[2] stride, SymInt[2] padding) -> Tensor");
  m.def(
      "task_conv2d_images(Tensor grad, Tensor weight, SymInt[2] size, SymInt[2] stride, SymInt[2] padding) "
      "-> Tensor");
  m.def(
      "task_conv2d_weight(Tensor x, Tensor grad, SymInt[2] size, SymInt[2] stride, SymInt[2] padding) -> "
      "Tensor");

  // ---- learned optimizer ----
  //
  // An LSTM that all coordinates (elements) of a list of tensors share. weights = [W_ih [4H, I], W_hh [4H,
  // H], b [4H]] of each of L layers, gates in torch's order i f g o, then W, b of the head:
  //   head update  theta_k = theta_{k-1} + scale (W h + b), W [1, H]; without params the steps alone
  //   head gates   theta_k = f theta_{k-1} - i grad, (i, f) = sigmoid(W [h; theta_{k-1}; own gate before] +
  //   b),
  //                W [2, H + 2]; params required, L may be 0: h is then the inputs
  // Inputs: with preprocess log_sign (log(|g|) / p, sign(g)) where |g| >= exp(-p), else (-1, exp(p) g), I =
  // 2; with none g, I = 1. With losses, a loss's own two log-sign inputs follow, the same for all
  // coordinates: I is 2 more. state [B, R, 64]: coordinate i of a tensor is place i % 64 of the tensor's
  // block i / 64, each tensor beginning a block of its own; rows h, c [H] of each layer, with gates then i,
  // f; 0 behind a tensor's last coordinate. It may be bfloat16 beside float32.

  // One step, grads of the shapes of params, losses []; or unrolled: grads [K, ...], losses [K], results
  // [K, ...]. -> results, the new state.
  m.def(
      "lstm_unroll(Tensor[] grads, Tensor[] params, Tensor? losses, Tensor state, Tensor[] weights, str "
      "head, "
      "str preprocess, float p, float scale, bool unrolled) -> (Tensor[], Tensor)");
  // -> gradients of grads, params, losses if there are any, state, weights, in one list; of size 0 where not
  // wanted. It cannot be differentiated.
  m.def(
      "lstm_unroll_backward(Tensor[] grad_out, Tensor? grad_state, Tensor[] grads, Tensor[] params, "
      "Tensor? losses, Tensor state, Tensor[] weights, str head, str preprocess, float p, float scale, "
      "bool unrolled, bool[5] wanted) -> Tensor[]");
  // One step in place.
  m.def(
      "lstm_step_(Tensor(a!)[] params, Tensor[] grads, Tensor? loss, Tensor(b!) state, Tensor[] weights, "
      "str head, str preprocess, float p, float scale) -> ()");
}
