// Projects splats to the screen, and its gradient, as two XLA FFI calls for CPU. Leading axes and
// determinism are those of blend.cpp: a view's gradient is summed over fixed parts of the splats.

#include "project.h"

#include <algorithm>
#include <cstdint>
#include <vector>

#include "parallel.h"
#include "xla/ffi/api/ffi.h"

namespace splats {
namespace {

namespace ffi = xla::ffi;
using Floats = ffi::Buffer<ffi::F32>;

constexpr int64_t kSplatsPerTask = 2048;

// The inputs of both calls, and their leading axes flattened.
struct Batch {
  int64_t size, n;
  const bool* active;
  const float *means, *log_scales, *quaternions, *poses, *intrinsics, *blurs, *nears, *fars;
  float width, height;

  Batch(ffi::Buffer<ffi::PRED>& active, Floats& means, Floats& log_scales, Floats& quaternions, Floats& pose, Floats& intrinsics,
        Floats& blur, Floats& near, Floats& far, float width, float height)
      : size(blur.element_count()),
        n(active.dimensions().back()),
        active(active.typed_data()),
        means(means.typed_data()),
        log_scales(log_scales.typed_data()),
        quaternions(quaternions.typed_data()),
        poses(pose.typed_data()),
        intrinsics(intrinsics.typed_data()),
        blurs(blur.typed_data()),
        nears(near.typed_data()),
        fars(far.typed_data()),
        width(width),
        height(height) {}

  View view(int64_t b) const {
    return View(poses + 16 * b, intrinsics + 9 * b, width, height, blurs[b], nears[b], fars[b]);
  }

  // Calls body(b, part, row) for every splat; a part of an image is one task.
  int64_t parts() const { return (n + kSplatsPerTask - 1) / kSplatsPerTask; }

  template <class Body>
  void ForEachPart(ffi::ThreadPool& pool, const Body& body) const {
    ParallelFor(pool, size * parts(), [&](int64_t task) {
      const int64_t b = task / parts(), first = task % parts() * kSplatsPerTask;
      body(b, task, b * n + first, b * n + std::min(n, first + kSplatsPerTask));
    });
  }
};

ffi::Error Project(ffi::ThreadPool pool, ffi::Buffer<ffi::PRED> active, Floats means, Floats log_scales, Floats quaternions,
                   Floats pose, Floats intrinsics, Floats blur, Floats near, Floats far,
                   float width, float height, ffi::Result<Floats> means2d,
                   ffi::Result<Floats> factors, ffi::Result<Floats> variances,
                   ffi::Result<Floats> depths, ffi::Result<Floats> compensations,
                   ffi::Result<ffi::Buffer<ffi::PRED>> visible) {
  const Batch batch(active, means, log_scales, quaternions, pose, intrinsics, blur, near, far, width,
                    height);
  batch.ForEachPart(pool, [&](int64_t b, int64_t, int64_t first, int64_t end) {
    const View view = batch.view(b);
    for (int64_t row = first; row < end; ++row) {
      Projector projector;
      const bool seen = batch.active[row] &&
                        projector.Project(view, batch.means + 3 * row, batch.log_scales + 3 * row,
                                          batch.quaternions + 4 * row);
      const Projected result = seen ? projector.Result(view) : Projected();
      std::copy_n(result.mean, 2, means2d->typed_data() + 2 * row);
      std::copy_n(result.factors, 3, factors->typed_data() + 3 * row);
      std::copy_n(result.variances, 2, variances->typed_data() + 2 * row);
      depths->typed_data()[row] = result.depth;
      compensations->typed_data()[row] = result.compensation;
      visible->typed_data()[row] = seen;
    }
  });
  return ffi::Error::Success();
}

ffi::Error Unproject(ffi::ThreadPool pool, ffi::Buffer<ffi::PRED> active, Floats means, Floats log_scales, Floats quaternions,
                     Floats pose, Floats intrinsics, Floats blur, Floats near, Floats far,
                     Floats to_means2d, Floats to_factors, Floats to_variances, Floats to_depths,
                     Floats to_compensations, float width, float height,
                     ffi::Result<Floats> to_means, ffi::Result<Floats> to_log_scales,
                     ffi::Result<Floats> to_quaternions, ffi::Result<Floats> to_pose,
                     ffi::Result<Floats> to_intrinsics, ffi::Result<Floats> to_blur) {
  const Batch batch(active, means, log_scales, quaternions, pose, intrinsics, blur, near, far, width,
                    height);
  std::vector<ViewGradient> sums(batch.size * batch.parts());
  batch.ForEachPart(pool, [&](int64_t b, int64_t part, int64_t first, int64_t end) {
    const View view = batch.view(b);
    ViewGradient sum;
    for (int64_t row = first; row < end; ++row) {
      const float* mean = batch.means + 3 * row;
      float* to_mean = to_means->typed_data() + 3 * row;
      float* to_scale = to_log_scales->typed_data() + 3 * row;
      float* to_quaternion = to_quaternions->typed_data() + 4 * row;
      Projector projector;
      if (batch.active[row] && projector.Project(view, mean, batch.log_scales + 3 * row,
                                                 batch.quaternions + 4 * row)) {
        Projected received;
        std::copy_n(to_means2d.typed_data() + 2 * row, 2, received.mean);
        std::copy_n(to_factors.typed_data() + 3 * row, 3, received.factors);
        std::copy_n(to_variances.typed_data() + 2 * row, 2, received.variances);
        received.depth = to_depths.typed_data()[row];
        received.compensation = to_compensations.typed_data()[row];
        projector.Gradient(view, mean, received, to_mean, to_scale, to_quaternion, sum);
      } else {
        std::fill_n(to_mean, 3, 0.0f);
        std::fill_n(to_scale, 3, 0.0f);
        std::fill_n(to_quaternion, 4, 0.0f);
      }
    }
    sums[part] = sum;
  });
  for (int64_t b = 0; b < batch.size; ++b) {
    ViewGradient sum;
    for (int64_t part = 0; part < batch.parts(); ++part) sum += sums[b * batch.parts() + part];
    float* pose_row = to_pose->typed_data() + 16 * b;
    std::copy_n(&sum.pose[0][0], 12, pose_row);
    std::fill_n(pose_row + 12, 4, 0.0f);
    const double intrinsics_row[9] = {
        sum.focal[0], 0, sum.centre[0], 0, sum.focal[1], sum.centre[1], 0, 0, 0};
    std::copy_n(intrinsics_row, 9, to_intrinsics->typed_data() + 9 * b);
    to_blur->typed_data()[b] = static_cast<float>(sum.blur);
  }
  return ffi::Error::Success();
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
