"""The only private parts of PyTorch that the core uses."""
