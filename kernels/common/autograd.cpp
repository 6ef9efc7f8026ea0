// Gradients of the operators on the hot path, in C++: the same formulas that the Python registrations hold, without
// their tens of microseconds a call. They dispatch to `*_backward`, so every implementation of those is used.
#include <ATen/core/dispatch/Dispatcher.h>
#include <torch/csrc/autograd/autograd_not_implemented_fallback.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/library.h>

namespace qexp {
namespace {

using at::Tensor;
using OptionalTensor = std::optional<Tensor>;
using Axis = std::optional<int64_t>;
using torch::autograd::AutogradContext;
using torch::autograd::Function;
using torch::autograd::variable_list;

template <class Signature>
auto op(const char* name) {
  return c10::Dispatcher::singleton().findSchemaOrThrow(name, "").typed<Signature>();
}

OptionalTensor present(const Tensor& t) { return t.defined() ? OptionalTensor(t) : std::nullopt; }

// fake_quantize and relu_quantize: a gradient to x only.
using UniformBackward = Tensor(const Tensor&, const Tensor&, const Tensor&, const Tensor&, double, double,
                               const OptionalTensor&, Axis);

void save_uniform(AutogradContext* ctx, const Tensor& x, const Tensor& scale, const Tensor& zero_point, double qmin,
                  double qmax, const OptionalTensor& limits, Axis axis) {
  ctx->save_for_backward({x, scale, zero_point, limits.value_or(Tensor())});
  ctx->saved_data["qmin"] = qmin;
  ctx->saved_data["qmax"] = qmax;
  ctx->saved_data["axis"] = axis;
}

Tensor uniform_dx(AutogradContext* ctx, const Tensor& grad, const c10::TypedOperatorHandle<UniformBackward>& backward) {
  const auto saved = ctx->get_saved_variables();
  return backward.call(grad, saved[0], saved[1], saved[2], ctx->saved_data["qmin"].toDouble(),
                       ctx->saved_data["qmax"].toDouble(), present(saved[3]), ctx->saved_data["axis"].to<Axis>());
}

struct FakeQuantize : Function<FakeQuantize> {
  using Forward = Tensor(const Tensor&, const Tensor&, const Tensor&, double, double, const OptionalTensor&, Axis,
                         std::string_view, const OptionalTensor&);
  static auto forward_op() {
    static const auto handle = op<Forward>("qexp::fake_quantize");
    return handle;
  }
  static Tensor forward(AutogradContext* ctx, const Tensor& x, const Tensor& scale, const Tensor& zero_point,
                        double qmin, double qmax, const OptionalTensor& limits, Axis axis, std::string_view rounding,
                        const OptionalTensor& noise) {
    save_uniform(ctx, x, scale, zero_point, qmin, qmax, limits, axis);
    at::AutoDispatchBelowADInplaceOrView guard;
    return forward_op().call(x, scale, zero_point, qmin, qmax, limits, axis, rounding, noise);
  }
  static variable_list backward(AutogradContext* ctx, variable_list grads) {
    static const auto handle = op<UniformBackward>("qexp::fake_quantize_backward");
    return {uniform_dx(ctx, grads[0], handle), {}, {}, {}, {}, {}, {}, {}, {}};
  }
};

struct ReluQuantize : Function<ReluQuantize> {
  using Forward = Tensor(const Tensor&, const Tensor&, const Tensor&, double, double, const OptionalTensor&, Axis,
                         std::string_view);
  static auto forward_op() {
    static const auto handle = op<Forward>("qexp::relu_quantize");
    return handle;
  }
  static Tensor forward(AutogradContext* ctx, const Tensor& x, const Tensor& scale, const Tensor& zero_point,
                        double qmin, double qmax, const OptionalTensor& limits, Axis axis, std::string_view rounding) {
    save_uniform(ctx, x, scale, zero_point, qmin, qmax, limits, axis);
    at::AutoDispatchBelowADInplaceOrView guard;
    return forward_op().call(x, scale, zero_point, qmin, qmax, limits, axis, rounding);
  }
  static variable_list backward(AutogradContext* ctx, variable_list grads) {
    static const auto handle = op<UniformBackward>("qexp::relu_quantize_backward");
    return {uniform_dx(ctx, grads[0], handle), {}, {}, {}, {}, {}, {}, {}};
  }
};

struct Lsq : Function<Lsq> {
  using Forward = Tensor(const Tensor&, const Tensor&, const OptionalTensor&, double, double, const OptionalTensor&,
                         Axis, std::string_view, double);
  using Backward = std::tuple<Tensor, Tensor, Tensor>(const Tensor&, const Tensor&, const Tensor&,
                                                      const OptionalTensor&, double, double, const OptionalTensor&,
                                                      Axis, std::string_view, double);
  static auto forward_op() {
    static const auto handle = op<Forward>("qexp::lsq");
    return handle;
  }
  static Tensor forward(AutogradContext* ctx, const Tensor& x, const Tensor& scale, const OptionalTensor& offset,
                        double qmin, double qmax, const OptionalTensor& limits, Axis axis, std::string_view rounding,
                        double grad_scale) {
    ctx->save_for_backward({x, scale, offset.value_or(Tensor()), limits.value_or(Tensor())});
    ctx->saved_data["qmin"] = qmin;
    ctx->saved_data["qmax"] = qmax;
    ctx->saved_data["axis"] = axis;
    ctx->saved_data["rounding"] = std::string(rounding);
    ctx->saved_data["grad_scale"] = grad_scale;
    at::AutoDispatchBelowADInplaceOrView guard;
    return forward_op().call(x, scale, offset, qmin, qmax, limits, axis, rounding, grad_scale);
  }
  static variable_list backward(AutogradContext* ctx, variable_list grads) {
    static const auto handle = op<Backward>("qexp::lsq_backward");
    const auto saved = ctx->get_saved_variables();
    auto& data = ctx->saved_data;
    const auto [dx, dscale, doffset] =
        handle.call(grads[0], saved[0], saved[1], present(saved[2]), data["qmin"].toDouble(), data["qmax"].toDouble(),
                    present(saved[3]), data["axis"].to<Axis>(), data["rounding"].toStringView(),
                    data["grad_scale"].toDouble());
    return {dx, dscale, saved[2].defined() ? doffset : Tensor(), {}, {}, {}, {}, {}, {}};
  }
};

struct Pact : Function<Pact> {
  using Forward = Tensor(const Tensor&, const Tensor&, double, bool, Axis, std::string_view);
  using Backward = std::tuple<Tensor, Tensor>(const Tensor&, const Tensor&, const Tensor&, bool, Axis);
  static auto forward_op() {
    static const auto handle = op<Forward>("qexp::pact");
    return handle;
  }
  static Tensor forward(AutogradContext* ctx, const Tensor& x, const Tensor& alpha, double levels, bool two_sided,
                        Axis axis, std::string_view rounding) {
    ctx->save_for_backward({x, alpha});
    ctx->saved_data["two_sided"] = two_sided;
    ctx->saved_data["axis"] = axis;
    at::AutoDispatchBelowADInplaceOrView guard;
    return forward_op().call(x, alpha, levels, two_sided, axis, rounding);
  }
  static variable_list backward(AutogradContext* ctx, variable_list grads) {
    static const auto handle = op<Backward>("qexp::pact_backward");
    const auto saved = ctx->get_saved_variables();
    const auto [dx, dalpha] = handle.call(grads[0], saved[0], saved[1], ctx->saved_data["two_sided"].toBool(),
                                          ctx->saved_data["axis"].to<Axis>());
    return {dx, dalpha, {}, {}, {}, {}};
  }
};

struct DorefaWeight : Function<DorefaWeight> {
  using Forward = std::tuple<Tensor, Tensor, Tensor>(const Tensor&, double, bool, bool, std::string_view);
  using Backward = Tensor(const Tensor&, const Tensor&, const Tensor&, const Tensor&, bool);
  static auto forward_op() {
    static const auto handle = op<Forward>("qexp::dorefa_weight");
    return handle;
  }
  static variable_list forward(AutogradContext* ctx, const Tensor& w, double levels, bool symmetric, bool rescale,
                               std::string_view rounding) {
    at::AutoDispatchBelowADInplaceOrView guard;
    auto [y, t, peak] = forward_op().call(w, levels, symmetric, rescale, rounding);
    ctx->mark_non_differentiable({t, peak});
    ctx->save_for_backward({y, t, peak});
    ctx->saved_data["rescale"] = rescale;
    return {y, t, peak};
  }
  static variable_list backward(AutogradContext* ctx, variable_list grads) {
    static const auto handle = op<Backward>("qexp::dorefa_weight_backward");
    const auto saved = ctx->get_saved_variables();
    return {handle.call(grads[0], saved[0], saved[1], saved[2], ctx->saved_data["rescale"].toBool()), {}, {}, {}, {}};
  }
};

template <class F, class R, class... Args>
R differentiable(Args... args) {
  if constexpr (std::is_same_v<R, Tensor>) {
    return F::apply(args...);
  } else {
    const variable_list out = F::apply(args...);
    return {out[0], out[1], out[2]};
  }
}

template <class F, class R, class... Args>
void add(torch::Library& m, const char* name, R (*)(Args...)) {
  m.impl(name, &differentiable<F, R, Args...>);
}

void register_all(torch::Library& m) {
  add<FakeQuantize>(m, "fake_quantize", static_cast<FakeQuantize::Forward*>(nullptr));
  add<ReluQuantize>(m, "relu_quantize", static_cast<ReluQuantize::Forward*>(nullptr));
  add<Lsq>(m, "lsq", static_cast<Lsq::Forward*>(nullptr));
  add<Pact>(m, "pact", static_cast<Pact::Forward*>(nullptr));
  add<DorefaWeight>(m, "dorefa_weight", static_cast<DorefaWeight::Forward*>(nullptr));
  for (const char* name : {"fake_quantize_backward", "relu_quantize_backward", "lsq_backward", "pact_backward",
                           "dorefa_weight_backward"})
    m.impl(name, torch::autograd::autogradNotImplementedFallback());  // second derivatives are an error
}

TORCH_LIBRARY_IMPL(qexp, AutogradCPU, m) { register_all(m); }
TORCH_LIBRARY_IMPL(qexp, AutogradCUDA, m) { register_all(m); }

}  // namespace
}  // namespace qexp
