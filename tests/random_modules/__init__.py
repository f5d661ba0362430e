"""Random ``nn.Module``s as generated Python source, and the property that a conversion of one must have."""
