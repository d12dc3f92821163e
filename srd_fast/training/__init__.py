"""Training with `SRDTrainer`: its config, the order of samples, and evaluation."""
