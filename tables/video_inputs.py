"""The videos of docs/video.md."""

import subprocess

from tables.common import INPUTS

WIDTH, HEIGHT = 320, 240
YUV = (120, 90, 190)  # of the flat pictures: a red
COLORS = {
    "untagged, 320x240": ("flat", []),
    "untagged, 1920x1080": ("large", []),
    "tagged BT.601 (smpte170m)": ("601", ["smpte170m"] * 3),
    "tagged BT.709": ("709", ["bt709"] * 3),
    "tagged BT.2020, not constant": ("2020", ["bt2020nc", "bt2020", "bt2020-10"]),
    "BT.709 matrix, BT.2020 primaries": ("mixed", ["bt709", "bt2020", "bt709"]),
    "tagged BT.709, full range": ("full", ["bt709"] * 3),
}
SHAPES = {
    "rotated by 90 degrees": "rotated.mp4",
    "mirrored": "mirrored.mp4",
    "Matroska cropping, 320x240 to 288x208": "cropped.mkv",
    "an edit list that begins at frame 25 of 75": "edited.mp4",
    "VP9 with alpha, transparent left, green under it": "alpha.webm",
    "two tracks, 160x120 and the default 320x240": "tracks.mkv",
}
SEEKS = ("mp4", "mkv", "ts")


def numbered(n, width=WIDTH, height=HEIGHT):
    """A gray picture whose eight columns are the bits of n: bright for 1."""
    row = b"".join(bytes([200 if n >> bit & 1 else 50]) * (width // 8) for bit in range(8))
    return row * height


def number(pixels):
    """The n of a picture of `numbered`."""
    row = pixels[pixels.shape[0] // 2, :, 0].astype(int)
    return sum(1 << bit for bit in range(8) if row[len(row) * (2 * bit + 1) // 16] > 125)


def ffmpeg(*arguments, data=b""):
    import imageio_ffmpeg

    command = [imageio_ffmpeg.get_ffmpeg_exe(), "-v", "error", "-y", *map(str, arguments)]
    return subprocess.run(command, input=data, stdout=subprocess.PIPE, check=True).stdout


def write_inputs(folder=INPUTS):
    for name, tags in COLORS.values():
        width, height = (1920, 1080) if name == "large" else (WIDTH, HEIGHT)
        planes = bytes([YUV[0]]) * (width * height) + b"".join(bytes([value]) * (width * height // 4) for value in YUV[1:])
        tagged = [each for pair in zip(("-colorspace", "-color_primaries", "-color_trc"), tags) for each in pair]
        tagged += ["-color_range", "pc" if name == "full" else "tv"] if tags else []
        source = ["-f", "rawvideo", "-pix_fmt", "yuv420p", "-s", f"{width}x{height}", "-r", 25, *tagged, "-i", "-"]
        ffmpeg(*source, "-c:v", "libx264", "-qp", 0, *tagged, folder / f"{name}.mp4", data=planes * 3)
    gray = ["-f", "rawvideo", "-pix_fmt", "gray", "-s", f"{WIDTH}x{HEIGHT}", "-r", 25, "-i", "-", "-pix_fmt", "yuv420p"]
    frames = b"".join(numbered(n) for n in range(250))
    whole = ["-c:v", "libx264", "-qp", 15, "-g", 50, "-bf", 2]
    for kind in SEEKS:
        ffmpeg(*gray, *whole, folder / f"seek.{kind}", data=frames)
    half = folder / "half.mp4"
    left_right = b"".join((bytes([200]) * (WIDTH // 2) + bytes([50]) * (WIDTH // 2)) * HEIGHT for _ in range(5))
    ffmpeg(*gray, *whole, half, data=left_right)
    ffmpeg("-display_rotation", -90, "-i", half, "-c", "copy", folder / "rotated.mp4")
    ffmpeg("-display_hflip", "-i", half, "-c", "copy", folder / "mirrored.mp4")
    tags = "setparams=colorspace=bt709:color_primaries=bt709:color_trc=bt709:range=tv"
    ffmpeg("-i", half, "-vf", tags, "-c:v", "libx264", "-write_crc32", 0, folder / "cropped.mkv")
    crop(folder / "cropped.mkv", 16)
    ffmpeg(*gray, "-c:v", "libx264", "-g", 75, "-bf", 0, half, data=frames[: 75 * WIDTH * HEIGHT])
    ffmpeg("-ss", "1.0", "-i", half, "-c", "copy", folder / "edited.mp4")
    clear = (bytes([0, 200, 0, 0]) * (WIDTH // 2) + bytes([0, 200, 0, 255]) * (WIDTH // 2)) * HEIGHT
    rgba = ["-f", "rawvideo", "-pix_fmt", "rgba", "-s", f"{WIDTH}x{HEIGHT}", "-r", 25, "-i", "-"]
    ffmpeg(*rgba, "-c:v", "libvpx-vp9", "-pix_fmt", "yuva420p", "-b:v", "1M", folder / "alpha.webm", data=clear * 5)
    two = ["-filter_complex", "split[a][b];[a]scale=160:120[c]", "-map", "[c]", "-map", "[b]", "-c:v", "libx264"]
    two += ["-disposition:v:0", 0, "-disposition:v:1", "default"]
    ffmpeg(*gray[:-2], *two, folder / "tracks.mkv", data=frames[: 9 * WIDTH * HEIGHT])


def crop(path, pixels):
    """Writes a Matroska file's cropping, of so many pixels on each side, over the description of its colors."""
    data = path.read_bytes()
    at = data.index(b"\x55\xb0")
    length = 3 + (data[at + 2] & 0x7F)
    sides = b"".join(bytes([0x54, side, 0x81, pixels]) for side in (0xAA, 0xBB, 0xCC, 0xDD))
    void = bytes([0xEC, 0x80 | (length - len(sides) - 2)]) + bytes(length - len(sides) - 2)
    path.write_bytes(data[:at] + sides + void + data[at + length :])
