"""A program for tests of signals: serves a fake service and prints its URL. Arguments: tokenizer folder, seconds per token,
drain timeout, port."""

from __future__ import annotations

import contextlib
import logging
import sys

from tests.server.fake_service import FakeService

from headrace.models.text.tokenizer import Tokenizer
from headrace.server import ServerSettings, create_app, run_server


@contextlib.asynccontextmanager
async def background():
    print("background entered", flush=True)
    yield
    print("background left", flush=True)


def main() -> int:
    logging.basicConfig(level="INFO", stream=sys.stderr)
    folder, delay, timeout, port = sys.argv[1:]
    service = FakeService(delay_s=float(delay))
    settings = ServerSettings(drain_timeout_s=float(timeout))
    app = create_app(service, lambda: Tokenizer(folder), settings, background=background)
    good = run_server(app, port=int(port), on_listen=lambda url: print(url, flush=True))
    print("ended", flush=True)
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
