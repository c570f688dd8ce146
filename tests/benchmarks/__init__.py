"""energynet and its peers on the same work: ``python -m tests.benchmarks``."""
