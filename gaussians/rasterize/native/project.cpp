// Projects splats to the screen, and its gradient, as two XLA FFI calls for CPU. Leading axes are
// those of jax.vmap. Two runs give the same bits: a view's gradient is summed over fixed parts of
// the splats.

#include "project.h"

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <type_traits>
#include <vector>

#include "batch.h"
#include "parallel.h"
#include "xla/ffi/api/ffi.h"

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace splats {
namespace {

namespace ffi = xla::ffi;
using Floats = ffi::Buffer<ffi::F32>;
using Bools = ffi::Buffer<ffi::PRED>;

constexpr int64_t kSplatsPerTask = 1024;

constexpr float kInfinity = std::numeric_limits<float>::infinity();
constexpr float kFovMargin = 0.3f;
constexpr float kMaxLogScale = 10.0f;
constexpr float kMaxDistance = 1e9f;
constexpr float kMinNormSquared = 1e-20f;
constexpr float kMinCompensation = 0.005f;

template <int kCount>
using Columns = std::integral_constant<int, kCount>;

#define KERNELS "project.inc"
#include "isa.inc"

// The inputs of both calls.
struct Inputs {
  Bools active;
  Floats means, log_scales, quaternions, pose, intrinsics, blur, near, far;
  float width, height;

  int64_t parts() const {
    return (active.dimensions().back() + kSplatsPerTask - 1) / kSplatsPerTask;
  }

  // Calls body(number of the element, number of the part, first splat, end) for parts of the
  // splats.
  template <class Body>
  void ForEachPart(ffi::ThreadPool& pool, const LeadingAxes& axes, const Body& body) const {
    const int64_t n = active.dimensions().back(), per_element = parts();
    ParallelFor(pool, axes.size() * per_element, [&](int64_t part) {
      const int64_t first = part % per_element * kSplatsPerTask;
      body(part / per_element, part, first, std::min(n, first + kSplatsPerTask));
    });
  }

  View view(const LeadingAxes& axes, int64_t b) {
    return {axes.At(pose, b),  axes.At(intrinsics, b), width,           height,
            *axes.At(blur, b), *axes.At(near, b),      *axes.At(far, b)};
  }

  Shapes<const float> shapes(const LeadingAxes& axes, int64_t b) {
    return {axes.At(means, b), axes.At(log_scales, b), axes.At(quaternions, b)};
  }
};

ffi::Error Project(ffi::ThreadPool pool, Bools active, Floats means, Floats log_scales,
                   Floats quaternions, Floats pose, Floats intrinsics, Floats blur, Floats near,
                   Floats far, float width, float height, ffi::Result<Floats> means2d,
                   ffi::Result<Floats> factors, ffi::Result<Floats> variances,
                   ffi::Result<Floats> depths, ffi::Result<Floats> compensations,
                   ffi::Result<Bools> visible) {
  return Guarded([&] {
    Inputs inputs{active, means, log_scales, quaternions, pose,  intrinsics,
                  blur,   near,  far,        width,       height};
    const LeadingAxes axes(*visible, 1);
    inputs.ForEachPart(pool, axes, [&](int64_t b, int64_t, int64_t first, int64_t end) {
      const Projected<float> projected{axes.At(*means2d, b), axes.At(*factors, b),
                                       axes.At(*variances, b), axes.At(*depths, b),
                                       axes.At(*compensations, b)};
      Kernels().project(inputs.view(axes, b), first, end, axes.At(inputs.active, b),
                        inputs.shapes(axes, b), projected, axes.At(*visible, b));
    });
  });
}

ffi::Error Unproject(ffi::ThreadPool pool, Bools active, Floats means, Floats log_scales,
                     Floats quaternions, Floats pose, Floats intrinsics, Floats blur, Floats near,
                     Floats far, Floats means2d, Floats factors, Floats variances, Floats depths,
                     Floats compensations, float width, float height, ffi::Result<Floats> to_means,
                     ffi::Result<Floats> to_log_scales, ffi::Result<Floats> to_quaternions,
                     ffi::Result<Floats> to_pose, ffi::Result<Floats> to_intrinsics,
                     ffi::Result<Floats> to_blur) {
  return Guarded([&] {
    Inputs inputs{active, means, log_scales, quaternions, pose,  intrinsics,
                  blur,   near,  far,        width,       height};
    const LeadingAxes axes(*to_blur, 0);
    std::vector<ViewGradient<double>> sums(axes.size() * inputs.parts());
    inputs.ForEachPart(pool, axes, [&](int64_t b, int64_t part, int64_t first, int64_t end) {
      const Projected<const float> cotangents{axes.At(means2d, b), axes.At(factors, b),
                                              axes.At(variances, b), axes.At(depths, b),
                                              axes.At(compensations, b)};
      const Shapes<float> gradients{axes.At(*to_means, b), axes.At(*to_log_scales, b),
                                    axes.At(*to_quaternions, b)};
      sums[part] = Kernels().unproject(inputs.view(axes, b), first, end, axes.At(inputs.active, b),
                                       inputs.shapes(axes, b), cotangents, gradients);
    });
    for (int64_t b = 0; b < axes.size(); ++b) {
      ViewGradient<double> sum;
      for (int64_t part = b * inputs.parts(); part < (b + 1) * inputs.parts(); ++part) {
        sum.Add(sums[part], [](double number) { return number; });
      }
      float* pose_rows = axes.At(*to_pose, b);
      std::copy_n(&sum.pose[0][0], 12, pose_rows);
      std::fill_n(pose_rows + 12, 4, 0.0f);
      const double intrinsics_rows[9] = {
          sum.focal[0], 0, sum.centre[0], 0, sum.focal[1], sum.centre[1], 0, 0, 0};
      std::copy_n(intrinsics_rows, 9, axes.At(*to_intrinsics, b));
      *axes.At(*to_blur, b) = static_cast<float>(sum.blur);
    }
  });
}

}  // namespace
}  // namespace splats

XLA_FFI_DEFINE_HANDLER_SYMBOL(SplatsProject, splats::Project,
                              xla::ffi::Ffi::Bind()
                                  .Ctx<xla::ffi::ThreadPool>()
                                  .Arg<xla::ffi::Buffer<xla::ffi::PRED>>()
                                  .Arg<splats::Floats>()
                                  .Arg<splats::Floats>()
                                  .Arg<splats::Floats>()
                                  .Arg<splats::Floats>()
                                  .Arg<splats::Floats>()
                                  .Arg<splats::Floats>()
                                  .Arg<splats::Floats>()
                                  .Arg<splats::Floats>()
                                  .Attr<float>("width")
                                  .Attr<float>("height")
                                  .Ret<splats::Floats>()
                                  .Ret<splats::Floats>()
                                  .Ret<splats::Floats>()
                                  .Ret<splats::Floats>()
                                  .Ret<splats::Floats>()
                                  .Ret<xla::ffi::Buffer<xla::ffi::PRED>>());

XLA_FFI_DEFINE_HANDLER_SYMBOL(SplatsUnproject, splats::Unproject,
                              xla::ffi::Ffi::Bind()
                                  .Ctx<xla::ffi::ThreadPool>()
                                  .Arg<xla::ffi::Buffer<xla::ffi::PRED>>()
                                  .Arg<splats::Floats>()
                                  .Arg<splats::Floats>()
                                  .Arg<splats::Floats>()
                                  .Arg<splats::Floats>()
                                  .Arg<splats::Floats>()
                                  .Arg<splats::Floats>()
                                  .Arg<splats::Floats>()
                                  .Arg<splats::Floats>()
                                  .Arg<splats::Floats>()
                                  .Arg<splats::Floats>()
                                  .Arg<splats::Floats>()
                                  .Arg<splats::Floats>()
                                  .Arg<splats::Floats>()
                                  .Attr<float>("width")
                                  .Attr<float>("height")
                                  .Ret<splats::Floats>()
                                  .Ret<splats::Floats>()
                                  .Ret<splats::Floats>()
                                  .Ret<splats::Floats>()
                                  .Ret<splats::Floats>()
                                  .Ret<splats::Floats>());
