"""Says which rendered clips are worth training on, and shows why not the others.

    python -m experiments.curate --clips=CLIPS --out=CURATED

measures every clip below the folder CLIPS (the motion of its front view, its coverage, whether it
touches the border, a perceptual hash) and judges it by the rules of `d4d_jax.data.curation`, whose
thresholds are flags. CURATED/verdicts.tsv has the numbers of every clip, counts.tsv those of every
rule, kept.txt the names for `experiments.build_dataset --keep`, and index.html pictures of what was
dropped and kept, by rule. With other thresholds the same command takes seconds: a clip is measured
once.

Exit code 0: all clips were measured. 3: some cannot be read, see failures.tsv. 1: a mistake in the
command, or no clip can be read. 2: a flag is wrong.
"""

import dataclasses
import sys
from pathlib import Path

from absl import flags, logging

from d4d_jax.data import curation, curation_page
from d4d_jax.data.curation import Thresholds
from experiments import cli

_HELP = {
    "ssim_high": "Both SSIM above it: too little motion.",
    "ssim_low": "An SSIM below it: distorted.",
    "min_coverage": "Share of the pixels that the object covers in every frame.",
    "border_alpha": "Opacity above which a pixel of the border is touched.",
    "border_frames": "Share of the frames that may touch the border.",
    "duplicate_bits": "Hashes of 252 bits that differ in no more are the same; -1 allows all.",
}


def main() -> None:
    """Curates the clips of the command line."""
    options = flags.FLAGS
    for name in ("clips", "out"):
        if not getattr(options, name):
            raise ValueError(f"--{name} is missing.")
    animated = None
    if options.animated:
        if not Path(options.animated).is_file():
            raise FileNotFoundError(f"There is no list of assets {options.animated!r}.")
        animated = set(Path(options.animated).read_text(encoding="utf-8").splitlines())
    thresholds = Thresholds(**{name: getattr(options, name) for name in _HELP})
    verdicts, failures = curation.curate(
        options.clips,
        options.out,
        thresholds,
        animated=animated,
        workers=options.workers,
        beam=options.beam,
    )
    for rule, broken, alone, left in curation.count(verdicts):
        logging.info("%-9s %5d clips, %5d by it alone, %5d left.", rule, broken, alone, left)
    if failures:
        name, reason = failures[0]
        summary = (
            f"{len(failures)} failures are in {options.out}/failures.tsv, first {name}: {reason}"
        )
        if not verdicts:
            raise ValueError(summary)
        logging.warning(summary)
    page = Path(options.out) / "index.html"
    curation_page.write_page(page, verdicts, options.clips, thresholds, examples=options.examples)
    logging.info("%s shows them.", page)
    if failures:
        sys.exit(3)


if __name__ == "__main__":
    flags.DEFINE_string("clips", None, "Folder of clip folders.")
    flags.DEFINE_string("out", None, "Folder of the verdicts.")
    flags.DEFINE_string("animated", None, "File with the assets labelled as animated, one a line.")
    flags.DEFINE_integer("examples", 40, "Pictures of a rule on the page.", lower_bound=0)
    flags.DEFINE_integer("workers", 1, "Clips at a time, on this machine.", lower_bound=1)
    flags.DEFINE_multi_string("beam", None, "Option of an Apache Beam pipeline to measure with.")
    for field in dataclasses.fields(Thresholds):
        define = flags.DEFINE_integer if field.type is int else flags.DEFINE_float
        define(field.name, field.default, _HELP[field.name])
    cli.run(main)
