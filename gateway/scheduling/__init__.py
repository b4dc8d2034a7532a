"""Pure decisions about batches: `policy` chooses the requests, `batch` joins and splits their tensors."""
