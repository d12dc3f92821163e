"""A whole distillation from one config file, in steps that can each resume where they were interrupted."""
