"""Processes that run engines for this process, and are started again if they die."""

from .pool import Pool, Worker

__all__ = ["Pool", "Worker"]
