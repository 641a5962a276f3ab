"""Streaming metrics: criteria over a stream and across processes."""
