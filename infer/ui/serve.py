"""Serves the page of `ip2p-infer --ui`, to this machine alone unless told otherwise."""

import contextlib
import importlib.util
import logging
import os
import signal
import socket
import tempfile
from pathlib import Path

from ...encode.base.console import say
from ...encode.base.errors import EditError
from ..config import InferConfig


def serve(config: InferConfig) -> int:
    """Serve the page until Ctrl-C; return the command's exit status. Pictures are kept as long.

    Raises:
        EditError: gradio is missing, the port is taken, or the first model or an example cannot be loaded.
    """
    if importlib.util.find_spec("gradio") is None:
        raise EditError("--ui needs gradio: pip install gradio")
    with _listen(config.page.host, config.page.port) as listener, tempfile.TemporaryDirectory(prefix="ip2p-") as folder:
        os.environ["GRADIO_TEMP_DIR"] = folder  # for uploads; gradio reads it on import
        import gradio
        import uvicorn
        from fastapi import FastAPI

        from .layout import CSS, THEME
        from .page import Page

        blocks = Page(config, Path(folder)).layout.blocks
        # The history of runs is gradio's own, which outlives the session.
        app = gradio.mount_gradio_app(
            FastAPI(), blocks, path="/", theme=THEME, css=CSS, footer_links=[], run_history=False, ssr_mode=False
        )
        # Else gradio takes any path on this disk for an upload's: it checks the apps alone that it launched itself.
        blocks.has_launched = True
        # Each open page holds a connection, for which the end would wait, and of whose loss uvicorn would tell.
        server = uvicorn.Server(uvicorn.Config(app, log_level="warning", timeout_graceful_shutdown=1))
        logging.getLogger("uvicorn.error").addFilter(lambda record: not server.should_exit)
        with contextlib.suppress(KeyboardInterrupt):
            # uvicorn passes a signal on once it has stopped: SIGTERM, too, must leave by way of the folder's removal.
            signal.signal(signal.SIGTERM, signal.default_int_handler)
            host, port = listener.getsockname()[:2]
            say(f"ip2p-infer: the page is at http://{host}:{port} (Ctrl-C ends it)")
            server.run([listener])
    return 0


def _listen(host: str, port: int) -> socket.socket:
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        return socket.create_server((host, port), family=family)
    except (OSError, OverflowError) as error:
        raise EditError(f"--host {host} --port {port}: {error}; --port 0 takes any free port") from None
