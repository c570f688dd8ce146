"""All uses of PyTorch's private interfaces by the core."""
