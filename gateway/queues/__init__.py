"""Where requests wait for a worker: `base` has the protocols, `memory` the queue within one process."""
