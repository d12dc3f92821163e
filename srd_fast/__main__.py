"""`python -m srd_fast`: the command, as launchers start it in several processes."""

from .cli import main

if __name__ == "__main__":
    main()
