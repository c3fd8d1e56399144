"""python -m pipeline: what limits the input pipeline."""

from imagefeed.dataset.errors import one_sentence

if __name__ == "__main__":
    with one_sentence():  # Ctrl-C while the libraries load, too
        from imagefeed.pipeline.cli import main
    main(prog_name="python -m pipeline")
