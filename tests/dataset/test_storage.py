"""Where datasets are: paths and URLs, and opening a store, in a forked process too."""

import pickle
import subprocess
import sys
from pathlib import Path

import pytest

from imagefeed.dataset.errors import UserError
from imagefeed.dataset.storage import Url, exists, place, read_bytes


@pytest.mark.parametrize(
    "text",
    ["s3://b/x/y", "gs://b/x", "az://c/x", "abfs://c@account.dfs.core.windows.net/x", "http://127.0.0.1:80/x", "https://h"],
)
def test_urls_are_kept_as_they_were_given(text):
    for given in (text, f"{text}/", text.replace(text.split(":")[0], text.split(":")[0].upper(), 1)):
        assert str(place(given)) == text and place(given) == Url(text) == pickle.loads(pickle.dumps(place(given)))
    assert isinstance(place(text), Url) and place(Url(text)) == Url(text) and len({Url(text), Url(f"{text}/")}) == 1


@pytest.mark.parametrize(
    ("given", "expected"),
    [("data/x", "data/x"), (Path("x"), "x"), ("file:///data/a%20b", "/data/a b"), ("/a:b//c", "/a:b/c"), ("", ".")],
)
def test_anything_else_is_a_path(given, expected):
    assert place(given) == Path(expected)


def test_a_url_has_the_parts_of_a_path():
    url = Url("s3://b/x/y.tar")
    assert (url.scheme, url.root, url.key, url.name, url.suffix) == ("s3", "s3://b", "x/y.tar", "y.tar", ".tar")
    assert (url.parent, url.parent.parent, url.parent.parent.parent) == (Url("s3://b/x"), Url("s3://b"), Url("s3://b"))
    assert url.parent / "y.tar" == url and Url("s3://b").key == "" and Url("s3://b").name == "b"
    assert (Url("s3://b/x") / "a #1?%20.jpg").key == "x/a #1?%20.jpg"
    assert Url("http://h/a%20b/c").key == "a b/c" and (Url("http://h/a%20b") / "c #1?%20").key == "a b/c #1?%20"
    assert url.absolute() is url.resolve() is url
    assert url.is_relative_to(Url("s3://b/x")) and not url.is_relative_to(Url("s3://b/x/y")) and not url.is_relative_to(Path("/"))
    with pytest.raises(AttributeError):
        url._text = "s3://b"


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("ftp://h/x", "ftp://h/x: not the URL of a store; give s3://BUCKET/NAME, gs://, az://"),
        ("s3:///x", "not the URL of a store"),
        ("s3://b//x", "a part of the path is empty"),
        ("s3://b/../x", "a part of the path is empty or has only dots"),
        ("http://me:secret@h/x", "http://h: a URL must not hold a password; set it in the environment"),
        ("https://h/x?sig=secret", "https://h/x: a URL must not hold a query"),
        (Path("s3://b/x"), "s3:/b/x: a Path cannot hold a URL, as it drops a slash; give the URL as a string"),
    ],
)
def test_a_url_that_cannot_be_used_is_refused_without_its_secrets(given, message):
    with pytest.raises(UserError, match=message.replace("?", r"\?").replace("(", r"\(")) as caught:
        place(given)
    assert "secret" not in str(caught.value)


def test_files_and_objects_are_read_alike(store_server, bucket, tmp_path):
    (store_server.folder / bucket / "x").write_bytes(b"abc")
    for folder in (tmp_path / "store" / bucket, place(f"s3://{bucket}"), place(f"{store_server.url}/{bucket}")):
        assert read_bytes(folder / "x") == b"abc"
        assert exists(folder / "x") and not exists(folder / "y")
        with pytest.raises(FileNotFoundError) as caught:
            read_bytes(folder / "y")
        assert caught.value.filename == str(folder / "y")


def test_a_store_without_obstore_says_how_to_install_it(tmp_path):
    (tmp_path / "obstore").mkdir()
    (tmp_path / "obstore" / "__init__.py").write_text("raise ImportError(name='obstore')")
    code = f"import sys; sys.path.insert(0, {str(tmp_path)!r})\nfrom imagefeed.dataset import storage\n"
    code += "try:\n  storage.read_bytes(storage.place('s3://b/x'))\nexcept Exception as error:\n  print(error)"
    output = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout
    assert output == "s3://b/x: stores need obstore; install it with: pip install 'imagefeed[cloud]'\n"


FORKED = """
import os, sys
from imagefeed.dataset.storage import place, read_bytes, store_of
from imagefeed.dataset.errors import UserError
url = place(sys.argv[1])
store = store_of(url)
print(len(read_bytes(url)), flush=True)
def forked(code):
    if not (child := os.fork()):
        try:
            code()
        except UserError as error:
            print(error, flush=True)
        finally:
            os._exit(0)
    os.waitpid(child, 0)
def child():
    print("child", len(read_bytes(url)), flush=True)
    forked(lambda: print("grandchild", len(read_bytes(url)), flush=True))
forked(child)
forked(lambda: store.get(url))
print(len(read_bytes(url)), flush=True)
"""


def test_a_forked_process_opens_its_own_store(store_server, bucket):
    """obstore's threads do not survive a fork; a read would wait for them forever."""
    (store_server.folder / bucket / "x").write_bytes(bytes(3_000_000))
    process = subprocess.run(
        [sys.executable, "-c", FORKED, f"s3://{bucket}/x"], capture_output=True, text=True, timeout=60, check=True
    )
    lines = process.stdout.splitlines()
    assert lines[:3] == ["3000000", "child 3000000", "grandchild 3000000"] and lines[4:] == ["3000000"], process.stderr
    assert lines[3].startswith(f"s3://{bucket}/x: opened before this process was forked")
