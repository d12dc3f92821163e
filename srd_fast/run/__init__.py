"""A whole distillation from one config file, as steps that can each go on where they were interrupted."""
