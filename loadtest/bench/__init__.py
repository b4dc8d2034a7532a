"""The benchmark: the gateway against (a) FastAPI + uvicorn + ONNX Runtime and (b) ONNX Runtime in process.

`python -m loadtest.bench` runs it; `loadtest/README.md` says how to read it. The modules: `bodies` (request bytes), `generators`
(wrk and h2load), `servers` (processes and their CPU), `rawort` (baseline b), `probes` (one checked request with a real client),
`plan` (what is measured, in which order), `runner` (one cell), `statistics` (medians and ratios), `report` (bars, table, JSON).
"""
