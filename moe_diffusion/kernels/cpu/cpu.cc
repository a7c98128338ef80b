// Products of rows with their experts' matrices, and sums over an expert's rows, for XLA on CPUs.
//
// cpu.py calls these functions and describes them. They stand on the blocked product of
// cpu_product.h and add two things: the copy of the left operand follows a list of tokens, so that
// gathering costs nothing; and results can be written to the places of those tokens.
//
// One thread sums each result, in an order that depends only on the shapes and the plan. So two
// runs give the same bits.

#include <algorithm>
#include <cstdint>
#include <vector>

#include "cpu_product.h"
#include "cpu_threads.h"
#include "xla/ffi/api/ffi.h"

namespace {

namespace ffi = xla::ffi;
using Floats = ffi::Buffer<ffi::F32>;
using Integers = ffi::Buffer<ffi::S32>;

// The rows of a matrix, found by number or by token. A token that does not exist has no row.
struct Rows {
  const float* data;
  Index num, width;
  const int32_t* token;  // nullptr: by number

  const float* operator[](Index row) const {
    const Index place = token ? token[row] : row;
    return 0 <= place && place < num ? data + place * width : nullptr;
  }
};

Rows rows_of(const Floats& array, const Integers* token) {
  const auto shape = array.dimensions();
  return {array.typed_data(), shape[0], shape[1], token ? token->typed_data() : nullptr};
}

// ---- the plan ----------------------------------------------------------------------------------

// The TilePlan of kernels/tiles.py with tiles of one row, made by counting: token, expert i32[N] ->
// row_token, assignment, owner i32[R], row i32[N], start, end i32[E].
ffi::Error plan(Integers token, Integers expert, ffi::Result<Integers> row_token,
                ffi::Result<Integers> assignment, ffi::Result<Integers> owner,
                ffi::Result<Integers> row, ffi::Result<Integers> start, ffi::Result<Integers> end,
                int64_t num_tokens) {
  const int32_t num = expert.element_count(), num_rows = owner->element_count();
  const int32_t num_experts = start->element_count();
  const int32_t* chosen = expert.typed_data();
  std::vector<int32_t> next(num_experts + 1, 0);
  for (int32_t n = 0; n < num; ++n) ++next[std::clamp(chosen[n], 0, num_experts)];
  int32_t place = 0;
  for (int32_t e = 0; e < num_experts; ++e) {
    start->typed_data()[e] = place;
    const int32_t stop = place + std::max(1, next[e]);
    next[e] = place;
    std::fill(owner->typed_data() + place, owner->typed_data() + stop, e);
    end->typed_data()[e] = place = stop;
  }
  std::fill(owner->typed_data() + place, owner->typed_data() + num_rows, num_experts - 1);
  std::fill_n(assignment->typed_data(), num_rows, num);
  std::fill_n(row_token->typed_data(), num_rows, static_cast<int32_t>(num_tokens));
  for (int32_t n = 0; n < num; ++n) {
    const int32_t e = std::clamp(chosen[n], 0, num_experts);
    row->typed_data()[n] = e == num_experts ? num_rows : next[e]++;
    if (e == num_experts) continue;
    assignment->typed_data()[row->typed_data()[n]] = n;
    row_token->typed_data()[row->typed_data()[n]] = token.typed_data()[n];
  }
  return ffi::Error::Success();
}

// ---- rows times their experts' matrices --------------------------------------------------------

struct Product {
  Rows left;
  const float* weight;  // of all experts
  const float* bias;    // of all experts, or nullptr
  float* out;
};

struct Task {
  Index expert, begin, end;  // rows
};

struct RowProducts {
  std::vector<Product> products;
  bool sum;     // of all products, in one `out`; else each has its own
  bool turned;  // weights are [columns, depth]
  Index depth, columns;
  const int32_t* token;  // where a row's result goes; nullptr: in the order of the rows
  Index num_tokens;
  const float* scale;  // of each row, or nullptr

  void operator()(const Task& task) const {
    float* left = block(0, (kTall + kRows) * kPitch);
    for (Index k = 0; k < depth; k += kDepth)
      for (size_t p = 0; p < products.size(); ++p) {
        const Product& product = products[p];
        const Index deep = std::min(kDepth, depth - k);
        if (p == 0 || product.left.data != products[p - 1].left.data)
          copy_left(task, product.left, k, deep, left);
        const float* weight = product.weight + task.expert * depth * columns;
        const bool first = k == 0 && !(sum && p > 0);
        const bool last = k + deep == depth && !(sum && p + 1 < products.size());
        for (Index n = 0; n < columns; n += kWide) {
          const Index wide = std::min(kWide, columns - n);
          float* right = block(1, parts(wide, kColumns) * panel(deep, kColumns));
          if (turned)
            copy_turned(weight + n * depth + k, depth, deep, wide, right);
          else
            copy_right(weight + k * columns + n, columns, deep, wide, right);
          multiply_block(task, product, left, right, deep, n, wide, first, last);
        }
      }
  }

  void copy_left(const Task& task, const Rows& rows, Index k, Index deep, float* to) const {
    for (Index row = task.begin; row < task.end; ++row, to += kPitch) {
      if (row + kAhead < task.end) fetch(rows[row + kAhead], k, deep);
      const float* from = rows[row];
      cut<kLanes, kLanes>(from ? from + k : nullptr, deep, kLanes, to);
    }
  }

  void multiply_block(const Task& task, const Product& product, const float* left,
                      const float* right, Index deep, Index n, Index wide, bool first,
                      bool last) const {
    const float* bias = product.bias ? product.bias + task.expert * columns + n : nullptr;
    alignas(64) float tile[kRows * kColumns];
    float* out[kRows];
    for (Index c = 0; c < wide; c += kColumns, right += panel(deep, kColumns)) {
      const Index narrow = std::min<Index>(kColumns, wide - c);
      for (Index row = task.begin; row < task.end; row += kRows) {
        const Index count = std::min<Index>(kRows, task.end - row);
        for (Index m = 0; m < count; ++m) {
          const Index place = token ? token[row + m] : row + m;
          const bool wanted = !token || (0 <= place && place < num_tokens);
          out[m] = wanted ? product.out + place * columns + n + c : nullptr;
          if (wanted) expect(out[m], narrow);
        }
        kUpright[count - 1](deep, left + (row - task.begin) * kPitch, right, tile);
        for (Index m = 0; m < count; ++m)
          if (out[m])
            put(tile + m * kColumns, narrow, bias ? bias + c : nullptr, !first,
                last && scale ? scale[row + m] : 1, out[m]);
      }
    }
  }
};

ffi::Error row_products(ffi::ThreadPool pool, Integers token, Integers start, Integers end,
                        ffi::RemainingArgs operands, ffi::RemainingRets results, bool gather,
                        bool in_place, bool turned, bool bias, bool scaled) {
  const size_t num_products = (operands.size() - scaled) / (bias ? 3 : 2);
  RowProducts run;
  run.sum = results.size() < num_products;
  run.turned = turned;
  Index num_results = 0;
  for (size_t p = 0; p < num_products; ++p) {
    const auto left = operands.get<Floats>(p);
    const auto weight = operands.get<Floats>(num_products + p);
    auto out = results.get<Floats>(run.sum ? 0 : p);
    if (!left || !weight || !out) return ffi::Error::InvalidArgument("expected arrays of float32");
    const float* biases = nullptr;
    if (bias) {
      const auto given = operands.get<Floats>(2 * num_products + p);
      if (!given) return given.error();
      biases = given->typed_data();
    }
    run.products.push_back({rows_of(*left, gather ? &token : nullptr), weight->typed_data(), biases,
                            (*out)->typed_data()});
    run.depth = left->dimensions()[1];
    num_results = (*out)->dimensions()[0];
    run.columns = (*out)->dimensions()[1];
  }
  run.token = in_place ? token.typed_data() : nullptr;
  run.num_tokens = num_results;
  run.scale = nullptr;
  if (scaled) {
    const auto scale = operands.get<Floats>(operands.size() - 1);
    if (!scale) return scale.error();
    run.scale = scale->typed_data();
  }

  std::vector<Task> tasks;
  const Index num_experts = start.dimensions()[0], tall = height(token.element_count(), pool);
  for (Index expert = 0; expert < num_experts; ++expert) {
    const Index begin = start.typed_data()[expert], stop = end.typed_data()[expert];
    const Index num = parts(stop - begin, tall);
    for (Index i = 0; i < num; ++i)
      tasks.push_back({expert, begin + (stop - begin) * i / num,
                       begin + (stop - begin) * (i + 1) / num});
  }
  // Rows that belong to no expert are zero, and so are tokens without a row.
  Index used = end.typed_data()[num_experts - 1];
  if (in_place) {
    const int32_t *first = token.typed_data(), *past = first + token.element_count();
    const Index served = std::count_if(first, past, [=](Index t) { return t < num_results; });
    used = served < num_results ? 0 : num_results;
  }
  for (const Product& product : run.products)
    std::fill(product.out + used * run.columns, product.out + num_results * run.columns, 0.0f);
  parallel(pool, tasks.size(), [&](Index i) { run(tasks[i]); });
  return ffi::Error::Success();
}

// ---- sums over an expert's rows ----------------------------------------------------------------

struct Outer {
  Rows right;
  float* out;  // of all experts
};

struct OuterProducts {
  Rows left;
  std::vector<Outer> products;

  // Results from row `top` to `bottom` of the expert whose rows are begin:end.
  void operator()(const Task& task, Index top, Index bottom) const {
    const Index tall = bottom - top;
    for (Index k = task.begin; k < task.end; k += kDepth) {
      const Index deep = std::min(kDepth, task.end - k);
      const Index apart = panel(deep, kStep);
      float* turned = block(0, parts(tall, kRows) * apart);
      for (Index i = 0; i < deep; ++i) {
        if (i + kAhead < deep) fetch(left[k + i + kAhead], top, tall);
        const float* from = left[k + i];
        cut<kRows, kStep>(from ? from + top : nullptr, tall, apart, turned + i * kStep);
      }
      for (const Outer& product : products) {
        const Index columns = product.right.width;
        float* out = product.out + (task.expert * left.width + top) * columns;
        for (Index n = 0; n < columns; n += kWide) {
          const Index wide = std::min(kWide, columns - n);
          float* right = block(1, parts(wide, kColumns) * panel(deep, kColumns));
          for (Index i = 0; i < deep; ++i) {
            if (i + kAhead < deep) fetch(product.right[k + i + kAhead], n, wide);
            const float* from = product.right[k + i];
            cut<kColumns, kColumns>(from ? from + n : nullptr, wide, panel(deep, kColumns),
                                    right + i * kColumns);
          }
          multiply_block(turned, right, deep, tall, wide, k > task.begin, out + n, columns);
        }
      }
    }
  }

  static void multiply_block(const float* turned, const float* right, Index deep, Index tall,
                             Index wide, bool add, float* out, Index pitch) {
    alignas(64) float tile[kRows * kColumns];
    for (Index c = 0; c < wide; c += kColumns, right += panel(deep, kColumns)) {
      const Index narrow = std::min<Index>(kColumns, wide - c);
      const float* left = turned;
      for (Index row = 0; row < tall; row += kRows, left += panel(deep, kStep)) {
        const Index count = std::min<Index>(kRows, tall - row);
        float* to = out + row * pitch + c;
        for (Index m = 0; m < count; ++m) expect(to + m * pitch, narrow);
        kTurned[count - 1](deep, left, right, tile);
        for (Index m = 0; m < count; ++m)
          put(tile + m * kColumns, narrow, nullptr, add, 1, to + m * pitch);
      }
    }
  }
};

ffi::Error outer_products(ffi::ThreadPool pool, Integers token, Integers start, Integers end,
                          Floats left, ffi::RemainingArgs rights, ffi::RemainingRets results,
                          bool gather_left, bool gather_right) {
  OuterProducts run{rows_of(left, gather_left ? &token : nullptr), {}};
  const Index num_experts = start.dimensions()[0], rows = run.left.width;
  for (size_t p = 0; p < rights.size(); ++p) {
    const auto right = rights.get<Floats>(p);
    auto out = results.get<Floats>(p);
    if (!right || !out) return ffi::Error::InvalidArgument("expected arrays of float32");
    run.products.push_back(
        {rows_of(*right, gather_right ? &token : nullptr), (*out)->typed_data()});
  }
  std::vector<Task> experts;
  for (Index expert = 0; expert < num_experts; ++expert) {
    const Index begin = start.typed_data()[expert], stop = end.typed_data()[expert];
    experts.push_back({expert, begin, stop});
    if (begin == stop)
      for (const Outer& product : run.products) {
        const Index size = rows * product.right.width;
        std::fill_n(product.out + expert * size, size, 0.0f);
      }
  }
  // The longest sums start first, so that none of them is still running when all others are done.
  std::stable_sort(experts.begin(), experts.end(), [](const Task& a, const Task& b) {
    return a.end - a.begin > b.end - b.begin;
  });
  const Index num = parts(rows, height(num_experts * rows, pool));
  parallel(pool, num_experts * num, [&](Index i) {
    const Index part = i % num;
    run(experts[i / num], rows * part / num, rows * (part + 1) / num);
  });
  return ffi::Error::Success();
}

}  // namespace

XLA_FFI_DEFINE_HANDLER_SYMBOL(moe_diffusion_plan, plan,
                              ffi::Ffi::Bind()
                                  .Arg<Integers>()
                                  .Arg<Integers>()
                                  .Ret<Integers>()
                                  .Ret<Integers>()
                                  .Ret<Integers>()
                                  .Ret<Integers>()
                                  .Ret<Integers>()
                                  .Ret<Integers>()
                                  .Attr<int64_t>("num_tokens"));

XLA_FFI_DEFINE_HANDLER_SYMBOL(moe_diffusion_row_products, row_products,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<Integers>()
                                  .Arg<Integers>()
                                  .Arg<Integers>()
                                  .RemainingArgs()
                                  .RemainingRets()
                                  .Attr<bool>("gather")
                                  .Attr<bool>("in_place")
                                  .Attr<bool>("turned")
                                  .Attr<bool>("bias")
                                  .Attr<bool>("scaled"));

XLA_FFI_DEFINE_HANDLER_SYMBOL(moe_diffusion_outer_products, outer_products,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<Integers>()
                                  .Arg<Integers>()
                                  .Arg<Integers>()
                                  .Arg<Floats>()
                                  .RemainingArgs()
                                  .RemainingRets()
                                  .Attr<bool>("gather_left")
                                  .Attr<bool>("gather_right"));
