"""Which frames of a video become images, beside those that ffmpeg's filter `fps` and its option -r take.

    python -m benchmarks.frames

Prints the table of docs/video.md. The videos are made on the spot, and each frame's gray level is its number.
"""

import subprocess
import tempfile
from pathlib import Path

import numpy as np

from imagefeed.preprocess.ffmpeg import ffmpeg_path, version
from imagefeed.preprocess.sources.video import Video

FRAMES = 60
GAP = ["-vf", "setpts=if(lt(N\\,25)\\,N\\,N+250)", "-fps_mode", "passthrough"]
RAW = ["-f", "rawvideo", "-pix_fmt", "rgb24"]
CASES = (  # name, file, rate of the video, further options of its encoder, frames per second
    ("25 fps, MP4", "a.mp4", "25", [], 25.0),
    ("25 fps, MP4", "a.mp4", "25", [], 5.0),
    ("25 fps, MP4", "a.mp4", "25", [], 1.0),
    ("24 fps, Matroska", "b.mkv", "24", [], 24.0),
    ("24 fps, Matroska", "b.mkv", "24", [], 12.0),
    ("30000/1001 fps, Matroska", "c.mkv", "30000/1001", [], 29.97),
    ("25 fps, begins at 0.5 s", "d.mp4", "25", ["-output_ts_offset", "0.5"], 5.0),
    ("25 fps, 10 s missing after 1 s", "e.mkv", "25", GAP, 5.0),
    ("10 fps, a rate that divides nothing", "f.mkv", "10", [], 4.0),
)


def frames_of(decoded: bytes) -> list[int]:
    """The numbers of 16 x 16 RGB frames."""
    return [round(float(frame.mean()) / 4) for frame in np.frombuffer(decoded, np.uint8).reshape(-1, 16 * 16 * 3)]


def by_ffmpeg(path: Path, *options: str) -> list[int]:
    command = [ffmpeg_path(), "-nostdin", "-loglevel", "error", "-i", path, *options, *RAW, "pipe:"]
    return frames_of(subprocess.run(command, capture_output=True, check=True).stdout)


def by_build(path: Path, frames_per_second: float) -> list[int]:
    pngs = [image[2] for image in Video(path.name, "train", 0, 0, frames_per_second).read(path.parent) if image]
    decode = [ffmpeg_path(), "-loglevel", "error", "-f", "png_pipe", "-i", "pipe:", "-fps_mode", "passthrough"]
    done = subprocess.run([*decode, *RAW, "pipe:"], input=b"".join(pngs), capture_output=True, check=True)
    return frames_of(done.stdout)


def show(numbers: list[int]) -> str:
    """How many frames there are, and the first ones."""
    return f"{len(numbers)}: {', '.join(map(str, numbers[:7]))}{', ...' if len(numbers) > 7 else ''}"


def main() -> None:
    print(f"ffmpeg {version()}; videos of {FRAMES} frames\n")
    print("| video | frames per second | build | -vf fps | -r |\n|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as folder:
        for name, file, rate, options, wanted in CASES:
            path = Path(folder) / file
            pixels = np.repeat((np.arange(FRAMES, dtype=np.uint8) * 4)[:, None], 16 * 16 * 3, 1).tobytes()
            source = [*RAW, "-s", "16x16", "-r", rate, "-i", "pipe:"]
            codec = ["-c:v", "libx264", "-qp", "0"] if path.suffix == ".mp4" else ["-c:v", "ffv1"]
            subprocess.run([ffmpeg_path(), "-y", "-loglevel", "error", *source, *options, *codec, path], input=pixels, check=True)
            found = by_build(path, wanted), by_ffmpeg(path, "-vf", f"fps={wanted}"), by_ffmpeg(path, "-r", f"{wanted}")
            print(f"| {name} | {wanted:g} | {' | '.join(map(show, found))} |")


if __name__ == "__main__":
    main()
