// Compares the kernels of csrc/convolutional/cuda.cu, on the emulator, with plain loops in double. Each
// function fills one kernel's struct for a case and returns the largest error, relative to the largest number
// of the result that is meant; infinity where something was written that is not the result's.
#include <cmath>
#include <cstdint>
#include <limits>
#include <random>
#include <vector>

#include "common/ptx.h"
#include "convolutional/params.h"
#include "cuda_bf16.h"

namespace {

using namespace metafast;

constexpr double kInfinity = std::numeric_limits<double>::infinity();

std::mt19937_64 generator;

double number() { return std::normal_distribution<double>()(generator); }

struct Error {
  double largest = 0, scale = 1;
  bool broken = false;

  void add(double found, double expected) {
    if (std::isnan(found) != std::isnan(expected)) broken = true;
    if (std::isnan(expected)) return;
    largest = std::max(largest, std::fabs(found - expected));
    scale = std::max(scale, std::fabs(expected));
  }
  double relative() const { return broken ? kInfinity : largest / scale; }
};

// ---- maps with a border of one pixel, `pixel` numbers a pixel, one task behind the other ----

constexpr double kUntouched = 1234;

template <typename T>
struct Box {
  int64_t tasks, images, height, width, pixel;
  std::vector<T> data;

  Box(int64_t tasks, int64_t images, int64_t height, int64_t width, int64_t pixel, double fill)
      : tasks(tasks),
        images(images),
        height(height),
        width(width),
        pixel(pixel),
        data(tasks * images * (height + 2) * (width + 2) * pixel + 64, static_cast<T>(fill)) {}

  Maps<T> maps() {
    const int64_t row = (width + 2) * pixel, image = (height + 2) * row;
    return {data.data() + row + pixel, images * image, image, row, pixel};
  }
  Maps<const T> source() {
    const Maps<T> m = maps();
    return {m.data, m.task, m.image, m.row, m.pixel};
  }
  template <class F>
  void each(int64_t channels, F f) {
    const Maps<T> m = maps();
    for (int64_t t = 0; t < tasks; ++t)
      for (int64_t b = 0; b < images; ++b)
        for (int64_t y = 0; y < height; ++y)
          for (int64_t x = 0; x < width; ++x)
            for (int64_t c = 0; c < channels; ++c) f(m.at(t, b, y, x)[c]);
  }
  void fill_randomly(int64_t channels) {
    each(channels, [](T& value) { value = static_cast<T>(number()); });
  }
  // How many numbers are no longer what they were filled with.
  int64_t touched() const {
    int64_t count = 0;
    for (T value : data) count += !(value == static_cast<T>(kUntouched));
    return count;
  }
};

template <typename T>
std::vector<T> random_numbers(int64_t count) {
  std::vector<T> numbers(count);
  for (T& value : numbers) value = static_cast<T>(number());
  return numbers;
}

// ---- convolutions ----

struct ConvolveCase {
  int64_t tasks, images, height, width, pitch;
  int64_t taps_y, taps_x, depth, pixel;  // pixel: numbers of a pixel of the source
  int64_t stride, count, backwards, shared_weights, bias, adds, rounding;

  bool pairs() const { return static_cast<Rounding>(rounding) == Rounding::pairs; }

  // A factor as the product takes it, in bfloat16. (TF32's results are compared with those of exact factors.)
  template <typename T>
  double factor(T value) const {
    const bool bfloat16 = static_cast<Rounding>(rounding) == Rounding::bfloat16 || pairs();
    return bfloat16 && depth % kChannelBlock == 0
               ? __bfloat162float(__float2bfloat16(static_cast<float>(value)))
               : value;
  }
};

// Numbers, and those a `distance` behind them, as pairs; and the place there of a pointer into them.
template <typename T>
class Pairs {
 public:
  Pairs(const std::vector<T>& numbers, int64_t distance) : from_(numbers.data()), data_(numbers.size() / 2) {
    for (size_t i = 0; i < data_.size(); ++i) {
      const T* first = from_ + i / distance * 2 * distance + i % distance;
      const unsigned bits =
          cuda::bfloat16_pair(static_cast<float>(first[0]), static_cast<float>(first[distance]));
      data_[i] = static_cast<T>(__uint_as_float(bits));
    }
  }
  const T* at(const T* number) const { return data_.data() + (number - from_) / 2; }
  Maps<const T> at(const Maps<const T>& m) const {
    return {at(m.data), m.task / 2, m.image / 2, m.row / 2, m.pixel / 2};
  }

 private:
  const T* from_;
  std::vector<T> data_;
};

template <class Params>
void halve_source(Params& p) {
  p.depth /= 2, p.tap_row /= 2, p.tap_pixel /= 2;
}

template <typename T>
double convolve_error(const ConvolveCase& c) {
  generator.seed(1);
  // Sources begin a border before the map, and taps reach on to where they may.
  const int64_t height = c.height * c.stride + c.taps_y,
                width = c.width * c.stride + c.taps_x + c.depth / c.pixel;
  const int64_t kernel = c.taps_y * c.taps_x * c.depth * c.pitch;
  std::vector<Box<T>> sources;
  std::vector<std::vector<T>> weights;
  Convolve<T> p{};
  p.count = static_cast<int>(c.count);
  p.tasks = c.tasks, p.images = c.images, p.height = c.height, p.width = c.width, p.pitch = c.pitch;
  p.taps_y = c.taps_y, p.taps_x = c.taps_x, p.depth = c.depth;
  for (int64_t f = 0; f < c.count; ++f) {
    sources.emplace_back(c.tasks, c.images, height, width, c.pixel, 0.0);
    sources.back().fill_randomly(c.pixel);
    weights.push_back(random_numbers<T>(kernel * (c.shared_weights ? 1 : c.tasks)));
  }
  for (int64_t f = 0; f < c.count; ++f) {
    Maps<const T> source = sources[f].source();
    p.tap_row = source.row, p.tap_pixel = source.pixel;
    p.weights_row = c.taps_x * c.depth * c.pitch, p.weights_pixel = c.depth * c.pitch;
    const T* first = weights[f].data();
    if (c.backwards) {  // the same, from the last tap on
      source.data += (c.taps_y - 1) * p.tap_row + (c.taps_x - 1) * p.tap_pixel;
      first += (c.taps_y - 1) * p.weights_row + (c.taps_x - 1) * p.weights_pixel;
      p.tap_row = -p.tap_row, p.tap_pixel = -p.tap_pixel;
      p.weights_row = -p.weights_row, p.weights_pixel = -p.weights_pixel;
    }
    source.row *= c.stride, source.pixel *= c.stride;
    p.factors[f] = {source, first, c.shared_weights ? 0 : kernel};
  }
  const std::vector<T> bias = random_numbers<T>(c.tasks * c.pitch);
  if (c.bias) p.bias = bias.data(), p.bias_task = c.pitch;
  Box<T> out(c.tasks, c.images, c.height, c.width, c.pitch, kUntouched);
  if (c.adds) out.fill_randomly(c.pitch);
  p.out = out.maps();
  p.adds = c.adds, p.rounding = static_cast<Rounding>(c.rounding);

  std::vector<double> expected;
  for (int64_t t = 0; t < c.tasks; ++t)
    for (int64_t b = 0; b < c.images; ++b)
      for (int64_t y = 0; y < c.height; ++y)
        for (int64_t x = 0; x < c.width; ++x)
          for (int64_t o = 0; o < c.pitch; ++o) {
            double sum = (c.bias ? bias[t * c.pitch + o] : 0.0) + (c.adds ? p.out.at(t, b, y, x)[o] : 0.0);
            for (int64_t f = 0; f < c.count; ++f)
              for (int64_t i = 0; i < c.taps_y; ++i)
                for (int64_t j = 0; j < c.taps_x; ++j)
                  for (int64_t d = 0; d < c.depth; ++d) {
                    const auto& factor = p.factors[f];
                    const T* source = factor.source.at(t, b, y, x) + i * p.tap_row + j * p.tap_pixel;
                    const T* of_tap =
                        factor.weights + t * factor.weights_task + i * p.weights_row + j * p.weights_pixel;
                    sum += c.factor(source[d]) * c.factor(of_tap[d * c.pitch + o]);
                  }
            expected.push_back(sum);
          }
  std::vector<Pairs<T>> pairs;
  if (c.pairs()) {
    pairs.reserve(2 * c.count);
    halve_source(p);
    p.weights_row /= 2, p.weights_pixel /= 2;
    for (int64_t f = 0; f < c.count; ++f) {
      auto& factor = p.factors[f];
      factor.source = pairs.emplace_back(sources[f].data, 1).at(factor.source);
      factor.weights = pairs.emplace_back(weights[f], c.pitch).at(factor.weights);
      factor.weights_task /= 2;
    }
  }
  cuda::launch(p, nullptr);
  Error error;
  size_t i = 0;
  out.each(c.pitch, [&](T value) { error.add(value, expected[i++]); });
  if (out.touched() != static_cast<int64_t>(i)) return kInfinity;
  return error.relative();
}

template <typename T>
double weights_error(const ConvolveCase& c) {
  generator.seed(2);
  const int64_t height = c.height * c.stride + c.taps_y,
                width = c.width * c.stride + c.taps_x + c.depth / c.pixel;
  std::vector<Box<T>> sources, grads;
  ConvolveWeights<T> p{};
  p.count = static_cast<int>(c.count);
  p.tasks = c.tasks, p.images = c.images, p.height = c.height, p.width = c.width, p.pitch = c.pitch;
  p.taps_y = c.taps_y, p.taps_x = c.taps_x, p.depth = c.depth;
  p.rounding = static_cast<Rounding>(c.rounding);
  for (int64_t f = 0; f < c.count; ++f) {
    sources.emplace_back(c.tasks, c.images, height, width, c.pixel, 0.0);
    sources.back().fill_randomly(c.pixel);
    grads.emplace_back(c.tasks, c.images, c.height, c.width, c.pitch, 0.0);
    grads.back().fill_randomly(c.pitch);
  }
  for (int64_t f = 0; f < c.count; ++f) {
    Maps<const T> source = sources[f].source();
    p.tap_row = source.row, p.tap_pixel = source.pixel;
    source.row *= c.stride, source.pixel *= c.stride;
    p.factors[f] = {source, grads[f].source()};
  }
  const ConvolveWeights<T> numbers = p;
  std::vector<Pairs<T>> pairs;
  if (c.pairs()) {
    pairs.reserve(2 * c.count);
    halve_source(p);
    for (int64_t f = 0; f < c.count; ++f) {
      auto& factor = p.factors[f];
      factor.source = pairs.emplace_back(sources[f].data, 1).at(factor.source);
      factor.grad = pairs.emplace_back(grads[f].data, 1).at(factor.grad);
    }
  }
  const int64_t size = p.rows() * c.pitch;
  p.out_task = size + 2 * c.pitch;
  std::vector<T> out(c.tasks * p.out_task, static_cast<T>(kUntouched)), workspace(p.workspace_size());
  p.out = out.data();
  if (c.bias) p.out_bias = out.data() + size;
  p.workspace = workspace.data();
  cuda::launch(p, nullptr);
  Error error;
  for (int64_t t = 0; t < c.tasks; ++t)
    for (int64_t k = 0; k < p.rows() + 2; ++k)
      for (int64_t o = 0; o < c.pitch; ++o) {
        const double found = out[t * p.out_task + k * c.pitch + o];
        if (k > p.rows() || (k == p.rows() && !c.bias)) {
          if (found != kUntouched) return kInfinity;
          continue;
        }
        double sum = 0;
        for (int64_t f = 0; f < (k == p.rows() ? 1 : c.count); ++f)
          for (int64_t b = 0; b < c.images; ++b)
            for (int64_t y = 0; y < c.height; ++y)
              for (int64_t x = 0; x < c.width; ++x) {
                const T grad = numbers.factors[f].grad.at(t, b, y, x)[o];
                const int64_t tap = k / c.depth, i = tap / c.taps_x, j = tap % c.taps_x, d = k % c.depth;
                const T* source = numbers.factors[f].source.at(t, b, y, x);
                sum += k < p.rows() ? c.factor(grad) *
                                          c.factor(source[i * numbers.tap_row + j * numbers.tap_pixel + d])
                       : c.pairs()  ? c.factor(grad)
                                    : grad;
              }
        error.add(found, sum);
      }
  return error.relative();
}

// ---- norm, activation, pooling: the definition on numbers or, for the tangents, dual numbers ----

struct Dual {
  double value, tangent;
  Dual(double value = 0, double tangent = 0) : value(value), tangent(tangent) {}
};
Dual operator+(Dual a, Dual b) { return {a.value + b.value, a.tangent + b.tangent}; }
Dual operator-(Dual a, Dual b) { return {a.value - b.value, a.tangent - b.tangent}; }
Dual operator*(Dual a, Dual b) { return {a.value * b.value, a.tangent * b.value + a.value * b.tangent}; }
Dual operator/(Dual a, Dual b) {
  const double quotient = a.value / b.value;
  return {quotient, (a.tangent - quotient * b.tangent) / b.value};
}
Dual root(Dual a) {
  const double value = std::sqrt(a.value);
  return {value, a.tangent / (2 * value)};
}
Dual tanh_of(Dual a) {
  const double value = std::tanh(a.value);
  return {value, (1 - value * value) * a.tangent};
}

struct BlockCase {
  int64_t tasks, images, height, width, channels;
  int64_t norm, affine, affine_tangent, activation, pool, pools_first;
  int64_t kernel_y, kernel_x, stride_y, stride_x, padding_y, padding_x;
  int64_t values;  // 0: any, 1: few different ones, for ties, 2: far from 0, 3: a channel constant, 4: NaN
};

struct Channel {  // of a task
  std::vector<Dual> out, grad_z;
  Dual mean, var, rstd, grad_gamma, grad_beta;
};

Dual activated(int64_t activation, Dual y) {
  if (activation == 1) return y.value <= 0 ? Dual() : y;
  return activation == 2 ? tanh_of(y) : y;
}
Dual slope(int64_t activation, Dual y) {
  if (activation == 1) return y.value <= 0 ? Dual() : Dual(1);
  const Dual a = tanh_of(y);
  return activation == 2 ? Dual(1) - a * a : Dual(1);
}

// z [B, H, W], grad [B, OH, OW].
Channel define(const BlockCase& c, const BlockShape& s, const std::vector<Dual>& z, Dual gamma, Dual beta,
               const std::vector<Dual>& grad) {
  Channel r;
  const Dual count(static_cast<double>(z.size()));
  std::vector<Dual> n = z, y(z.size()), grad_y(z.size());
  if (c.norm) {
    for (Dual v : z) r.mean = r.mean + v;
    r.mean = r.mean / count;
    for (Dual v : z) r.var = r.var + (v - r.mean) * (v - r.mean) / count;
    r.rstd = Dual(1) / root(r.var + Dual(s.eps));
    for (size_t i = 0; i < z.size(); ++i) n[i] = (z[i] - r.mean) * r.rstd;
  }
  for (size_t i = 0; i < z.size(); ++i) y[i] = gamma * n[i] + beta;
  for (int64_t b = 0; b < s.images; ++b)
    for (int64_t oy = 0; oy < s.out_height; ++oy)
      for (int64_t ox = 0; ox < s.out_width; ++ox) {
        const Dual g = grad[(b * s.out_height + oy) * s.out_width + ox];
        const auto at = [&](int64_t yy, int64_t xx) { return (b * s.height + yy) * s.width + xx; };
        if (c.pool == 0) {
          r.out.push_back(activated(c.activation, y[at(oy, ox)]));
          grad_y[at(oy, ox)] = g * slope(c.activation, y[at(oy, ox)]);
          continue;
        }
        std::vector<int64_t> window;
        for (int64_t i = 0; i < c.kernel_y; ++i)
          for (int64_t j = 0; j < c.kernel_x; ++j) {
            const int64_t yy = oy * c.stride_y - c.padding_y + i, xx = ox * c.stride_x - c.padding_x + j;
            if (yy >= 0 && yy < s.height && xx >= 0 && xx < s.width) window.push_back(at(yy, xx));
          }
        const auto of = [&](int64_t i) { return c.pools_first ? y[i] : activated(c.activation, y[i]); };
        Dual pooled;
        std::vector<Dual> shares(window.size());
        if (c.pool == 1) {
          size_t best = 0;
          for (size_t i = 1; i < window.size(); ++i) {
            const double value = of(window[i]).value;
            if (value > of(window[best]).value || std::isnan(value)) best = i;
          }
          pooled = of(window[best]);
          shares[best] = Dual(1);
        } else {
          const Dual share(1.0 / static_cast<double>(c.kernel_y * c.kernel_x));
          for (int64_t i : window) pooled = pooled + of(i);
          pooled = pooled * share;
          shares.assign(window.size(), share);
        }
        r.out.push_back(c.pools_first ? activated(c.activation, pooled) : pooled);
        for (size_t i = 0; i < window.size(); ++i) {
          const Dual at_slope = slope(c.activation, c.pools_first ? pooled : y[window[i]]);
          if (shares[i].value != 0) grad_y[window[i]] = grad_y[window[i]] + g * shares[i] * at_slope;
        }
      }
  for (size_t i = 0; i < z.size(); ++i) {
    r.grad_gamma = r.grad_gamma + grad_y[i] * n[i];
    r.grad_beta = r.grad_beta + grad_y[i];
  }
  for (size_t i = 0; i < z.size(); ++i) {
    r.grad_z.push_back(c.norm
                           ? gamma * r.rstd * (grad_y[i] - r.grad_beta / count - n[i] * r.grad_gamma / count)
                           : grad_y[i]);
  }
  return r;
}

template <typename T>
double block_error(const BlockCase& c) {
  generator.seed(3);
  BlockShape s{};
  s.tasks = c.tasks, s.images = c.images, s.height = c.height, s.width = c.width;
  s.pitch = pitch_of(c.channels);
  s.norm = c.norm, s.eps = 1e-5;
  s.activation = static_cast<MapActivation>(c.activation), s.pool = static_cast<Pool>(c.pool);
  s.pools_first = c.pools_first;
  s.pool_height = c.kernel_y, s.pool_width = c.kernel_x;
  s.pool_stride_y = c.stride_y, s.pool_stride_x = c.stride_x;
  s.pool_padding_y = c.padding_y, s.pool_padding_x = c.padding_x;
  s.out_height = c.pool ? (c.height + 2 * c.padding_y - c.kernel_y) / c.stride_y + 1 : c.height;
  s.out_width = c.pool ? (c.width + 2 * c.padding_x - c.kernel_x) / c.stride_x + 1 : c.width;

  const auto maps = [&](bool of_out, bool is_result) {
    Box<T> box(c.tasks, c.images, of_out ? s.out_height : c.height, of_out ? s.out_width : c.width, s.pitch,
               is_result ? kUntouched : 0);
    if (!is_result) box.fill_randomly(c.channels);
    return box;
  };
  Box<T> z = maps(false, false), dz = maps(false, false), grad = maps(true, false), dgrad = maps(true, false);
  int64_t index = 0;
  z.each(s.pitch, [&](T& value) {
    const int64_t channel = index++ % s.pitch;
    if (c.values == 1) value = std::round(value);
    if (c.values == 2) value = static_cast<T>(1000 + value);
    if (c.values == 3 && channel == 1) value = static_cast<T>(0.75);
    if (c.values == 4 && channel == 1 && index % 7 == 0) value = std::numeric_limits<T>::quiet_NaN();
  });
  Box<T> out = maps(true, true), dout = maps(true, true);
  Box<T> grad_z1 = maps(false, true), grad_z = maps(false, true), dgrad_z = maps(false, true);
  const int64_t size = c.tasks * s.pitch;
  std::vector<T> affine[4], statistics[5], gradients[2][2], workspace(s.workspace_size());
  for (auto& numbers : affine) {
    numbers = random_numbers<T>(size);
    for (int64_t i = 0; i < size; ++i) numbers[i] = i % s.pitch < c.channels ? numbers[i] : T(0);
  }
  for (auto& numbers : statistics) numbers.assign(size, static_cast<T>(kUntouched));
  for (auto& pair : gradients)
    for (auto& numbers : pair) numbers.assign(size, static_cast<T>(kUntouched));

  const auto set = [&](auto& p, bool tangent) {
    p.shape = s;
    p.z = z.source();
    p.affine_task = p.tangent_task = s.pitch;
    if (c.affine) p.gamma = affine[0].data(), p.beta = affine[1].data();
    if (tangent) {
      p.z_tangent = dz.source();
      if (c.affine && c.affine_tangent) p.gamma_tangent = affine[2].data(), p.beta_tangent = affine[3].data();
    }
    p.mean = statistics[0].data(), p.rstd = statistics[1].data();
    p.mean_tangent = statistics[3].data(), p.scale_tangent = statistics[4].data();
    p.workspace = workspace.data();
  };
  for (const bool tangent : {false, true}) {
    BlockForward<T> p{};
    set(p, tangent);
    p.var = statistics[2].data();
    if (tangent) p.out_tangent = dout.maps();
    if (!tangent) p.out = out.maps();
    cuda::launch(p, nullptr);
  }
  for (const bool tangent : {false, true}) {
    BlockBackward<T> p{};
    set(p, tangent);
    p.grad = grad.source();
    if (tangent) p.grad_tangent = dgrad.source();
    p.grad_z = tangent ? grad_z.maps() : grad_z1.maps();
    if (tangent) p.grad_z_tangent = dgrad_z.maps();
    if (c.norm && c.affine)
      p.grad_gamma = gradients[tangent][0].data(), p.grad_beta = gradients[tangent][1].data();
    p.grad_task = s.pitch;
    cuda::launch(p, nullptr);
  }

  std::vector<Error> errors(14);
  for (int64_t t = 0; t < c.tasks; ++t)
    for (int64_t channel = 0; channel < c.channels; ++channel) {
      const int64_t i = t * s.pitch + channel;
      const auto collect = [&](Box<T>& values, Box<T>& tangents) {
        std::vector<Dual> all;
        for (int64_t b = 0; b < c.images; ++b)
          for (int64_t y = 0; y < values.height; ++y)
            for (int64_t x = 0; x < values.width; ++x) {
              all.emplace_back(values.maps().at(t, b, y, x)[channel],
                               tangents.maps().at(t, b, y, x)[channel]);
            }
        return all;
      };
      const Dual gamma = !c.affine ? Dual(1) : Dual(affine[0][i], c.affine_tangent ? affine[2][i] : T(0));
      const Dual beta = !c.affine ? Dual() : Dual(affine[1][i], c.affine_tangent ? affine[3][i] : T(0));
      const Channel r = define(c, s, collect(z, dz), gamma, beta, collect(grad, dgrad));
      const std::vector<Dual> found = collect(out, dout), first = collect(grad_z1, grad_z),
                              second = collect(grad_z, dgrad_z);
      for (size_t k = 0; k < found.size(); ++k) {
        errors[0].add(found[k].value, r.out[k].value);
        errors[1].add(found[k].tangent, r.out[k].tangent);
      }
      for (size_t k = 0; k < first.size(); ++k) {
        errors[2].add(first[k].value, r.grad_z[k].value);
        errors[3].add(second[k].value, r.grad_z[k].value);
        errors[4].add(second[k].tangent, r.grad_z[k].tangent);
      }
      if (!c.norm) continue;
      errors[5].add(statistics[0][i], r.mean.value);
      errors[6].add(statistics[1][i], r.rstd.value);
      errors[7].add(statistics[2][i], r.var.value);
      errors[8].add(statistics[3][i], r.mean.tangent);
      errors[9].add(statistics[4][i], -r.rstd.tangent / (r.rstd.value * r.rstd.value));
      if (!c.affine) continue;
      errors[10].add(gradients[0][0][i], r.grad_gamma.value);
      errors[11].add(gradients[0][1][i], r.grad_beta.value);
      errors[12].add(gradients[1][0][i], r.grad_gamma.tangent);
      errors[13].add(gradients[1][1][i], r.grad_beta.tangent);
    }
  double largest = 0;
  for (const Error& error : errors) largest = std::max(largest, error.relative());
  // The channels behind are zero, the border is as it was.
  for (Box<T>* box : {&out, &dout, &grad_z1, &grad_z, &dgrad_z}) {
    int64_t index = 0, others = 0;
    box->each(s.pitch, [&](T value) { others += index++ % s.pitch >= c.channels && value != T(0); });
    if (others > 0 || box->touched() != index) return kInfinity;
  }
  return largest;
}

// ---- layouts ----

struct PermuteCase {
  int64_t size[5], order[5], pad;  // order: which dimension of `in`, as it lies in memory, is each of out
};

template <typename T>
double permute_error(const PermuteCase& c) {
  generator.seed(4);
  Permute<T> p{};
  int64_t in_stride[5], in_size[5], count = 1, out_count = 1;
  for (int d = 0; d < 5; ++d) in_size[c.order[d]] = c.size[d];
  for (int d = 4; d >= 0; --d) in_stride[d] = count, count *= in_size[d];
  for (int d = 4; d >= 0; --d) {
    p.size[d] = c.size[d];
    p.in_stride[d] = in_stride[c.order[d]];
    p.out_stride[d] = out_count;
    out_count *= d == 4 ? c.pad + 1 : c.size[d];
  }
  p.pad = c.pad;
  const std::vector<T> in = random_numbers<T>(count);
  std::vector<T> out(out_count, static_cast<T>(kUntouched));
  p.in = in.data(), p.out = out.data();
  cuda::launch(p, nullptr);
  Error error;
  for (int64_t i = 0; i < out_count; ++i) {
    int64_t rest = i, from = 0;
    const int64_t last = rest % (c.pad + 1);
    rest /= c.pad + 1;
    for (int d = 3; d >= 0; --d) from += rest % c.size[d] * p.in_stride[d], rest /= c.size[d];
    const double expected = last == c.pad      ? kUntouched
                            : last < c.size[4] ? in[from + last * p.in_stride[4]]
                                               : T(0);
    error.add(out[i], expected);
  }
  return error.relative();
}

}  // namespace

extern "C" {

double convolve_error_float(const ConvolveCase* c) { return convolve_error<float>(*c); }
double convolve_error_double(const ConvolveCase* c) { return convolve_error<double>(*c); }
double weights_error_float(const ConvolveCase* c) { return weights_error<float>(*c); }
double weights_error_double(const ConvolveCase* c) { return weights_error<double>(*c); }
double block_error_float(const BlockCase* c) { return block_error<float>(*c); }
double block_error_double(const BlockCase* c) { return block_error<double>(*c); }
double permute_error_float(const PermuteCase* c) { return permute_error<float>(*c); }
double permute_error_double(const PermuteCase* c) { return permute_error<double>(*c); }
}
