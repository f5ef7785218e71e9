"""A real receiver of OTLP over HTTP."""

import http.server
import queue
import threading
from typing import Any

from opentelemetry.proto.collector.metrics.v1.metrics_service_pb2 import (
    ExportMetricsServiceRequest,
)
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest


class Receiver:
    """Every request it got, decoded."""

    def __init__(self, port: int = 0) -> None:
        self.requests: queue.Queue[ExportMetricsServiceRequest] = queue.Queue()
        self.traces: queue.Queue[ExportTraceServiceRequest] = queue.Queue()
        receiver = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["Content-Length"]))
                if self.path == "/v1/traces":
                    receiver.traces.put(ExportTraceServiceRequest.FromString(body))
                else:
                    receiver.requests.put(ExportMetricsServiceRequest.FromString(body))
                self.send_response(200)
                self.end_headers()

            def log_message(self, format: str, *args: Any) -> None: ...

        self._server = http.server.ThreadingHTTPServer(("127.0.0.1", port), Handler)
        self.port = self._server.server_address[1]
        address = f"http://127.0.0.1:{self.port}"
        self.url = f"{address}/v1/metrics"
        self.traces_url = f"{address}/v1/traces"
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()
