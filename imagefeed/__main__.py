"""python -m imagefeed: the `imagefeed` command."""

from imagefeed.cli import main

if __name__ == "__main__":
    main(prog_name="python -m imagefeed")
