"""The table of docs/video.md about which frames become images, beside those that ffmpeg's own options take."""

from pathlib import Path

from tables.common import IMAGEFEED, Table

FRAMES = 60
GAP = ["-vf", "setpts=if(lt(N\\,25)\\,N\\,N+250)", "-fps_mode", "passthrough"]
RAW = ["-f", "rawvideo", "-pix_fmt", "rgb24"]
CASES = (  # name, file, rate of the video, further options of its encoder, frames per second
    ("25 fps, MP4, all", "a.mp4", "25", [], 25.0),
    ("25 fps, MP4", "a.mp4", "25", [], 5.0),
    ("25 fps, MP4, one a second", "a.mp4", "25", [], 1.0),
    ("24 fps, MP4, all", "g.mp4", "24", [], 24.0),
    ("24 fps, Matroska, all", "b.mkv", "24", [], 24.0),
    ("24 fps, Matroska", "b.mkv", "24", [], 12.0),
    ("30000/1001 fps, Matroska", "c.mkv", "30000/1001", [], 29.97),
    ("25 fps, begins at 0.5 s", "d.mp4", "25", ["-output_ts_offset", "0.5"], 5.0),
    ("25 fps, 10 s missing after 1 s", "e.mkv", "25", GAP, 5.0),
    ("10 fps, a rate that divides nothing", "f.mkv", "10", [], 4.0),
)
frames = Table("frames", ["Video", "frames per second", "build", "`-vf fps`", "`-vf fps=...:round=down`", "`-r`", "`-vf select`"])


def numbers(decoded):
    """How many frames there are, and the first ones, of 16 x 16 RGB frames whose level is four times their number."""
    import numpy as np

    found = [round(float(frame.mean()) / 4) for frame in np.frombuffer(decoded, np.uint8).reshape(-1, 16 * 16 * 3)]
    return f"{len(found)}: {', '.join(map(str, found[:6]))}{', ...' if len(found) > 6 else ''}"


def selected(file, rate, options, wanted):
    """The cells of a video that is drawn here: frames by `build`, and by ffmpeg's options."""
    import io

    import numpy as np
    from PIL import Image

    from imagefeed.preprocess.sources.video import Video
    from tables.video_inputs import ffmpeg

    gray = np.repeat((np.arange(FRAMES, dtype=np.uint8) * 4)[:, None], 16 * 16 * 3, 1).tobytes()
    codec = ["-c:v", "libx264", "-qp", "0"] if file.endswith(".mp4") else ["-c:v", "ffv1"]
    ffmpeg(*RAW, "-s", "16x16", "-r", rate, "-i", "pipe:", *options, *codec, file, data=gray)
    images = [image[2] for image in Video(file, "train", 0, 0, wanted).read(Path.cwd()) if image]
    own = b"".join(np.asarray(Image.open(io.BytesIO(image)).convert("RGB")).tobytes() for image in images)
    expression = f"select='isnan(prev_selected_t)+gt(floor(t*{wanted}),floor(prev_selected_t*{wanted}))'"
    ways = [["-vf", f"fps={wanted}"], ["-vf", f"fps={wanted}:round=down"], ["-r", wanted]]
    ways.append(["-vf", expression, "-fps_mode", "passthrough"])
    return [f"{wanted:g}", numbers(own), *(numbers(ffmpeg("-i", file, *way, *RAW, "pipe:")) for way in ways)]


for name, *case in CASES:
    frames.add(name, [IMAGEFEED])(lambda case=case: selected(*case))
