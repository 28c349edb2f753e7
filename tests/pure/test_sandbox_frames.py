"""What goes through the pipes of gVisor comes out as it was, or is refused."""

from __future__ import annotations

import json
import os
import threading

import pytest

from sandbox import frames


def through_a_pipe(data: bytes) -> object:
    out_of, into = os.pipe()
    with os.fdopen(into, "wb") as file:
        file.write(data)
    try:
        return frames.read(out_of)
    finally:
        os.close(out_of)


def with_header(header: object, files: bytes = b"") -> bytes:
    text = json.dumps(header).encode()
    return len(text).to_bytes(4, "big") + text + files


def test_a_message_and_files_larger_than_a_pipe_come_out_as_they_were() -> None:
    out_of, into = os.pipe()
    files = [b"", b"\0\xff" * 300_000, b"x"]
    writer = threading.Thread(target=frames.write, args=(into, {"op": "run", "text": "é\udc80"}, files))
    writer.start()
    assert frames.read(out_of) == ({"op": "run", "text": "é\udc80"}, files)
    writer.join()
    os.close(into)
    assert frames.read(out_of) is None
    os.close(out_of)


def test_the_form_is_fixed() -> None:
    assert through_a_pipe(with_header({"sizes": [2, 0], "ready": 1}, b"ab")) == ({"ready": 1}, [b"ab", b""])


@pytest.mark.parametrize(
    "data",
    [
        b"\0\0",
        b"\0\0\0\5{}",
        b"\0\0\0\2{}",
        b"\xff\xff\xff\xff",
        with_header([1]),
        with_header({"sizes": 3}),
        with_header({"sizes": [-1]}),
        with_header({"sizes": [1 << 40]}),
        with_header({"sizes": [0] * 5}),
        with_header({"sizes": [3]}, b"ab"),
        with_header({"sizes": [3]}),
    ],
)
def test_what_is_no_frame_is_refused(data: bytes) -> None:
    with pytest.raises(frames.Broken):
        through_a_pipe(data)
