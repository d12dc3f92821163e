"""What the library costs and what it gains, measured; `python -m benchmarks.run` measures everything."""
