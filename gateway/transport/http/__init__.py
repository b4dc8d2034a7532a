"""The HTTP transport: KServe V2 with Triton's extensions, on granian."""

from gateway.transport.http.app import HttpApp
from gateway.transport.http.limits import HttpLimits
from gateway.transport.http.server import Counted, HttpServer, TlsFiles

__all__ = ["Counted", "HttpApp", "HttpLimits", "HttpServer", "TlsFiles"]
