"""Metrics, spans and live views: what happens in the data plane, while it happens."""
