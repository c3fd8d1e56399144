"""python -m preprocess: raw images to a dataset."""

from imagefeed.dataset.errors import one_sentence

if __name__ == "__main__":
    with one_sentence():  # Ctrl-C while the libraries load, too
        from imagefeed.preprocess.cli import main
    main(prog_name="python -m preprocess")
