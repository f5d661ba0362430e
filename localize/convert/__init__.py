"""From a user's model to parts and heads: capture, cost, cut, balance, split, graft."""
