"""A server that speaks the S3 protocol on loopback, and can be made to fail as stores and networks do."""

import contextlib
import logging
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from typing import Any
from urllib.request import Request, urlopen

import pytest


class Shelf:
    """Its objects, and what it does with requests for them.

    Attributes:
        asked: how often each object was asked for, by its key.
        spoil: given the key of an object and the number of the request for it, what becomes of the answer: `error`,
            `cut`, `wrong`, or nothing.
    """

    def __init__(self, client: Any):
        self.client = client
        self.asked: Counter[str] = Counter()
        self.spoil: Callable[[str, int], str] = lambda key, number: ""

    def __call__(self, bucket: str) -> dict[str, bytes]:
        """All objects of a bucket."""
        pages = self.client.get_paginator("list_objects_v2").paginate(Bucket=bucket)
        keys = [item["Key"] for page in pages for item in page.get("Contents", [])]
        return {key: self.client.get_object(Bucket=bucket, Key=key)["Body"].read() for key in keys}

    def put(self, key: str, content: bytes) -> None:
        """Lay an object into the bucket called shelf."""
        self.client.put_object(Bucket="shelf", Key=key, Body=content)

    def between(self, app: Callable[..., Iterable[bytes]]) -> Callable[..., Iterable[bytes]]:
        """The server's application, between which and its callers this stands."""

        def answer(environ: dict[str, Any], start_response: Callable[..., Any]) -> Iterable[bytes]:
            key = environ["PATH_INFO"].removeprefix("/shelf/")
            if environ["REQUEST_METHOD"] != "GET" or key.startswith("/"):
                return app(environ, start_response)
            self.asked[key] += 1
            fault = self.spoil(key, self.asked[key])
            if fault == "error":
                start_response("500 Internal Server Error", [("Content-Length", "0")])
                return [b""]

            def spoilt(status: str, headers: list[tuple[str, str]], *more: Any) -> Any:
                if fault:  # by its sums, which not all stores tell, a client would see what is wrong
                    headers = [header for header in headers if "checksum" not in header[0].lower()]
                return start_response(status, [*headers, *([("Connection", "close")] if fault == "cut" else [])], *more)

            body = b"".join(app(environ, spoilt))
            half = len(body) // 2
            if fault == "wrong":
                body = body[:half] + bytes([body[half] ^ 1]) + body[half + 1 :]
            return [body[:half] if fault == "cut" else body]

        return answer


@contextlib.contextmanager
def serving() -> Iterator[Shelf]:
    """A server with an empty bucket called shelf; only the environment says where it is, as of any such store."""
    import boto3
    import s3fs
    from moto.server import ThreadedMotoServer

    logging.getLogger("werkzeug").setLevel(logging.ERROR)  # or each request is a line
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    settings = {
        "AWS_ENDPOINT_URL": f"http://{host}:{port}",
        "AWS_ACCESS_KEY_ID": "nobody",
        "AWS_SECRET_ACCESS_KEY": "secret",
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_MAX_ATTEMPTS": "1",  # of the client's own, so that ours are seen
    }
    with pytest.MonkeyPatch.context() as patch:
        for name, value in settings.items():
            patch.setenv(name, value)
        patch.setattr(s3fs.S3FileSystem, "retries", 1)
        # All servers of a process keep their objects in the same place.
        urlopen(Request(f"http://{host}:{port}/moto-api/reset", method="POST")).close()
        client = boto3.client("s3")
        client.create_bucket(Bucket="shelf")
        shelf, running = Shelf(client), server._server
        assert running is not None
        running.app = shelf.between(running.app)
        s3fs.S3FileSystem.clear_instance_cache()
        yield shelf
        s3fs.S3FileSystem.clear_instance_cache()
        client.close()
        server.stop()
