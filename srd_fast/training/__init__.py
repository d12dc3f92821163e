"""Training through `SRDTrainer`: its config and order of samples, and what is measured before and after."""
