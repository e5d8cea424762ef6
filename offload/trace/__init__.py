"""Spans on named tracks, and counters: what each link and worker did, when, and how many bytes."""

from .tracer import Span, Tracer

__all__ = ["Span", "Tracer"]
