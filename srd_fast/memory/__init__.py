"""What training will take of memory, said before it is taken."""
