"""Language models: hook points, hidden states, language heads, sampling, reward models."""
