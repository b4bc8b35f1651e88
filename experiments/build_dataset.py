"""Builds a data set for training of clip folders: ArrayRecord files, split by asset.

    python -m experiments.build_dataset --clips=CLIPS --keep=CURATED/kept.txt --out=DATASET

CLIPS is what `experiments.render` wrote, or any folder of clips in the layout of `d4d_jax.clips`;
--keep leaves out what `experiments.curate` dropped. `experiments.train --config.data.path=DATASET`
trains on it. The same command after a stop goes on with the files that are missing.

    python -m experiments.build_dataset --archives=FILE --archives=FILE --clips=CLIPS

unpacks published archives (.zip, .tar, .tar.gz; Objaverse-1.0 or Objaverse-XL) into CLIPS, before
all else.

    python -m experiments.build_dataset --out=DATASET --tfds=DATA_DIR
    python -m experiments.build_dataset --out=DATASET --verify

turn a built data set into the TFDS data set `orbit_clips`, and compare its files with their
checksums. Exit code 0: all clips are in. 3: some are not, see `failures.tsv` beside the data.
1: a mistake in the command, or no clip could be read. 2: a flag is wrong.
"""

import sys
from pathlib import Path

from absl import flags, logging

from d4d_jax.data import archives, captions, records, shards
from experiments import cli


def main() -> None:
    """Does what the flags name, in the order of the docstring."""
    options = flags.FLAGS
    if not options.out and not (options.archives and options.clips):
        raise ValueError("--out is missing (or --archives with --clips, to unpack alone).")
    failures = _unpack(options) if options.archives else 0
    if options.clips and options.out:
        failures += _build(options)
    if options.verify:
        count = records.verify(options.out)
        logging.info("%d files of %s are as they were written.", count, options.out)
    if options.tfds:
        import tensorflow_datasets as tfds  # takes seconds

        from d4d_jax.data.tfds_orbits import OrbitClips

        tfds.disable_progress_bar()
        builder = OrbitClips(records=options.out, data_dir=options.tfds)
        builder.download_and_prepare()
        logging.info("The TFDS data set is %s.", builder.data_dir)
    if failures:
        sys.exit(3)


def _unpack(options) -> int:
    """Unpacks the archives; returns the number of failures."""
    if not options.clips:
        raise ValueError("--clips is missing, the folder to unpack --archives into.")
    table = captions.read_table(options.captions) if options.captions else None
    count, failures = archives.unpack(options.archives, options.clips, captions=table)
    logging.info("%d clips are in %s.", count, options.clips)
    return _tell(failures, options.clips)


def _build(options) -> int:
    """Builds the data set; returns the number of clips that failed."""
    names = None
    if options.keep:
        if not Path(options.keep).is_file():
            raise FileNotFoundError(f"There is no list of clips {options.keep!r}.")
        names = Path(options.keep).read_text(encoding="utf-8").splitlines()
    _, failures = shards.build(
        options.clips,
        options.out,
        names=names,
        fractions=shards.Fractions(val=options.val, test=options.test),
        shard_clips=options.shard_clips,
        workers=options.workers,
        beam=options.beam,
    )
    return _tell(failures, options.out)


def _tell(failures, folder: str) -> int:
    if failures:
        name, reason = failures[0]
        logging.warning(
            "%d failures are in %s/failures.tsv, first %s: %s",
            *(len(failures), folder, name, reason),
        )
    return len(failures)


if __name__ == "__main__":
    flags.DEFINE_string("clips", None, "Folder of clip folders.")
    flags.DEFINE_string("keep", None, "File with the names of the clips to take, one a line.")
    flags.DEFINE_string("out", None, "Folder of the data set.")
    flags.DEFINE_multi_string("archives", None, "Published archive to unpack into --clips.")
    flags.DEFINE_string("captions", None, "Table of captions as of Cap3D, for the archives.")
    flags.DEFINE_string("tfds", None, "Data folder of TFDS to write orbit_clips to.")
    flags.DEFINE_bool("verify", False, "Compare the files of --out with their checksums.")
    flags.DEFINE_float("val", 0.05, "Share of the assets for validation, on average.")
    flags.DEFINE_float("test", 0.05, "Share of the assets for tests, on average.")
    flags.DEFINE_integer("shard_clips", 256, "Clips a file.")
    flags.DEFINE_integer("workers", 1, "Files at a time, on this machine.", lower_bound=1)
    flags.DEFINE_multi_string("beam", None, "Option of an Apache Beam pipeline to build with.")
    cli.run(main)
