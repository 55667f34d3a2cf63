"""Downloads, behind the extra ``download`` (pooch): resumed where they broke off, and checked before they are used."""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path
from typing import IO, Any

from anellm import safeio
from anellm.errors import DataError, UnavailableError
from anellm.machine import human_bytes

ATTEMPTS = 5
_TIMEOUT_S = 30
_BLOCK = 1 << 14  # a connection that breaks loses less than one


def fetch(url: str, name: str, sha256: str | None = None, folder: str | Path | None = None) -> Path:
    """Return a file from the network, downloading it unless it is there already.

    What has arrived stays in ``NAME.part`` when a download breaks off, and the next one goes on from there if the
    server's file is still the same (by its ETag or date).

    Args:
        url: an http or https address.
        name: what to call it in the folder.
        sha256: of the whole file, in hexadecimal; None takes what comes, and says what it is.
        folder: where it is kept; None takes the user's cache folder.

    Raises:
        DataError: when it cannot be fetched, or is not the file that sha256 says.
        UnavailableError: if the ``pooch`` package is not installed.
    """
    try:
        import pooch
    except ImportError:
        raise UnavailableError(
            "a download needs the pooch package: pip install 'anellm[download]'; or fetch the file yourself and name "
            f"it with --file: {url}"
        ) from None
    if not url.startswith(("http://", "https://")):
        raise DataError(f"{url}: expected an http or https address")
    place = Path(folder) if folder is not None else Path(pooch.os_cache("anellm"))
    safeio.make_directory(place)
    pooch.get_logger().setLevel("WARNING")
    try:
        found = pooch.retrieve(
            url,
            known_hash=None if sha256 is None else f"sha256:{sha256.lower()}",
            fname=name,
            path=place,
            downloader=_Resuming(place / f"{name}.part"),
        )
    except ValueError as error:  # the hash; what was downloaded is gone
        raise DataError(f"{url}: {' '.join(str(error).split())}") from None
    except OSError as error:  # those of requests among them
        raise DataError(f"{url}: cannot download: {error}; run it again to go on") from None
    if sha256 is None:
        print(f"{found}: SHA-256 {pooch.file_hash(found)}", file=sys.stderr)
    return Path(found)


class _Resuming:
    """A downloader for pooch that keeps what has arrived and asks for the rest."""

    def __init__(self, part: Path) -> None:
        self._part, self._note = part, part.with_name(part.name + ".json")

    def __call__(self, url: str, output: str | IO[bytes], _pooch: Any, check_only: bool = False) -> bool | None:
        """Download to the part file, several times if need be, and move it to where pooch wants it."""
        import requests

        if check_only:
            return bool(requests.head(url, timeout=_TIMEOUT_S, allow_redirects=True).ok)
        for attempt in range(ATTEMPTS):
            before = self._size()
            try:
                self._attempt(requests, url)
                break
            except (requests.ConnectionError, requests.Timeout, requests.exceptions.ChunkedEncodingError):
                if attempt == ATTEMPTS - 1:
                    raise
                if self._size() <= before:
                    time.sleep(min(8.0, 0.5 * 2**attempt))
        os.replace(self._part, str(output))
        self._note.unlink(missing_ok=True)
        return None

    def _size(self) -> int:
        return self._part.stat().st_size if self._part.is_file() else 0

    def _state(self) -> tuple[int, str]:
        """Return how much has arrived, and what identifies the server's file."""
        try:
            note = json.loads(self._note.read_text(encoding="utf-8"))
            mark = note["mark"] if isinstance(note, dict) else None
        except (OSError, ValueError, KeyError):
            mark = None
        return (self._size(), mark) if isinstance(mark, str) and mark else (0, "")

    def _attempt(self, requests: Any, url: str) -> None:
        have, mark = self._state()
        headers = {"Accept-Encoding": "identity"}
        if have:
            headers |= {"Range": f"bytes={have}-", "If-Range": mark}
        with requests.get(url, headers=headers, stream=True, timeout=_TIMEOUT_S) as answer:
            if answer.status_code == 416:  # no such range: the part is of no use
                self._part.unlink(missing_ok=True)
                self._note.unlink(missing_ok=True)
                raise requests.ConnectionError("the server refused to go on; starting anew")
            answer.raise_for_status()
            resumed = answer.status_code == 206 and answer.headers.get("Content-Range", "").startswith(f"bytes {have}-")
            if answer.status_code == 206 and not resumed:
                raise requests.ConnectionError("the server sent another part than was asked for")
            start = have if resumed else 0
            strong = answer.headers.get("ETag", "")
            mark = strong if strong and not strong.startswith("W/") else answer.headers.get("Last-Modified", "")
            if not resumed:
                self._note.write_text(json.dumps({"url": url, "mark": mark}), encoding="utf-8")
            length = answer.headers.get("Content-Length")
            total = start + int(length) if length is not None and length.isdigit() else None
            self._receive(answer, start, total)
        if total is not None and self._size() != total:
            raise requests.ConnectionError(f"expected {total} bytes, found {self._size()}")

    def _receive(self, answer: Any, start: int, total: int | None) -> None:
        shown = 0.0
        with self._part.open("r+b" if start else "wb") as file:
            file.truncate(start)
            file.seek(start)
            for block in answer.iter_content(_BLOCK):
                file.write(block)
                now = time.monotonic()
                if sys.stderr.isatty() and now - shown > 1:
                    shown = now
                    of = f" of {human_bytes(total)}" if total else ""
                    print(f"\r{human_bytes(file.tell())}{of}", end="", file=sys.stderr)
            file.flush()
            os.fsync(file.fileno())
        if shown:
            print(file=sys.stderr)
