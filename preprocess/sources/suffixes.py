"""Classifies files by suffix. Files with other suffixes, or none, are tried as images."""

from imagefeed.preprocess.sources.video import SUFFIXES as VIDEOS

IMAGES = VIDEOS | set(
    "jpg jpeg jpe jfif png apng gif webp bmp dib tif tiff tga ico ppm pgm pbm pnm pcx sgi heic heif hif avif jxl jp2 j2k j2c jpx "
    "dng psd exr hdr".split()
)
# Annotations, notes, settings and programs are never images, so they are skipped and counted, not reported as damaged.
NO_IMAGES = set(
    "txt xml json jsonl csv tsv yaml yml toml md rst html htm log lst names ini cfg conf db lnk url webloc py pyc ipynb m mat sh "
    "bat js css cache md5 sha1 sha256 sum idx cls pkl pickle doc docx xls xlsx rtf tex bib".split()
)
# Beside class folders these are not images either; inside a class folder they would be damage.
PACKED = set("zip tar gz tgz bz2 tbz xz zst 7z rar".split())
ARCHIVES = PACKED | set("pdf npy npz h5 hdf5 parquet rec bin".split())
DOCUMENTS = {"readme", "license", "licence", "copying", "changelog", "authors", "makefile", "md5sums", "sha256sums", "icon\r"}


def suffix(name: str) -> str:
    """In lower case, without the dot; empty if there is none."""
    return name[name.rfind(".") + 1 :].lower() if "." in name else ""


def may_be_image(name: str) -> bool:
    """Whether a file beside class folders may be a stray image."""
    return suffix(name) not in NO_IMAGES | ARCHIVES and name.lower() not in DOCUMENTS
