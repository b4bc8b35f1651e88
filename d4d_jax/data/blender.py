"""Render animations of a .glb asset as orbital clips, with Blender.

This file runs as a script in an interpreter that has `bpy` (GPL, and it pins NumPy 1), or in
Blender itself, never in the library's own process. So it and the `blender_*.py` beside it import
nothing of d4d_jax; `python -m experiments.render` calls it for many assets.

    python d4d_jax/data/blender.py --asset fox.glb --action Gallop --out clips/fox
    blender -b --factory-startup --python-exit-code 1 -P d4d_jax/data/blender.py -- --asset ...

It writes the published folder layout: `multi_frame{i}.png` (view `dynamic`: orbit and motion),
`multi_static_frame{i}.png` (`static`: the same orbit, the pose frozen at the first frame of the
action), `front_frame{i}.png` (`front`: view 0, motion), 8-bit straight-alpha RGBA on a transparent
film, and the cameras `multi{i}.json`, `static{i}.json`, `front.json`. In the same style, the views
`right`, `back` and `left` see the motion from a quarter, half and three quarters of the orbit:
`right_frame{i}.png`, `right.json` and so on. `--passes depth,mask` adds, per frame, the distance
along the optical axis (`multi_depth{i}.png`: 16-bit grey, 65535 is the `max_depth` of the camera's
JSON, 0 the background) and where there is a surface (`multi_mask{i}.png`: 8-bit grey, 0 or 255).
With `--transforms FILE`, further views at times of their own, listed as in the D-NeRF datasets
(`camera_angle_x`; `file_path`, `time` in [0, 1] and `transform_matrix` of every frame), are
rendered into the same folder beside a copy of the list.

Camera, lights and sampling follow the renderer of Diffusion4D (Liang et al., 2024; the
`rendering/` folder of its repository), except that the light energies are fixed instead of drawn
per run, the object is normalised by its evaluated vertices (the bounding box of a skinned mesh is
that of its rest pose), the whole action is resampled to the frames instead of taking its first
second, and degrees are degrees. `--compat` goes back to the published choices, but for the second.
"""

import argparse
import contextlib
import json
import math
import os
import re
import sys
import threading
import time
from pathlib import Path

if __package__:
    from d4d_jax.data import blender_gltf as gltf
    from d4d_jax.data import blender_plan as plan
else:
    sys.path.append(str(Path(__file__).resolve().parent))  # Blender's -P does not
    import blender_gltf as gltf
    import blender_plan as plan

#: Of --each: a line of JSON per clip in the output folder.
REPORT = "report.jsonl"


def parse_args(argv=None):
    """Parse the command line; a wrong value ends in one sentence and exit status 2."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--asset", required=True, help="a .glb or .gltf file")
    parser.add_argument(
        "--action",
        action="append",
        default=[],
        help="name of the animation; may be left out if there is one",
    )
    parser.add_argument("--out", help="folder to write; created")
    parser.add_argument("--overwrite", action="store_true", help="replace the views in --out")
    parser.add_argument("--list_actions", action="store_true", help="print the names and stop")
    _add_batch_arguments(parser.add_argument_group("many animations"))
    _add_view_arguments(parser.add_argument_group("views and times"))
    _add_renderer_arguments(parser.add_argument_group("renderer"))
    args = parser.parse_args(argv)
    if args.out is None and not args.list_actions:
        parser.error("--out names the folder to write and is missing.")
    if len(args.action) > 1 and not args.each:
        parser.error("--action can be given more than once only with --each.")
    return args


def _add_batch_arguments(group):
    group.add_argument(
        "--each",
        action="store_true",
        help="render every --action, or all there are, into folders 0, 1, ... of --out, and say in"
        f" {REPORT} there what became of it",
    )
    group.add_argument("--skip", action="append", default=[], help="an action that --each omits")
    group.add_argument("--at_most", type=int, default=0, help="animations, drawn; 0: all")
    group.add_argument("--parent", type=int, default=0, help="process without which to end")
    group.add_argument("--seed", type=int, default=0, help="of what is drawn per clip")
    group.add_argument("--key", default="", help="name of the asset in the draws")


def _add_view_arguments(group):
    group.add_argument("--frames", type=_positive, default=24)
    group.add_argument(
        "--views",
        type=parse_views,
        default=plan.PUBLISHED,
        help=f"of {','.join(plan.VIEWS)}, or fixed",
    )
    group.add_argument("--passes", type=parse_passes, default=(), help=",".join(plan.PASSES))
    group.add_argument("--transforms", help="transforms_*.json with further views to render")
    group.add_argument(
        "--elevation",
        type=parse_elevation,
        default=(0.0, 0.0),
        help="degrees above the equator, or LOW,HIGH to draw it for each clip",
    )
    group.add_argument(
        "--azimuth", type=float, default=0.0, help="degrees of view 0, counter-clockwise from -y"
    )
    group.add_argument(
        "--azimuth_augmentation", action="store_true", help="draw the azimuth for each clip"
    )
    group.add_argument(
        "--compat",
        action="store_true",
        help="as published: elevation atan(degrees / 180), light energies drawn, azimuth rounded"
        " to hundredths of a turn, fixed views level, the action at 24 frames a second from its"
        " start",
    )
    group.add_argument(
        "--normalise",
        choices=("first", "action"),
        default="first",
        help="what fills the unit cube: the first frame, or the box of all frames, for actions"
        " that travel",
    )
    group.add_argument(
        "--loop_threshold",
        type=float,
        default=0.01,
        help="an action loops when its vertices end, on average, no farther from their start than"
        " this share of the object's size",
    )
    group.add_argument(
        "--open_loops",
        action="store_true",
        help="leave out the last frame of an action that loops, which is the first again",
    )


def _add_renderer_arguments(group):
    group.add_argument("--engine", choices=("cycles", "eevee"), default="cycles")
    group.add_argument("--resolution", type=_positive, default=256, help="pixels, square")
    group.add_argument("--samples", type=_positive, default=128, help="samples per pixel")
    group.add_argument(
        "--filter_width",
        type=float,
        default=0.01,
        help="pixel filter in pixels: 0.01 is the published one (hard edges), 1.5 Blender's own",
    )
    group.add_argument("--denoise", action="store_true", help="Open Image Denoise, 1.4 s a frame")
    group.add_argument("--threads", type=int, default=0, help="0: all cores")


def _positive(text):
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a positive whole number")
    return int(text)


def parse_views(text):
    """The names of views of a comma-separated list, `fixed` meaning the four fixed ones."""
    names = {name.strip() for name in text.split(",") if name.strip()}
    if "fixed" in names:
        fixed = {name for name, view in plan.VIEWS.items() if view.quarter is not None}
        names = names - {"fixed"} | fixed
    if not names or not names <= set(plan.VIEWS):
        raise argparse.ArgumentTypeError(
            f"{text!r} is not a subset of {','.join(plan.VIEWS)},fixed"
        )
    return tuple(view for view in plan.VIEWS if view in names)


def parse_passes(text):
    """The names of passes of a comma-separated list; there may be none."""
    names = {name.strip() for name in text.split(",") if name.strip()}
    if not names <= set(plan.PASSES):
        raise argparse.ArgumentTypeError(f"{text!r} is not a subset of {','.join(plan.PASSES)}")
    return tuple(name for name in plan.PASSES if name in names)


def parse_elevation(text):
    """Lowest and highest degrees of "DEGREES" or "LOW,HIGH"."""
    try:
        values = [float(part) for part in text.split(",")]
    except ValueError:
        values = []
    low_high = (values * 2)[:2]
    if not 1 <= len(values) <= 2 or not -89.0 <= low_high[0] <= low_high[1] <= 89.0:
        raise argparse.ArgumentTypeError(
            f"{text!r} is neither degrees within [-89, 89] nor LOW,HIGH within them"
        )
    return tuple(low_high)


def need_bpy():
    """Raise RenderError where there is no Blender."""
    try:
        import bpy  # noqa: F401
    except ImportError as error:
        raise plan.RenderError(
            "This interpreter has no bpy; make an environment of its own and `pip install bpy`."
        ) from error


def check_paths(args):
    """Everything that can be wrong before Blender starts."""
    gltf.check_asset(args.asset)
    if args.list_actions:
        return
    if args.transforms:
        plan.read_transforms(args.transforms)
    out = Path(args.out)
    if out.exists() and not out.is_dir():
        raise plan.RenderError(f"--out={out} is a file, not a folder.")
    if out.is_dir() and any(out.iterdir()) and not args.overwrite:
        raise plan.RenderError(f"{out} already holds files; give --overwrite or another --out.")


def delete_views(out, views):
    """Delete the frames, passes and cameras of these views, of any number, and nothing else."""
    for view in views:
        frame = plan.VIEWS[view].frame
        names = [frame, plan.VIEWS[view].camera]
        names += [plan.pass_name(frame, name) for name in plan.PASSES]
        for name in names:
            pattern = re.compile(re.escape(name).replace(r"\{\}", r"\d+"))
            for path in list(Path(out).iterdir()):
                if pattern.fullmatch(path.name):
                    path.unlink()


class Studio:
    """An imported asset between the published lights, in front of the camera."""

    def __init__(self, args):
        """Import the asset; raises RenderError where that fails or there is no animation."""
        if __package__:
            from d4d_jax.data import blender_passes as passes
            from d4d_jax.data import blender_scene as scene
        else:
            import blender_passes as passes
            import blender_scene as scene
        self._args, self._scene, self._passes = args, scene, passes
        scene.load_asset(args.asset)
        self.actions = scene.list_actions()
        if not self.actions:
            raise plan.RenderError(f"{args.asset} has no animation.")
        self._rest = scene.Rest()
        self._holder = scene.add_holder()
        self._camera = scene.add_stage()
        passes.set_renderer(args)

    def render(self, action, out):
        """Render one animation into a folder; returns what is to be known about the clip."""
        args, span = self._args, self.actions[action]
        drawn = plan.draw(
            args.seed,
            args.key,
            action,
            elevation=args.elevation,
            azimuth=args.azimuth,
            any_azimuth=args.azimuth_augmentation,
            compat=args.compat,
        )
        self._rest.restore()
        self._scene.play_action(action)
        loop = self._scene.loops(span, args.loop_threshold)
        times = plan.resample_frames(
            *span, args.frames, closed=not (loop and args.open_loops), compat=args.compat
        )
        bbox = self._scene.normalise(
            self._holder, times if args.normalise == "action" else times[:1]
        )
        self._scene.set_energies(drawn.energies)
        self._camera.data.angle = plan.FOV
        out.mkdir(parents=True, exist_ok=True)
        for name in args.views:
            self._render_view(plan.VIEWS[name], times, drawn, bbox, out)
        if args.transforms:
            self._render_transforms(span, out)
        return {
            "frames": round(span[1] - span[0], 3),
            "loop": loop,
            "azimuth": round(math.degrees(drawn.azimuth), 4),
            "elevation": round(math.degrees(drawn.elevation), 4),
            "energies": drawn.energies,
        }

    def _render_view(self, view, times, drawn, bbox, out):
        for i in range(len(times)):
            self._scene.set_time(times[i if view.moves else 0])
            pose = plan.view_pose(view, i, len(times), drawn)
            self._passes.render_frame(
                self._camera, pose, out / view.frame.format(i), self._args.passes
            )
            if view.quarter is None or i == 0:
                record = json.dumps(plan.camera_json(pose, bbox))
                (out / view.camera.format(i)).write_text(record + "\n", encoding="utf-8")

    def _render_transforms(self, span, out):
        """The views of --transforms, whose times 0 and 1 are the ends of the action."""
        source = Path(self._args.transforms)
        angle, frames = plan.read_transforms(source)
        start, end = span
        self._camera.data.angle = angle
        for name, moment, pose in frames:
            self._scene.set_time(plan.resample_frames(start + moment * (end - start), end, 1)[0])
            path = (out / name).with_suffix(".png")
            self._passes.render_frame(self._camera, pose, path, self._args.passes)
        (out / source.name).write_bytes(source.read_bytes())


def render_one(args):
    """Render the one animation meant into --out."""
    with quiet():
        studio = Studio(args)
    name = plan.pick_action(list(studio.actions), *(args.action or [None]))
    out = Path(args.out)
    out.mkdir(parents=True, exist_ok=True)
    with quiet():
        delete_views(out, args.views)  # --overwrite may have asked for fewer frames
        studio.render(name, out)
    print(f"Rendered {name} of {args.asset} to {args.out}.")


def render_each(args):
    """Render every chosen animation into a folder of its own, and report on each."""
    out = Path(args.out)
    out.mkdir(parents=True, exist_ok=True)
    with (out / REPORT).open("a", encoding="utf-8") as report, quiet():

        def say(**record):
            report.write(json.dumps(record) + "\n")
            report.flush()

        studio = Studio(args)
        chosen = plan.choose_actions(
            list(studio.actions), args.action, at_most=args.at_most, seed=args.seed, asset=args.key
        )
        chosen = [(name, error) for name, error in chosen if name not in args.skip]
        say(actions=[name for name, _ in chosen], all_actions=list(studio.actions))
        for number, (name, error) in enumerate(chosen):
            start = time.monotonic()
            facts = {}
            try:
                if error is None:
                    facts = studio.render(name, out / str(number))
            except Exception as raised:  # Whatever it is, the other animations go on.
                error = " ".join(str(raised).split()) or type(raised).__name__
            seconds = round(time.monotonic() - start, 3)
            say(action=name, folder=str(number), error=error, seconds=seconds, **facts)


def end_with(parent):
    """End this process when the process `parent`, which started it, has ended."""

    def watch():
        while os.getppid() == parent:
            time.sleep(1)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


@contextlib.contextmanager
def quiet():
    """Send Blender's own chatter on stdout, which it writes below Python, to nowhere."""
    sys.stdout.flush()
    kept, null = os.dup(1), os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, 1)
    try:
        yield
    finally:
        sys.stdout.flush()
        os.dup2(kept, 1)
        os.close(kept)
        os.close(null)


def run(args):
    """Render as the parsed arguments say; raises RenderError on a mistake of the user."""
    check_paths(args)
    need_bpy()
    if args.parent:
        end_with(args.parent)
    if args.list_actions:
        with quiet():
            actions = Studio(args).actions
        for name, (start, end) in actions.items():
            print(f"{name}\t{end - start:g} frames")
    elif args.each:
        render_each(args)
    else:
        render_one(args)


def arguments(argv):
    """What is meant for this script: after `--` where Blender runs it."""
    return argv[argv.index("--") + 1 :] if "--" in argv else argv[1:]


def main(argv=None):
    try:
        run(parse_args(argv))
    except plan.RenderError as error:
        print(error, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(arguments(sys.argv)))
