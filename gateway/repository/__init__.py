"""The model repository: which models are there, what each is served from, and what has changed.

Reads Triton's layout and decides nothing about a model's life. All of it is blocking file work: call it in a
thread.
"""

from gateway.repository.fingerprint import Changes, Fingerprint
from gateway.repository.repository import ModelSource, Repository
from gateway.repository.roots import Root

__all__ = ["Changes", "Fingerprint", "ModelSource", "Repository", "Root"]
