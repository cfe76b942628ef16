"""`python -m hawk_compile`: the command line, also for `torchrun -m` and `accelerate launch -m`."""

from hawk_compile.tools.cli import main

if __name__ == "__main__":
    main()
