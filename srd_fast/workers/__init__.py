"""Processes that run other engines for this one, and are started again where they die."""

from .pool import Pool, Worker

__all__ = ["Pool", "Worker"]
