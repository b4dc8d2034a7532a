"""Offline work on models: rebuilding, quantizing, measuring and promoting them; nothing here runs on the request path."""
