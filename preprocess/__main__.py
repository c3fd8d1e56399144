"""python -m preprocess: raw images to a dataset."""

from preprocess.cli import main

if __name__ == "__main__":
    main(prog_name="python -m preprocess")
