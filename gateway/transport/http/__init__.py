"""The HTTP transport: KServe V2 with Triton's extensions, on granian."""

from gateway.transport.http.app import HttpApp
from gateway.transport.http.limits import HttpLimits
from gateway.transport.http.server import HttpServer, TlsFiles

__all__ = ["HttpApp", "HttpLimits", "HttpServer", "TlsFiles"]
