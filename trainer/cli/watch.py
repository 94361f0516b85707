"""`gi watch`: says where the page is, and serves it until Ctrl-C."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from trainer.config import ConfigError
from trainer.report import serve as pages


def serve(folders: Sequence[Path], port: int) -> int:
    if not 0 <= port < 65536:
        raise ConfigError(f"is {port}; want a port, 1 to 65535", "--port")
    try:
        server = pages.server(folders, port)
    except OSError as error:
        raise ConfigError(error.strerror or str(error), "--port", str(port or pages.PORT)) from None
    at = server.server_address[1]
    print(f"http://{pages.ADDRESS}:{at}/    (Ctrl-C ends it)", flush=True)
    print(
        f"from another machine: ssh -L {at}:{pages.ADDRESS}:{at} <this one>, then the same page",
        flush=True,
    )
    with server:
        try:
            server.serve_forever()
        except KeyboardInterrupt:
            print()
    return 0
