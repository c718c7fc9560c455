"""Speed and memory, each beside its peers in one run: `python -m benchmarks.cpu`, `python -m benchmarks.gpu`."""
