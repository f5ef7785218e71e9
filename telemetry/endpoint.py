"""Where Prometheus finds a coordinator's metrics."""

import logging
import os
import socket
import socketserver
import sys
import threading
from http.server import ThreadingHTTPServer
from pathlib import Path
from urllib.parse import urlsplit

import ray.util
from prometheus_client import CollectorRegistry, MetricsHandler

from asyncsplit.options import TelemetryConfig
from asyncsplit.telemetry.collector import StateCollector
from asyncsplit.telemetry.discovery import Entry, Target, default_directory
from asyncsplit.telemetry.state import CoordinatorState

logger = logging.getLogger(__name__)


class Endpoint:
    """Serves one coordinator's metrics over HTTP, on threads of its own."""

    def __init__(self, server: "_Server") -> None:
        """Begin to answer; `serve` is the way to get one."""
        self._server = server
        self._entry: Entry | None = None
        host, port = server.server_address[:2]
        self.url = f"http://{_reachable(str(host))}:{port}/metrics"
        """What to scrape; for an endpoint on all addresses, this node's address in the cluster."""
        threading.Thread(
            target=server.serve_forever, name="asyncsplit-metrics", daemon=True
        ).start()

    @classmethod
    def serve(cls, state: CoordinatorState, config: TelemetryConfig) -> "Endpoint | None":
        """Serve a state's metrics, or return None: switched off, or the address is not to be had.

        The latter is logged and not raised, because training can go on without metrics.
        """
        if not config.enabled:
            return None
        registry = CollectorRegistry(auto_describe=True)
        registry.register(StateCollector(state))
        try:
            server = _Server(config.host, config.port, _Handler.factory(registry))
        except (OSError, UnicodeError) as error:  # the latter for what cannot be a host's name
            logger.warning(
                "The metrics of dataset %r are not served: cannot listen on host %r, port %d: %s."
                " Everything else works. TelemetryConfig(port=0) takes any free port; the host must"
                ' be an address of the node the coordinator runs on, "127.0.0.1" or "0.0.0.0".',
                state.name,
                config.host,
                config.port,
                error,
            )
            return None
        endpoint = cls(server)
        if config.discovery_dir is not False:
            endpoint._announce(state, config.discovery_dir)
        return endpoint

    def _announce(self, state: CoordinatorState, setting: str | bool) -> None:
        directory = Path(setting) if isinstance(setting, str) else default_directory()
        address = urlsplit(self.url).netloc
        target = Target(address, state.name, len(state.splits), os.getpid())
        try:
            self._entry = Entry(directory, target)
        except OSError as error:
            logger.warning(
                "Prometheus will not find the metrics of dataset %r by itself: no file can be"
                " written to %s: %s. They are at %s. TelemetryConfig(discovery_dir=...) takes"
                " another directory, or False for none.",
                state.name,
                directory,
                error,
                self.url,
            )

    def close(self) -> None:
        """Free the port; blocks the thread for up to half a second. Closing twice is no error."""
        if self._entry is not None:
            self._entry.withdraw()
        self._server.shutdown()
        self._server.server_close()


class _Server(ThreadingHTTPServer):
    def __init__(self, host: str, port: int, handler: type[MetricsHandler]) -> None:
        self.address_family, *_, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        super().__init__((str(address[0]), port), handler)

    def server_bind(self) -> None:
        # HTTPServer's own asks DNS for the name of this machine, which can take seconds.
        socketserver.TCPServer.server_bind(self)

    def handle_error(self, request: object, client_address: object) -> None:
        # A scraper that has lost patience is no news; the default prints a traceback for it.
        level = logging.DEBUG if isinstance(sys.exception(), OSError) else logging.ERROR
        logger.log(level, "Could not answer a scrape from %s", client_address, exc_info=True)


class _Handler(MetricsHandler):
    timeout = 10.0
    """Seconds a client may be silent: the thread that listens to it is freed after that."""


def _reachable(host: str) -> str:
    if host in ("0.0.0.0", "::"):
        host = ray.util.get_node_ip_address()
    return f"[{host}]" if ":" in host else host
