"""How much memory training will take, said before it takes it."""
