// Projects splats to the screen, and its gradient, as two XLA FFI calls for CPU. Leading axes are
// those of jax.vmap. Two runs give the same bits: a view's gradient is summed over fixed parts of
// the splats.

#include "project.h"

#include <algorithm>
#include <cstdint>
#include <vector>

#include "batch.h"
#include "parallel.h"
#include "xla/ffi/api/ffi.h"

namespace splats {
namespace {

namespace ffi = xla::ffi;
using Floats = ffi::Buffer<ffi::F32>;
using Bools = ffi::Buffer<ffi::PRED>;

constexpr int64_t kSplatsPerTask = 2048;

// One element of the leading axes.
struct Element {
  View view;
  const bool* active;
  const float *means, *log_scales, *quaternions;

  // False when splat i is not to be drawn.
  bool Project(int64_t i, Projector& projector) const {
    return active[i] &&
           projector.Project(view, means + 3 * i, log_scales + 3 * i, quaternions + 4 * i);
  }
};

// The inputs of both calls.
struct Inputs {
  Bools active;
  Floats means, log_scales, quaternions, pose, intrinsics, blur, near, far;
  float width, height;

  int64_t parts() const {
    return (active.dimensions().back() + kSplatsPerTask - 1) / kSplatsPerTask;
  }

  // Calls body(element, its number, number of the part, first splat, end) for parts of the splats.
  template <class Body>
  void ForEachPart(ffi::ThreadPool& pool, const LeadingAxes& axes, const Body& body) {
    const int64_t n = active.dimensions().back(), per_element = parts();
    ParallelFor(pool, axes.size() * per_element, [&](int64_t part) {
      const int64_t b = part / per_element, first = part % per_element * kSplatsPerTask;
      const View view(axes.At(pose, b), axes.At(intrinsics, b), width, height, *axes.At(blur, b),
                      *axes.At(near, b), *axes.At(far, b));
      const Element element{view, axes.At(active, b), axes.At(means, b), axes.At(log_scales, b),
                            axes.At(quaternions, b)};
      body(element, b, part, first, std::min(n, first + kSplatsPerTask));
    });
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
    inputs.ForEachPart(
        pool, axes, [&](const Element& element, int64_t b, int64_t, int64_t first, int64_t end) {
          float *to_means = axes.At(*means2d, b), *to_factors = axes.At(*factors, b);
          float *to_variances = axes.At(*variances, b), *to_depths = axes.At(*depths, b);
          float* to_compensations = axes.At(*compensations, b);
          bool* to_visible = axes.At(*visible, b);
          for (int64_t i = first; i < end; ++i) {
            Projector projector;
            to_visible[i] = element.Project(i, projector);
            const Projected result = to_visible[i] ? projector.Result(element.view) : Projected();
            std::copy_n(result.mean, 2, to_means + 2 * i);
            std::copy_n(result.factors, 3, to_factors + 3 * i);
            std::copy_n(result.variances, 2, to_variances + 2 * i);
            to_depths[i] = result.depth;
            to_compensations[i] = result.compensation;
          }
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
    std::vector<ViewGradient> sums(axes.size() * inputs.parts());
    inputs.ForEachPart(
        pool, axes,
        [&](const Element& element, int64_t b, int64_t part, int64_t first, int64_t end) {
          const float *from_means = axes.At(means2d, b), *from_factors = axes.At(factors, b);
          const float *from_variances = axes.At(variances, b), *from_depths = axes.At(depths, b);
          const float* from_compensations = axes.At(compensations, b);
          float* to_mean = axes.At(*to_means, b) + 3 * first;
          float* to_scales = axes.At(*to_log_scales, b) + 3 * first;
          float* to_quaternion = axes.At(*to_quaternions, b) + 4 * first;
          ViewGradient sum;
          for (int64_t i = first; i < end; ++i, to_mean += 3, to_scales += 3, to_quaternion += 4) {
            Projector projector;
            if (element.Project(i, projector)) {
              Projected received;
              std::copy_n(from_means + 2 * i, 2, received.mean);
              std::copy_n(from_factors + 3 * i, 3, received.factors);
              std::copy_n(from_variances + 2 * i, 2, received.variances);
              received.depth = from_depths[i];
              received.compensation = from_compensations[i];
              projector.Gradient(element.view, element.means + 3 * i, received, to_mean, to_scales,
                                 to_quaternion, sum);
            } else {
              std::fill_n(to_mean, 3, 0.0f);
              std::fill_n(to_scales, 3, 0.0f);
              std::fill_n(to_quaternion, 4, 0.0f);
            }
          }
          sums[part] = sum;
        });
    for (int64_t b = 0; b < axes.size(); ++b) {
      ViewGradient sum;
      for (int64_t part = 0; part < inputs.parts(); ++part) sum += sums[b * inputs.parts() + part];
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
