"""A whole distillation from one config file: its steps, each of which can be taken up where it was left."""
