"""The wires: HTTP, gRPC and metrics. The only place that imports granian, FastAPI or grpc."""
